"""The router's end of a Session with one decode worker: requests go up as commands, their tokens come down in frames.

Reconnects for as long as it runs. When a session breaks, every request in it hears why; what a request does then is its own matter.
Knows nothing of text or of choosing.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import grpc

from protos.baton.v1 import common_pb2, decode_pb2, decode_pb2_grpc
from services.core.errors import BatonError, PeerUnavailable, SlowReader
from services.core.types import MAX_CHOICES, FinishReason, TokenLogprobs
from services.mesh import convert, status
from services.mesh.client import open_channel
from services.mesh.streams import SILENCE_S, Listening

RECONNECT_S = 0.2
# Arrivals that wait for a client which does not read; each has a token or more.
MAX_UNREAD_ARRIVALS = 1 << 14
# Of the first choice of a request; after it a session has none for another.
LAST_HANDLE = convert.MAX_U32 - MAX_CHOICES

_log = logging.getLogger(__name__)
_Call = grpc.aio.StreamStreamCall[decode_pb2.SessionCommand, decode_pb2.StepFrame]
_make_tuple = tuple.__new__  # of a NamedTuple, without the function that it would call for that


class Arrival(NamedTuple):  # one for each token of each request: a dataclass takes three times as long to make
    """What one frame brought for one choice: `logprobs` has an entry for each token, or none at all."""

    choice: int
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs]
    finish_reason: FinishReason | None


class RequestStream:
    """What comes down for one attempt of a request; read by one task.

    next_positions   of each choice: where its next token belongs in its sequence, prompt included
    on_slow_reader   called once when too much waits to be read, and is dropped
    """

    def __init__(self, next_positions: Sequence[int], *, on_slow_reader: Callable[[], object]) -> None:
        self.prefilled: decode_pb2.Prefilled | None = None
        self.prompt_logprobs: Sequence[TokenLogprobs] | None = None
        self.started: list[range] = []  # handles of each Start that brings something here; the session's to fill
        self._next_position = list(next_positions)
        self._arrivals: list[Arrival] = []
        self._error: BatonError | None = None
        self._on_slow_reader = on_slow_reader
        self._loop = asyncio.get_running_loop()
        self._reader: asyncio.Future[None] | None = None  # waits; an Event would do the same at twice the price

    async def next_arrivals(self) -> list[Arrival]:
        """All that has come since the last call, at least one; waits for it. Raises the error with which the attempt ended."""
        while not self._arrivals:
            if self._error is not None:
                raise self._error
            self._reader = self._loop.create_future()
            await self._reader
        arrivals, self._arrivals = self._arrivals, []
        return arrivals

    def push(
        self,
        choice: int,
        first_position: int,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs] = (),
        finish_reason: FinishReason | None = None,
    ) -> None:
        """Takes the next tokens of a choice. A gap would be a wrong answer, so it ends the attempt; so does a client that does not read."""
        if first_position != self._next_position[choice] or len(self._arrivals) >= MAX_UNREAD_ARRIVALS:
            self._refuse(choice, first_position)
            return
        self._next_position[choice] += len(token_ids)
        self._arrivals.append(Arrival(choice, token_ids, logprobs, finish_reason))
        self._wake()

    def push_token(self, choice: int, position: int, token_id: int) -> None:
        """push() of one token and nothing else, in half the time: what nearly all tokens are."""
        next_position = self._next_position
        if position != next_position[choice] or len(self._arrivals) >= MAX_UNREAD_ARRIVALS:
            self._refuse(choice, position)
            return
        next_position[choice] = position + 1
        self._arrivals.append(_make_tuple(Arrival, (choice, (token_id,), (), None)))
        reader = self._reader
        if reader is not None:
            self._reader = None
            if not reader.done():
                reader.set_result(None)

    def end(self, choice: int, finish_reason: FinishReason) -> None:
        """A choice has ended without another token."""
        self._arrivals.append(Arrival(choice, (), (), finish_reason))
        self._wake()

    def fail(self, error: BatonError) -> None:
        """Ends the attempt; what has arrived before can still be read."""
        if self._error is None:
            self._error = error
            self._wake()

    def _refuse(self, choice: int, position: int) -> None:
        """Ends the attempt, and says why."""
        if self._error is not None:
            return
        if len(self._arrivals) >= MAX_UNREAD_ARRIVALS:
            self.fail(SlowReader(f"{len(self._arrivals)} pieces were not read; at most {MAX_UNREAD_ARRIVALS} are kept"))
            self._arrivals.clear()  # without an end they are of no use, and nobody knows when they would be read
            self._on_slow_reader()
        else:
            self.fail(PeerUnavailable(f"choice {choice} goes on at position {position}, not {self._next_position[choice]}"))

    def _wake(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None and not reader.done():  # done: it was cancelled
            reader.set_result(None)


class _Place(NamedTuple):
    """Whose tokens a handle's are, and which handles were started with it."""

    stream: RequestStream
    choice: int
    handles: range


