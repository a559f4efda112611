"""Named points at the steps of the protocol, where a test makes a process die, stand still, err or send damaged KV blocks.

Only a process that was started with BATON_FAILPOINTS, a folder of its own, has them; in all others a point is one look at a name that is
None. A file in the folder arms the point of its name, before the start or at any time after:

    prefill.mid_prefill     pause@3 request-7         at the third time that request-7 comes by

    kill, stop, term        SIGKILL, SIGSTOP, SIGTERM to this process
    sleep:SECONDS           goes on after that time
    pause                   goes on when `<point>.paused`, which the file becomes, is taken away
    error                   raises PeerUnavailable
    corrupt, drop           of the next KV block one byte, or all of them (only these, and only at the points of blocks)

A point strikes once: it takes its file away as it does, and so tells whoever waits for it. Knows nothing of what happens at its points.
"""

import asyncio
import os
import re
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from services.core.errors import ConfigurationError, PeerUnavailable

BLOCK_POINTS = ("kv.shm_block", "kv.tcp_block", "kv.grpc_block")  # of each block's bytes, after its checksum was taken
STEP_POINTS = (
    *("router.before_start", "router.started", "router.first_token", "router.mid_decode", "router.at_end"),
    *("decode.started", "decode.reserved", "decode.prefill_called", "decode.landed", "decode.mid_decode", "decode.at_end"),
    *("prefill.accepted", "prefill.mid_prefill", "prefill.mid_transfer", "prefill.before_done"),
    *("kv.inside_block", "kv_index.publish"),
)
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}
_BLOCK_ACTIONS, _STEP_ACTIONS = ("corrupt", "drop"), (*_SIGNALS, "sleep", "pause", "error")
_ARMING = re.compile(r"(?P<action>[a-z]+)(:(?P<seconds>\d+(\.\d+)?))?(@(?P<nth>[1-9]\d*))?( (?P<request_id>\S+))?\n?")
_POLL_S = 0.005

# The one global of the mesh that changes, once and at the start: points are where nothing could be passed in for their sake alone.
_folder: Path | None = None
_lock = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class Arming:
    """What a point's file says. `nth` counts from 1; `request_id` None: whichever comes by."""

    action: str
    seconds: float = 0.0
    nth: int = 1
    request_id: str | None = None

    @classmethod
    def parse(cls, point: str, text: str) -> Self:
        """Raises ConfigurationError for an unknown point, and for text that does not arm it."""
        if point not in STEP_POINTS + BLOCK_POINTS:
            raise ConfigurationError([f"failpoints: no point {point!r}; there are {', '.join(sorted(STEP_POINTS + BLOCK_POINTS))}"])
        actions = _BLOCK_ACTIONS if point in BLOCK_POINTS else _STEP_ACTIONS
        match = _ARMING.fullmatch(text)
        if match is None or match["action"] not in actions or (match["action"] == "sleep") != (match["seconds"] is not None):
            words = ", ".join("sleep:SECONDS" if action == "sleep" else action for action in actions)
            raise ConfigurationError([f"failpoints: {point}: {text!r} is not ACTION[@NTH][ REQUEST_ID] with one of {words}"])
        return cls(action=match["action"], seconds=float(match["seconds"] or 0), nth=int(match["nth"] or 1), request_id=match["request_id"])

    def __str__(self) -> str:
        seconds = f":{self.seconds:g}" if self.action == "sleep" else ""
        return f"{self.action}{seconds}@{self.nth}" + (f" {self.request_id}" if self.request_id else "")


def enable(folder: Path | None) -> None:
    """Has the files in `folder` arm points from now on; None: no point does anything. Raises ConfigurationError for what it has by now."""
    global _folder
    problems: list[str] = []
    for file in sorted(folder.iterdir()) if folder is not None and folder.is_dir() else ():
        try:
            Arming.parse(file.name, file.read_text())
        except ConfigurationError as error:
            problems += error.problems
    if folder is not None and not folder.is_dir():
        problems.append(f"failpoints: {folder} is no folder")
    if problems:
        raise ConfigurationError(problems)
    _folder = folder


def hit(point: str, request_id: str = "") -> None:
    """A step where the thread may stand still. Raises PeerUnavailable when armed with `error`."""
    if _folder is None:
        return
    struck = _strike(_folder / point, request_id)
    if struck is not None:
        time.sleep(struck.seconds)
        while struck.action == "pause" and (_folder / f"{point}.paused").exists():
            time.sleep(_POLL_S)


async def reach(point: str, request_id: str = "") -> None:
    """The same for a step of one task, beside which the event loop goes on."""
    if _folder is None:
        return
    struck = _strike(_folder / point, request_id)
    if struck is not None:
        await asyncio.sleep(struck.seconds)
        while struck.action == "pause" and (_folder / f"{point}.paused").exists():  # noqa: ASYNC110 - a file wakes nobody
            await asyncio.sleep(_POLL_S)


def on_wire(point: str, block: memoryview) -> memoryview:
    """The bytes to send for a KV block: its own, as a rule; damaged ones or none at all when the point strikes."""
    if _folder is None:
        return block
    struck = _strike(_folder / point, "")
    if struck is None:
        return block
    damaged = bytearray(block if struck.action == "corrupt" else b"")
    if damaged:
        damaged[len(damaged) // 2] ^= 1
    return memoryview(damaged)


def _strike(file: Path, request_id: str) -> Arming | None:
    """What is to be done now, when this is the time; a signal has been sent by then."""
    with _lock:  # threads come by one point together, and only one of them is the nth
        try:
            arming = Arming.parse(file.name, file.read_text())
            if arming.request_id not in (None, request_id):
                return None
            if arming.nth > 1:
                later = Arming(action=arming.action, seconds=arming.seconds, nth=arming.nth - 1, request_id=arming.request_id)
                with file.open("r+") as left:  # made anew, it would arm the point again
                    left.write(str(later))
                    left.truncate()
                return None
            if arming.action == "pause":
                file.rename(file.with_name(f"{file.name}.paused"))
            else:
                file.unlink()
        except FileNotFoundError:
            return None  # not armed, or no longer
    if arming.action in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[arming.action])
    if arming.action == "error":
        raise PeerUnavailable(f"{file.name}: as armed")
    return arming
