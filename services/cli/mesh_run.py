"""A mesh for as long as something is done with it: started in order, waited for, stopped in order, whatever ends the work.

The first SIGINT, SIGTERM or SIGHUP ends the work and drains the mesh; the second one kills it.
"""

import asyncio
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

from services.cli.mesh_plan import SETTINGS, STAGES, MeshPlan
from services.cli.readiness import wait_workers_up
from services.cli.start_board import StartBoard
from services.cli.supervisor import Supervisor


def run_mesh(plan: MeshPlan, *, log_dir: Path, board: StartBoard, work: Callable[[], Awaitable[None]]) -> None:
    """Runs `work` when all processes serve and the routers know the workers; returns when everything has stopped.

    Raises PeerUnavailable when a process dies during the start, KeyboardInterrupt when a signal ended the start or the work, and what
    `work` raises.
    """
    asyncio.run(_run(plan, log_dir, board, work))


async def _run(plan: MeshPlan, log_dir: Path, board: StartBoard, work: Callable[[], Awaitable[None]]) -> None:
    supervisor = Supervisor(plan.specs, stages=STAGES, log_dir=log_dir, report=board.report, stop_timeout_s=plan.stop_timeout_s)
    this_task = asyncio.current_task()
    assert this_task is not None
    is_interrupted = is_stopping = False

    def on_signal() -> None:
        nonlocal is_interrupted
        if is_interrupted:
            supervisor.kill()
            return
        is_interrupted = True
        board.say("stopping; a second signal kills")
        if not is_stopping:
            this_task.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and a shell's background do
            loop.add_signal_handler(number, on_signal)
    try:
        async with supervisor:
            with board.starting(f"starting {len(plan.specs)} processes"):
                # Redis first: the others would only log that they cannot reach it. They all start together, for they find each other.
                await supervisor.start("redis")
                await supervisor.start(*SETTINGS)
                for router in plan.routers:
                    await wait_workers_up(router, plan.worker_ids, board.report)
            supervisor.keep_alive()
            try:
                await work()
            finally:
                is_stopping = True
    except asyncio.CancelledError:
        if not is_interrupted:
            raise
        raise KeyboardInterrupt from None
