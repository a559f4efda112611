"""Small real processes for the supervisor to run: they serve when a file says so, and write down how they end."""

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from services.cli.supervisor import ProcessSpec

# argv: folder, name, what to do. "serving-NAME" in the folder says that it serves; SIGTERM is written into "ended".
_PROGRAM = """
import os, pathlib, signal, sys, time
folder, name, behaviour = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
print("started", name, flush=True)
if behaviour == "crash" or (folder / f"crash-{name}").exists():
    print("cannot go on", file=sys.stderr, flush=True)
    sys.exit(3)
def end(*_):
    if behaviour == "deaf":
        return
    if behaviour == "slow":
        time.sleep(1.3)
    with (folder / "ended").open("a") as file:
        file.write(name + "\\n")
    os._exit(0)
signal.signal(signal.SIGTERM, end)
(folder / f"new-{name}").write_text(str(os.getpid()))
(folder / f"new-{name}").rename(folder / f"pid-{name}")
if behaviour != "never":
    (folder / f"serving-{name}").touch()
while True:
    signal.pause()
"""


def command(folder: Path, name: str, behaviour: str = "") -> tuple[str, ...]:
    return (sys.executable, "-I", "-S", "-c", _PROGRAM, str(folder), name, behaviour)


def spec(folder: Path, name: str, role: str, behaviour: str = "") -> ProcessSpec:
    return ProcessSpec(
        name=name,
        role=role,
        command=command(folder, name, behaviour),
        environment={"PATH": os.environ["PATH"]},
        is_serving=file_probe(folder / f"serving-{name}"),
    )


def file_probe(path: Path) -> Callable[[], Awaitable[bool]]:
    async def is_serving() -> bool:
        return await asyncio.to_thread(path.exists)

    return is_serving


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
