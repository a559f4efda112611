"""`baton up`: a mesh on this machine, until Ctrl-C."""

import asyncio
import json
import os
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from services.cli.mesh_plan import MeshOptions, MeshPlan, plan_mesh
from services.cli.mesh_run import run_mesh
from services.cli.ports import ReservedPorts
from services.cli.remote import DEFAULT_ROUTER
from services.cli.start_board import StartBoard
from services.core.errors import InvalidRequest

DEFAULT_PORT = int(DEFAULT_ROUTER.rpartition(":")[2])
DEFAULT_HTTP_PORT = 8000


def up(
    model: Annotated[str, typer.Option(help="Checkpoint directory, or name on the Hugging Face hub; default: the demo model.")] = "demo",
    served_model_name: Annotated[str | None, typer.Option(help="What clients call it; default: the directory's or hub's name.")] = None,
    prefill: Annotated[int, typer.Option(help="Prefill workers; 0: decode workers compute the prompts themselves.")] = 2,
    decode: Annotated[int, typer.Option(help="Decode workers.")] = 2,
    routers: Annotated[int, typer.Option(help="Routers.")] = 1,
    port: Annotated[int, typer.Option(help="Of the first router; the others have the next ones. 0: any.")] = DEFAULT_PORT,
    http_port: Annotated[
        int, typer.Option(help="Of the first router's OpenAI-compatible HTTP; the others have the next ones. 0: any.")
    ] = DEFAULT_HTTP_PORT,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda; auto: cuda where there is one.")] = None,
    batch_invariant: Annotated[
        bool | None, typer.Option("--batch-invariant", help="On cuda: no token depends on what it is batched with; slower.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16: of activations.")] = None,
    kv_dtype: Annotated[
        str | None, typer.Option(help="auto, fp8, int8 or int4: of stored keys and values; auto: as activations, the others are lossy.")
    ] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Longest sequence in tokens; default: the checkpoint's.")] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens per KV block; default: 64, of the demo model 16.")] = None,
    kv_memory: Annotated[int | None, typer.Option(help="MiB of KV blocks per worker; default: 256.")] = None,
    kv_transport: Annotated[str, typer.Option(help="What carries KV blocks: auto, shm, tcp or grpc.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Threads of torch in each worker; default: 1.")] = None,
    redis_url: Annotated[str | None, typer.Option(help="A Redis that runs; default: one is started.")] = None,
    log_dir: Annotated[Path | None, typer.Option(help="Where the processes' logs go; default: a new temporary directory.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", "-e", metavar="[ROLE.]NAME=VALUE", help="A further setting of all processes that know it, or of a role."),
    ] = None,
) -> None:
    """Starts a mesh on this machine and keeps it up until Ctrl-C."""
    options = MeshOptions(
        model=model,
        served_model_name=served_model_name,
        prefill=prefill,
        decode=decode,
        routers=routers,
        port=port,
        http_port=http_port,
        device=device,
        batch_invariant=batch_invariant,
        dtype=dtype,
        kv_dtype=kv_dtype,
        max_model_len=max_model_len,
        block_size=block_size,
        kv_memory_mib=kv_memory,
        kv_transport=kv_transport,
        threads=threads,
        redis_url=redis_url,
        settings=tuple(settings or ()),
    )
    console = Console(highlight=False)
    with ReservedPorts() as ports:
        plan = plan_mesh(options, ports, os.environ)
        logs = make_log_dir(log_dir)
        serves = False

        async def serve() -> None:
            nonlocal serves
            serves = True
            _print_usage(console, plan, logs)
            await asyncio.Event().wait()

        try:
            run_mesh(plan, log_dir=logs, board=StartBoard([spec.name for spec in plan.specs], console), work=serve)
        except KeyboardInterrupt:
            if not serves:
                raise
    console.print("everything has stopped")


def curl_line(http: str, request: Mapping[str, object]) -> str:
    """A completion, asked for with curl."""
    data = shlex.quote(json.dumps(request))
    return f"curl http://{http}/v1/completions -H 'Content-Type: application/json' -d {data}"


def make_log_dir(wanted: Path | None) -> Path:
    """The directory, made if it is not there; a new temporary one for None. Processes append to logs that are there already.

    Raises InvalidRequest when it cannot be made.
    """
    if wanted is None:
        return Path(tempfile.mkdtemp(prefix="baton-"))
    try:
        wanted.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequest("--log-dir", f"{wanted}: {error.strerror}") from error
    return wanted.resolve()


def _print_usage(console: Console, plan: MeshPlan, logs: Path) -> None:
    router = "" if plan.routers[0] == DEFAULT_ROUTER else f" --router {plan.routers[0]}"
    lines = [
        "",
        f"{plan.model_name} is served at {', '.join(plan.routers)} (gRPC, baton.v1.InferenceService)",
        f"and at {', '.join(f'http://{address}/v1' for address in plan.http)} (OpenAI's API)",
        f'  baton generate{router} "def read_json("',
        f"  baton top{router}",
        f"  {curl_line(plan.http[0], {'prompt': 'def read_json(', 'max_tokens': 32})}",
        f"logs: {logs}",
        "Ctrl-C drains and stops it",
        "",
    ]
    console.print("\n".join(lines), markup=False, soft_wrap=True)