class DecodeSession:
    """One worker at `address`. run() keeps the session; `is_up` says whether there is one."""

    def __init__(
        self,
        address: str,
        *,
        router_id: str,
        on_welcome: Callable[[decode_pb2.SessionWelcome], None],
        on_load: Callable[[common_pb2.WorkerLoad], None],
        on_lost: Callable[[], None],
    ) -> None:
        self._address = address
        self._peer = address  # what messages call it: by its name, once it has told that
        self._router_id = router_id
        self._on_welcome = on_welcome
        self._on_load = on_load
        self._on_lost = on_lost
        self._places: dict[int, _Place] = {}  # by handle
        self._commands: asyncio.Queue[decode_pb2.SessionCommand] = asyncio.Queue()
        self._listening = Listening()
        self._next_handle = 0
        self._idle = asyncio.Event()  # set while no request is in it
        self._idle.set()
        self.is_up = False

    async def run(self) -> None:
        """Connects, and connects again, until cancelled."""
        async with open_channel(self._address) as channel:
            stub = decode_pb2_grpc.DecodeServiceStub(channel)
            said = ""
            while True:
                was_up = False
                try:
                    await self._hold(stub)
                    error: BatonError = PeerUnavailable(f"{self._peer} ended the session")
                except grpc.aio.AioRpcError as rpc_error:
                    error = status.from_rpc_error(rpc_error, self._peer)
                except BatonError as failure:
                    error = failure
                except Exception:
                    # Whatever a worker sends, it costs its own session and not the router.
                    _log.exception("the session with %s failed", self._peer)
                    error = PeerUnavailable(f"the session with {self._peer} failed")
                finally:
                    was_up = self.is_up
                    self._lose(PeerUnavailable(f"the session with {self._peer} has ended"))
                if was_up or error.message != said:  # not once more for each try
                    _log.warning("no session with %s: %s", self._peer, error.message)
                    said = error.message
                await asyncio.sleep(RECONNECT_S)

    def start(self, start: decode_pb2.Start, stream: RequestStream, choices: Sequence[int]) -> None:
        """Sends a request, or a part of one, and has its tokens brought to `stream`: its i-th choice is choices[i] there.

        Sets start.handle. Raises PeerUnavailable while there is no session.
        """
        if not self.is_up:
            raise PeerUnavailable(f"there is no session with {self._peer}")
        if self._next_handle > LAST_HANDLE:
            raise PeerUnavailable(f"the session with {self._peer} has used up its handles: it is made again when its requests have ended")
        handles = range(self._next_handle, self._next_handle + len(choices))
        self._next_handle = handles.stop
        start.handle = handles.start
        for handle, choice in zip(handles, choices, strict=True):
            self._places[handle] = _Place(stream, choice, handles)
        stream.started.append(handles)
        self._idle.clear()
        self._commands.put_nowait(decode_pb2.SessionCommand(start=start))

    async def wait_idle(self) -> None:
        """Until no request is in this session."""
        await self._idle.wait()

    def cancel(self, stream: RequestStream) -> None:
        """Ends what was started for a stream, wherever it is; does nothing for what has ended, or whose session has."""
        for handles in stream.started:
            if self._remove(stream, handles) and self.is_up:
                self._commands.put_nowait(decode_pb2.SessionCommand(cancel=decode_pb2.Cancel(handle=handles.start)))
        self._note_idle()

    async def _hold(self, stub: decode_pb2_grpc.DecodeServiceStub) -> None:
        """One session from hello to its end."""
        self._commands = asyncio.Queue()
        self._next_handle = 0
        self._listening = Listening()
        call = stub.Session()
        try:
            await call.write(decode_pb2.SessionCommand(hello=decode_pb2.SessionHello(router_id=self._router_id)))
            # Not a task group: in Python 3.11 one whose task fails while its body ends leaves this task cancelled for good.
            tasks = [asyncio.ensure_future(part) for part in (self._read(call), self._watch_silence(), self._write(call))]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
                results = await asyncio.gather(*tasks, return_exceptions=True)
            # A broken stream fails reader and writer alike; the reader knows why.
            for result in results:
                if isinstance(result, Exception):
                    raise result
        finally:
            call.cancel()

    async def _read(self, call: "_Call") -> None:
        async for frame in call:
            self._listening.heard()
            self._take(frame)

    async def _watch_silence(self) -> None:
        # Beside the reader, not around each of its frames: a hundred of them come in a second, from every worker.
        await self._listening.wait_silence(on_tick=self._tick)
        raise PeerUnavailable(f"{self._peer} has said nothing for {SILENCE_S} s")

    def _tick(self) -> None:
        if self._next_handle > LAST_HANDLE and not self._places:
            raise PeerUnavailable(f"the session with {self._peer} has used up its handles")
        if self._commands.empty():  # else something is said anyway, or nothing is taken any more
            self._commands.put_nowait(decode_pb2.SessionCommand(heartbeat=decode_pb2.Heartbeat()))

    async def _write(self, call: "_Call") -> None:
        while True:
            command = await self._commands.get()
            try:
                await call.write(command)
            except asyncio.InvalidStateError:
                raise PeerUnavailable(f"{self._peer} ended the session") from None

    def _take(self, frame: decode_pb2.StepFrame) -> None:
        if frame.HasField("hello") == self.is_up:
            raise PeerUnavailable(f"{self._peer} said hello {'twice' if self.is_up else 'too late'}")
        if frame.HasField("hello"):
            self._on_welcome(frame.hello)
            self._peer = frame.hello.worker.worker_id
            self.is_up = True
        if frame.HasField("load"):
            self._on_load(frame.load)
        for prefilled in frame.prefilled:
            if place := self._places.get(prefilled.handle):
                place.stream.prefilled = prefilled
        for scored in frame.prompt_logprobs:
            if place := self._places.get(scored.handle):
                place.stream.prompt_logprobs = convert.prompt_logprobs_from_proto(scored)
        endings = {ending.handle: ending for ending in frame.endings}
        if frame.handles:
            if not len(frame.handles) == len(frame.positions) == len(frame.token_ids) or len(frame.handles) % 4:
                raise PeerUnavailable(f"{self._peer} sent a frame whose columns are not whole or differ in length")
            handles, positions = convert.unpack_u32(frame.handles), convert.unpack_u32(frame.positions)
            token_ids = convert.unpack_u32(frame.token_ids)
            if endings or frame.logprobs or len(set(handles)) < len(handles):
                logprobs = {entry.entry: convert.logprobs_from_proto(entry.logprobs) for entry in frame.logprobs}
                self._take_runs(handles, positions, token_ids, logprobs, endings)
            else:
                self._take_step(handles, positions, token_ids)
        for handle, ending in endings.items():
            self._take_ending(handle, ending)
        if frame.endings:
            self._note_idle()

    def _take_step(self, handles: Sequence[int], positions: Sequence[int], token_ids: Sequence[int]) -> None:
        """One token for each of many choices and nothing else: what nearly all frames are."""
        places = self._places
        for handle, position, token_id in zip(handles, positions, token_ids, strict=True):
            place = places.get(handle)
            if place is not None:  # else cancelled, or of an attempt that is over
                place[0].push_token(place[1], position, token_id)

    def _take_runs(
        self,
        handles: Sequence[int],
        positions: Sequence[int],
        token_ids: Sequence[int],
        logprobs: Mapping[int, TokenLogprobs],
        endings: dict[int, decode_pb2.Ending],
    ) -> None:
        """A choice's tokens come as one arrival, also when a late frame holds several steps. Takes out of `endings` what it has told."""
        entries: dict[int, list[int]] = {}
        for index, handle in enumerate(handles):
            entries.setdefault(handle, []).append(index)
        for handle, indices in entries.items():
            place = self._places.get(handle)
            if place is None:
                continue
            stream = place.stream
            first = positions[indices[0]]
            if [positions[index] for index in indices] != list(range(first, first + len(indices))):
                stream.fail(PeerUnavailable(f"{self._peer} sent positions with a gap"))
                continue
            reason = None
            ending = endings.get(handle)
            if ending is not None and not ending.HasField("error"):
                del endings[handle]
                del self._places[handle]
                reason = convert.finish_reason_from_proto(ending.finish_reason) or FinishReason.ABORT
            stream.push(
                place.choice,
                first,
                [token_ids[index] for index in indices],
                [logprobs[index] for index in indices if index in logprobs],
                reason,
            )

    def _take_ending(self, handle: int, ending: decode_pb2.Ending) -> None:
        place = self._places.get(handle)
        if place is None:
            return
        if not ending.HasField("error"):
            del self._places[handle]
            place.stream.end(place.choice, convert.finish_reason_from_proto(ending.finish_reason) or FinishReason.ABORT)
            return
        self._remove(place.stream, place.handles)
        place.stream.fail(status.from_proto(ending.error))

    def _remove(self, stream: RequestStream, handles: range) -> bool:
        """Forgets what of these is a stream's; says whether anything was. In a later session they may be another's."""
        own = [handle for handle in handles if (place := self._places.get(handle)) is not None and place.stream is stream]
        for handle in own:
            del self._places[handle]
        return bool(own)

    def _note_idle(self) -> None:
        if not self._places:
            self._idle.set()

    def _lose(self, error: BatonError) -> None:
        if self.is_up:
            self.is_up = False
            self._on_lost()
        streams = {id(place.stream): place.stream for place in self._places.values()}
        self._places.clear()
        self._note_idle()
        for stream in streams.values():
            stream.fail(error)
