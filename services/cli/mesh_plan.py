"""From the options of `baton up` to the processes of a mesh: which, with what settings, at which ports. Starts nothing.

The settings that a process would refuse are refused here, all at once, before anything runs.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import services
from services.cli.ports import HOST, ReservedPorts
from services.cli.readiness import grpc_probe, redis_probe
from services.cli.supervisor import ProcessSpec
from services.core.errors import ConfigurationError, InvalidRequest
from services.engine.demo import TARGET_DIR
from services.engine.model_config import load_model_config
from services.kv_index.settings import KVIndexSettings
from services.mesh.config import PREFIX, load_settings
from services.mesh.redis_server import server_command
from services.mesh.server import ProcessSettings
from services.router.settings import RouterSettings
from services.tokenizer.checkpoint_dir import DEMO, resolve_checkpoint
from services.worker.settings import TRANSPORTS, WorkerSettings

# In the order in which they are stopped: first those who take requests, last those whom the others lean on.
STAGES = (("router",), ("decode", "prefill"), ("kv_index",), ("redis",))
SETTINGS: Mapping[str, type[ProcessSettings]] = {
    "router": RouterSettings,
    "decode": WorkerSettings,
    "prefill": WorkerSettings,
    "kv_index": KVIndexSettings,
}
# These make one mesh of the processes; who wants others starts them by themselves.
OWN_SETTINGS = {"listen", "http_listen", "worker_id", "router_id", "redis_url", "kv_index", "workers"}
MAX_PROCESSES = 64  # of each role: a slip of the finger should not cost the machine


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshOptions:
    """What the command line says of a mesh; None where the processes' own defaults hold.

    model           checkpoint directory, hub name or "demo"
    prefill         0: decode workers compute the prompts themselves
    port            of the first router, the others have the next ones; 0: any
    http_port       the same for HTTP
    kv_transport    auto: the best that both ends have
    redis_url       None: one is started
    settings        further ones: "name=value", or "role.name=value"
    """

    model: str = DEMO
    served_model_name: str | None = None
    prefill: int = 2
    decode: int = 2
    routers: int = 1
    port: int = 0
    http_port: int = 0
    device: str | None = None
    batch_invariant: bool | None = None
    dtype: str | None = None
    kv_dtype: str | None = None
    max_model_len: int | None = None
    block_size: int | None = None
    kv_memory_mib: int | None = None
    kv_transport: str = "auto"
    threads: int | None = None
    redis_url: str | None = None
    settings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshPlan:
    """`routers` are addresses, `http` those of their HTTP; `stop_timeout_s` is what a role may take to drain."""

    model_name: str
    specs: Sequence[ProcessSpec]
    routers: Sequence[str]
    http: Sequence[str]
    worker_ids: Sequence[str]
    stop_timeout_s: float


def plan_mesh(options: MeshOptions, ports: ReservedPorts, environ: Mapping[str, str]) -> MeshPlan:
    """The processes, none of them started. A model on the hub is downloaded now, once for all of them.

    Raises InvalidRequest and ConfigurationError for options and settings, CheckpointError for the model.
    """
    for name, low in (("prefill", 0), ("decode", 1), ("routers", 1)):
        if not low <= getattr(options, name) <= MAX_PROCESSES:
            raise InvalidRequest(f"--{name}", f"{getattr(options, name)} is outside [{low}, {MAX_PROCESSES}]", limit=MAX_PROCESSES)
    if options.kv_transport not in ("auto", *TRANSPORTS):
        raise InvalidRequest("--kv-transport", f"{options.kv_transport!r} is not one of auto, {', '.join(TRANSPORTS)}")
    directory = resolve_checkpoint(options.model, demo=TARGET_DIR)
    load_model_config(directory)
    model = _model_settings(options, directory)
    extra = _extra_settings(options.settings)

    specs = []
    redis_url = options.redis_url
    if redis_url is None:
        port = ports.take()
        redis_url = f"redis://{HOST}:{port}/0"
        specs.append(_redis(port, environ))
    index_port = ports.take()
    shared = {"redis_url": redis_url}
    mesh = {**shared, **model, "kv_index": f"{HOST}:{index_port}"}
    worker = {**mesh, **_worker_settings(options)}
    processes: list[tuple[str, str, int, Mapping[str, str]]] = [("kv_index", "kv_index", index_port, shared)]
    for role, count in (("prefill", options.prefill), ("decode", options.decode)):
        for number in range(count):
            processes.append((role, f"{role}-{number}", ports.take(), {**worker, "worker_id": f"{role}-{number}"}))
    router_ports = [ports.take(options.port and options.port + number) for number in range(options.routers)]
    http = [
        f"{HOST}:{ports.take(options.http_port and options.http_port + number, option='--http-port')}" for number in range(options.routers)
    ]
    for number, port in enumerate(router_ports):
        processes.append(("router", f"router-{number}", port, {**mesh, "router_id": f"router-{number}", "http_listen": http[number]}))

    problems: dict[str, None] = {}
    drain_timeouts_s = []
    for role, name, port, own in processes:
        variables = {f"{PREFIX}{key.upper()}": text for key, text in {"listen": f"{HOST}:{port}", **own, **extra[role]}.items()}
        try:
            drain_timeouts_s.append(load_settings(SETTINGS[role], variables).drain_timeout_s)
        except ConfigurationError as error:
            problems |= dict.fromkeys(f"{role}: {problem}" for problem in error.problems)
        command = (sys.executable, "-P", "-m", f"services.{role}")
        specs.append(
            ProcessSpec(
                name=name,
                role=role,
                command=command,
                environment={**_inherited(environ), **variables},
                is_serving=grpc_probe(f"{HOST}:{port}"),
            )
        )
    if problems:
        raise ConfigurationError(list(problems))
    return MeshPlan(
        model_name=model["served_model_name"],
        specs=specs,
        routers=[f"{HOST}:{port}" for port in router_ports],
        http=http,
        worker_ids=[name for role, name, _, _ in processes if role in ("prefill", "decode")],
        stop_timeout_s=max(drain_timeouts_s) + 5.0,
    )


def _model_settings(options: MeshOptions, directory: Path) -> dict[str, str]:
    # The word "demo" is passed on as it is: with it come the block sizes of a small model.
    is_named = options.model == DEMO or not Path(options.model).expanduser().is_dir()
    return {
        "model": options.model if options.model == DEMO else str(directory.resolve()),
        "served_model_name": options.served_model_name or (options.model if is_named else directory.resolve().name),
    }


def _worker_settings(options: MeshOptions) -> dict[str, str]:
    values = {
        "device": options.device,
        "batch_invariant": options.batch_invariant,
        "dtype": options.dtype,
        "kv_dtype": options.kv_dtype,
        "max_model_len": options.max_model_len,
        "block_size": options.block_size,
        "kv_memory_bytes": None if options.kv_memory_mib is None else options.kv_memory_mib << 20,
        "kv_transports": None if options.kv_transport == "auto" else options.kv_transport,
        "num_threads": options.threads,
    }
    return {name: str(value) for name, value in values.items() if value is not None}


def _extra_settings(settings: Sequence[str]) -> dict[str, dict[str, str]]:
    """By role. A setting without one goes to all roles that know it. Raises ConfigurationError with all that are wrong."""
    extra: dict[str, dict[str, str]] = {role: {} for role in SETTINGS}
    problems = []
    for setting in settings:
        path, has_value, value = setting.partition("=")
        role, has_role, name = path.rpartition(".")
        name = name.strip().lower()
        roles = [known for known, kind in SETTINGS.items() if (not has_role or role == known) and name in kind.__dataclass_fields__]
        if not has_value:
            problems.append(f"--set {setting}: is not name=value or role.name=value")
        elif has_role and role not in SETTINGS:
            problems.append(f"--set {setting}: {role!r} is not one of {', '.join(SETTINGS)}")
        elif name in OWN_SETTINGS:
            problems.append(f"--set {setting}: {name} is set by `baton up` itself")
        elif name == "namespace" and has_role:
            problems.append(f"--set {setting}: all of a mesh have one namespace")
        elif not roles:
            problems.append(f"--set {setting}: no such setting of {role or 'any process'}")
        for known in roles:
            extra[known][name] = value
    if problems:
        raise ConfigurationError(problems)
    return extra


def _redis(port: int, environ: Mapping[str, str]) -> ProcessSpec:
    return ProcessSpec(
        name="redis",
        role="redis",
        command=server_command(port),
        environment=_inherited(environ),
        is_serving=redis_probe(HOST, port),
    )


def _inherited(environ: Mapping[str, str]) -> dict[str, str]:
    """Everything but our own variables, which are meant for the process that got them; and where our code is."""
    variables = {name: value for name, value in environ.items() if not name.startswith(PREFIX)}
    root = str(Path(services.__path__[0]).parent)
    return {**variables, "PYTHONPATH": ":".join(filter(None, (root, variables.get("PYTHONPATH"))))}
