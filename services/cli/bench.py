"""`baton bench`: measures a part of the mesh by itself. `profile` writes down how fast one worker is, for `loadtest sim`."""

import os
import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from services.cli.mesh_plan import MeshOptions, plan_mesh
from services.cli.mesh_run import run_mesh
from services.cli.ports import ReservedPorts
from services.cli.start_board import StartBoard
from services.cli.up import make_log_dir
from services.core.errors import BatonError, InvalidRequest, PeerUnavailable
from services.engine.demo import TARGET_DIR
from services.tokenizer.checkpoint_dir import resolve_checkpoint
from services.worker.settings import WorkerSettings

if TYPE_CHECKING:
    from services.cli.worker_profile import WorkerProfile

bench = typer.Typer(name="bench", no_args_is_help=True, help="Measures a part of the mesh by itself.")


@bench.callback()
def _bench() -> None:
    """Measures a part of the mesh by itself."""


@bench.command()
def profile(
    output: Annotated[Path, typer.Option("-o", "--output", help="The JSON file to write.")],
    model: Annotated[str, typer.Option(help="Checkpoint directory, or name on the Hugging Face hub; default: the demo model.")] = "demo",
    block_size: Annotated[int | None, typer.Option(help="Tokens per KV block; default: 64, of the demo model 16.")] = None,
    kv_memory: Annotated[int, typer.Option(min=1, help="MiB of KV blocks.")] = 256,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, max=20, help="How often everything is measured.")] = 3,
) -> None:
    """Measures how long a worker's steps take, and writes what `loadtest sim --worker-model` reads."""
    if not output.parent.is_dir():
        raise InvalidRequest("--output", f"{output.parent} is no directory")  # not only after minutes of measuring
    # Imported only now: torch takes seconds, which `baton --help` and a mistyped option should not.
    from services.cli.worker_profile import profile_worker
    from services.engine.loader import load_model

    directory = resolve_checkpoint(model, demo=TARGET_DIR)
    settings = WorkerSettings(model=model, block_size=block_size, kv_memory_bytes=kv_memory << 20, num_threads=threads)
    found = profile_worker(
        load_model(directory, settings.engine_settings()).core, rounds=rounds, hardware=_hardware(threads), model=directory.resolve().name
    )
    options = MeshOptions(
        model=model,
        prefill=1,
        decode=1,
        block_size=block_size,
        kv_memory_mib=kv_memory,
        threads=threads,
        # Every prompt goes to the prefill worker: decode's steps are its own then.
        settings=("router.max_local_tokens=0",),
    )
    found = _in_processes(found, options, rounds)
    try:
        output.write_text(found.to_json() + "\n", encoding="utf-8")
    except OSError as error:
        raise InvalidRequest("--output", f"{output}: {error.strerror}") from error
    typer.echo(f"{output}: blocks of {found.block_size} tokens, {found.num_blocks} of them, chunks of {found.chunk_tokens} tokens")
    typer.echo(
        f"calls add {1e3 * found.overhead_s:.1f} ms to a first token, and {1e3 * found.remote_overhead_s:.1f} ms when prefill computes it"
    )
    for name, fit, per in (
        ("prefill", found.prefill, ("step", "token", "pair of tokens")),
        ("  its engine alone", found.engine_prefill, ("step", "token", "pair of tokens")),
        ("decode", found.decode, ("step", "sequence", "KV block read")),
        ("  its engine alone", found.engine_decode, ("step", "sequence", "KV block read")),
    ):
        assert fit is not None
        terms = ", ".join(f"{1e3 * seconds:.3g} ms a {what}" for seconds, what in zip(fit.seconds, per, strict=True))
        typer.echo(
            f"{name}: {terms}; {fit.num_kinds} kinds of steps, off by {fit.median_error:.1%} in the median, {fit.p90_error:.1%} at P90"
        )


def _in_processes(found: "WorkerProfile", options: MeshOptions, rounds: int) -> "WorkerProfile":
    """Measures the workers once more, in a mesh that is started for it."""
    from services.cli.mesh_profile import MeshProfile, profile_mesh

    console = Console(stderr=True, highlight=False)
    measured: list[MeshProfile] = []
    with ReservedPorts() as ports:
        plan = plan_mesh(options, ports, os.environ)
        logs = make_log_dir(None)

        async def work() -> None:
            console.print("measuring")
            measured.append(
                await profile_mesh(
                    plan.routers[0],
                    rounds=rounds,
                    chunk_tokens=found.chunk_tokens,
                    block_size=found.block_size,
                    vocab_size=found.vocab_size,
                    max_model_len=found.max_model_len,
                )
            )

        try:
            run_mesh(plan, log_dir=logs, board=StartBoard([spec.name for spec in plan.specs], console), work=work)
        except BatonError as error:
            raise PeerUnavailable(f"{error.message}\nlogs: {logs}") from error
    shutil.rmtree(logs)
    of = measured[0]
    return found.in_processes(prefill=of.prefill, decode=of.decode, overheads_s=of.overheads_s, remote_overheads_s=of.remote_overheads_s)


def _hardware(threads: int) -> str:
    return f"{platform.processor() or platform.machine()}, {threads} thread{'s' if threads > 1 else ''} of torch"
