"""Peers inside the mesh that are broken or hostile, against real workers: each is refused or ends only what is its own."""

import asyncio
import contextlib
import math
import os
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from protos.baton.v1 import common_pb2, decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc
from services.core import errors
from services.core.types import SamplingParams
from services.decode import remote_prefill
from services.mesh import convert, status
from services.mesh.client import open_channel
from services.mesh.kv_wire import block_checksum
from services.mesh.server import MeshServer
from tests.mesh import Mesh, free_port

PROMPT = list(range(300, 340))  # two blocks and a half
SAMPLING = convert.sampling_to_proto(SamplingParams(temperature=0.0, seed=1, max_tokens=6, ignore_eos=True))
GOOD = SamplingParams(temperature=1.0, seed=5, n=2, max_tokens=12, ignore_eos=True)
NAN, MOST = math.nan, 2**32 - 1


def start(handle: int = 0, **fields: Any) -> decode_pb2.SessionCommand:
    values = {"request_id": "r", "token_ids": convert.token_ids_to_proto(PROMPT), "sampling": SAMPLING, **fields}
    return decode_pb2.SessionCommand(start=decode_pb2.Start(handle=handle, **values))


def sampling(**fields: Any) -> common_pb2.SamplingParams:
    changed = common_pb2.SamplingParams()
    changed.CopyFrom(SAMPLING)
    changed.MergeFrom(common_pb2.SamplingParams(**fields))
    return changed


HELLO = decode_pb2.SessionCommand(hello=decode_pb2.SessionHello(router_id="mine"))

HEARTBEAT = decode_pb2.SessionCommand(heartbeat=decode_pb2.Heartbeat())


class Session:
    """A router that says what the test wants to one decode worker."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._call: Any = decode_pb2_grpc.DecodeServiceStub(channel).Session()
        self.welcome = decode_pb2.SessionWelcome()

    async def say(self, *commands: decode_pb2.SessionCommand) -> None:
        with contextlib.suppress(asyncio.InvalidStateError):  # the worker has ended it: hearing tells how
            for command in commands:
                await self._call.write(command)

    async def begin(self) -> "Session":
        await self.say(HELLO)
        self.welcome = (await self._call.read()).hello
        return self

    async def answer(self, num_choices: int = 1) -> tuple[dict[int, list[int]], decode_pb2.StepFrame]:
        """Tokens by handle, up to the frame in which the last choice, or a request as a whole, ends."""
        tokens: dict[int, list[int]] = {}
        while True:
            frame = await self._call.read()
            if frame is grpc.aio.EOF:
                raise AssertionError("the session ended")
            await self.say(HEARTBEAT)
            for handle, token_id in zip(convert.unpack_u32(frame.handles), convert.unpack_u32(frame.token_ids), strict=True):
                tokens.setdefault(handle, []).append(token_id)
            num_choices -= len(frame.endings)
            if num_choices <= 0 or any(ending.HasField("error") for ending in frame.endings):
                return tokens, frame

    async def error(self) -> errors.BatonError:
        """What the session ends with."""
        try:
            while await self._call.read() is not grpc.aio.EOF:
                pass
            raise AssertionError(f"a good end: {await self._call.code()}")
        except grpc.aio.AioRpcError as error:
            return status.from_rpc_error(error, "decode")

    def close(self) -> None:
        self._call.cancel()


@dataclass(slots=True)
class Bench:
    mesh: Mesh
    router: str
    decode: str
    prefill: str
    kv_port: int

    def session(self) -> Session:
        return Session(self.mesh.channel(self.decode))


def run(test: Callable[[Bench], Coroutine[Any, Any, None]]) -> None:
    """A request through the mesh must get the same tokens before, while and after the test does its worst; then no block may be missing."""

    async def main() -> None:
        async with asyncio.timeout(90), Mesh("demo") as mesh:
            kv_port = free_port()
            prefill, decode = await mesh.prefill("p0"), await mesh.decode("d0", kv_port=kv_port)
            router = await mesh.router([prefill, decode], max_local_tokens=0)
            before = await mesh.generate(router, PROMPT, GOOD)
            during = asyncio.ensure_future(
                mesh.generate(router, PROMPT[:-1], SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True))
            )
            await test(Bench(mesh, router, decode.rpartition("@")[2], prefill.rpartition("@")[2], kv_port))
            assert [len(tokens) for tokens in (await during).tokens] == [200]
            after = await mesh.generate(router, PROMPT, GOOD)
            assert (after.tokens, after.texts) == (before.tokens, before.texts)
            for load in (await mesh.loads(router)).values():
                assert load.blocks_free + load.blocks_cached == load.blocks_total

    asyncio.run(main())


def test_decode_when_a_router_breaks_the_protocol_ends_that_session_alone() -> None:
    unhello = decode_pb2.SessionCommand(hello=decode_pb2.SessionHello(router_id="r" * 257))
    endings: list[tuple[str, list[decode_pb2.SessionCommand], type[errors.BatonError]]] = [
        ("start without hello", [start()], errors.Incompatible),
        ("nothing at first", [decode_pb2.SessionCommand()], errors.Incompatible),
        ("a name without end", [unhello], errors.InvalidRequest),
        ("a second hello", [HELLO, HELLO], errors.InvalidRequest),
        ("nothing", [HELLO, decode_pb2.SessionCommand()], errors.InvalidRequest),
        ("a handle twice", [HELLO, start(7), start(7)], errors.InvalidRequest),
        ("a handle of another choice", [HELLO, start(7, sampling=sampling(n=4)), start(9)], errors.InvalidRequest),
        ("a lower handle", [HELLO, start(MOST), start(0)], errors.InvalidRequest),
    ]

    async def test(bench: Bench) -> None:
        for name, commands, kind in endings:
            session = bench.session()
            await session.say(*commands)
            assert type(await session.error()) is kind, name

    run(test)


def test_decode_when_a_router_sends_a_bad_request_refuses_it_and_goes_on_with_the_session() -> None:
    many = [decode_pb2.PrefillCandidate(worker_id=f"p{number}", address=f"127.0.0.1:{number + 1}") for number in range(5000)]
    refused: list[tuple[str, dict[str, Any]]] = [
        ("prompt", {"token_ids": common_pb2.TokenIds()}),
        ("prompt", {"token_ids": convert.token_ids_to_proto([4096])}),
        ("prompt", {"token_ids": convert.token_ids_to_proto([5] * 5000)}),
        ("token_ids", {"token_ids": common_pb2.TokenIds(packed=b"123")}),
        ("temperature", {"sampling": sampling(temperature=NAN)}),
        ("n", {"sampling": sampling(n=MOST - 100)}),
        ("max_tokens", {"sampling": sampling(max_tokens=MOST)}),
        ("stop_token_ids", {"sampling": sampling(stop_token_ids=[5] * 1025)}),
        ("prefix_key", {"prefix_key": b"short"}),
        ("candidates", {"candidates": many}),
    ]
    served: list[dict[str, Any]] = [
        {"remaining_s": NAN},
        {"remaining_s": 1e300},
        {"remaining_s": -1.0},
        {"request_id": ""},
        {"request_id": "zwölf\n\x01" * 1000},
        {"attempt": MOST, "local_prefill_tokens": MOST, "trace_context": {"x" * 1000: "\n"}},
    ]

    async def test(bench: Bench) -> None:
        session = await bench.session().begin()
        handle = 0
        for field, fields in refused:
            await session.say(start(handle, **fields), decode_pb2.SessionCommand(cancel=decode_pb2.Cancel(handle=handle + 1)))
            tokens, frame = await session.answer()
            assert not tokens and frame.endings[0].handle == handle
            error = status.from_proto(frame.endings[0].error)
            assert isinstance(error, errors.InvalidRequest) and error.field == field, (field, error)
            handle += 1
        await session.say(start(handle))
        expected = (await session.answer())[0][handle]
        p0 = decode_pb2.PrefillCandidate(worker_id="p0", address=bench.prefill)
        for fields in served:
            handle += 1
            await session.say(start(handle, candidates=[p0], **fields))
            assert (await session.answer())[0] == {handle: expected}, fields
        # The last handles: as many choices as are left of them, and one more.
        await session.say(start(MOST - 1, sampling=sampling(n=3)))
        assert status.from_proto((await session.answer())[1].endings[0].error).reason == "INVALID_REQUEST"
        await session.say(start(MOST, sampling=sampling(n=1)))
        assert (await session.answer())[0] == {MOST: expected}
        session.close()

    run(test)


def test_decode_when_candidates_are_nowhere_computes_the_prompt_itself_and_keeps_few_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_prefill, "MAX_IDLE_CHANNELS", 3)
    opened: list[str] = []

    def counted(address: str) -> grpc.aio.Channel:
        opened.append(address)
        channel = open_channel(address)
        close = channel.close

        async def counted_close(grace: float | None = None) -> None:
            opened.remove(address)
            await close(grace)

        monkeypatch.setattr(channel, "close", counted_close)
        return channel

    monkeypatch.setattr(remote_prefill, "open_channel", counted)
    nowhere = ["", "nowhere", "dns:///", "unix:/etc/passwd", "127.0.0.1:99999", "h:1\0", ":1", "x" * 10_000 + ":1"]

    async def test(bench: Bench) -> None:
        somebody = [bench.decode, bench.router, f"127.0.0.1:{bench.kv_port}", *(f"127.0.0.1:{free_port()}" for _ in range(4))]
        session = await bench.session().begin()
        await session.say(start(0))
        expected = (await session.answer())[0][0]
        for handle, addresses in enumerate((nowhere, somebody), 1):
            # A salt of its own: what the request before has left in the cache is not found.
            key = bytes([handle]) * 32
            candidates = [decode_pb2.PrefillCandidate(worker_id=f"p{number}", address=each) for number, each in enumerate(addresses)]
            await session.say(start(handle, candidates=candidates, prefix_key=key))
            assert (await session.answer())[0] == {handle: expected}
        session.close()
        assert 1 <= len(opened) <= 3

    run(test)


Script = Callable[[prefill_pb2.PrefillRequest], AsyncIterator[prefill_pb2.PrefillEvent]]


class Prefill(prefill_pb2_grpc.PrefillServiceServicer):
    """A prefill worker that answers as its script says."""

    def __init__(self, script: Script) -> None:
        self._script = script

    async def Prefill(  # noqa: N802
        self, request: prefill_pb2.PrefillRequest, context: Any
    ) -> AsyncGenerator[prefill_pb2.PrefillEvent, None]:
        async for event in self._script(request):
            yield event


def accepted() -> prefill_pb2.PrefillEvent:
    return prefill_pb2.PrefillEvent(accepted=prefill_pb2.PrefillAccepted(worker_id="x" * 1000, kv_transport="pigeon"))


def progress() -> prefill_pb2.PrefillEvent:
    return prefill_pb2.PrefillEvent(progress=prefill_pb2.PrefillProgress(computed_tokens=MOST, engine_steps=2**64 - 1))


def done(*token_ids: int, num_top: int = 0, num_values: int = 0) -> prefill_pb2.PrefillEvent:
    top = common_pb2.TokenLogprobs(chosen=NAN, top_token_ids=[1] * num_top, top_logprobs=[NAN] * num_values)
    tokens = [prefill_pb2.FirstToken(token_id=token_id, logprobs=top if num_top else None) for token_id in token_ids]
    facts: dict[str, Any] = {name: NAN for name in ("queue_s", "prefill_s", "model_s", "since_first_token_s", "transfer_s")}
    return prefill_pb2.PrefillEvent(done=prefill_pb2.PrefillDone(first_tokens=tokens, cached_tokens=MOST, blocks_sent=MOST, **facts))


def block(index: int, data: bytes, *, checksum: int | None = None) -> prefill_pb2.PrefillEvent:
    checksum = block_checksum(data) if checksum is None else checksum
    return prefill_pb2.PrefillEvent(block=prefill_pb2.KVBlock(index=index, data=data, checksum=checksum))


def says(*events: prefill_pb2.PrefillEvent) -> Script:
    async def script(request: prefill_pb2.PrefillRequest) -> AsyncIterator[prefill_pb2.PrefillEvent]:
        for event in events:
            yield event

    return script


def after_blocks(*events: prefill_pb2.PrefillEvent, last: int = 3) -> Script:
    """All blocks as they should be, of zeros, and then this."""

    async def script(request: prefill_pb2.PrefillRequest) -> AsyncIterator[prefill_pb2.PrefillEvent]:
        yield accepted()
        for index in range(last):
            yield block(index, bytes(request.grant.endpoint.regions[0].block_bytes))
        for event in events:
            yield event

    return script


async def refuses(request: prefill_pb2.PrefillRequest) -> AsyncIterator[prefill_pb2.PrefillEvent]:
    if request.HasField("grant"):
        raise errors.InvalidRequest("grant", "is not to my liking")
    yield accepted()


async def breaks(request: prefill_pb2.PrefillRequest) -> AsyncIterator[prefill_pb2.PrefillEvent]:
    yield accepted()
    raise KeyError("a bug")


async def wrong_sizes(request: prefill_pb2.PrefillRequest) -> AsyncIterator[prefill_pb2.PrefillEvent]:
    yield accepted()
    yield block(0, bytes(request.grant.endpoint.regions[0].block_bytes + 1))


async def damages(request: prefill_pb2.PrefillRequest) -> AsyncIterator[prefill_pb2.PrefillEvent]:
    yield block(0, bytes(request.grant.endpoint.regions[0].block_bytes), checksum=1)


# Blocks that have landed with the right checksum are believed, whatever becomes of the call that brought them; these here are zeros.
BELIEVED = ("first tokens that cannot be read", "logprobs without end")
SCRIPTS: dict[str, Script] = {
    "nothing at all": says(),
    "an empty event": says(prefill_pb2.PrefillEvent(), accepted()),
    "done at once": says(done(5)),
    "progress that cannot be": says(accepted(), progress(), progress()),
    "a block of no bytes": says(accepted(), block(0, b"")),
    "a block of other sizes": wrong_sizes,
    "a block of another index": after_blocks(block(MOST, bytes(16)), last=0),
    "a damaged block": damages,
    "accepted twice, and no end": says(accepted(), accepted()),
    "no first token": after_blocks(done()),
    "a first token too many": after_blocks(done(5, 6)),
    "a first token out of the vocabulary": after_blocks(done(MOST)),
    BELIEVED[0]: after_blocks(done(5, num_top=2, num_values=1)),
    BELIEVED[1]: after_blocks(done(5, num_top=50_000, num_values=50_000)),
    "a refusal of what the decode worker has found valid": refuses,
    "a bug": breaks,
}


def test_prefill_worker_when_it_answers_nonsense_costs_a_request_nothing_but_time() -> None:
    async def test(bench: Bench) -> None:
        session = await bench.session().begin()
        await session.say(start(0))
        expected = (await session.answer())[0][0]
        for handle, (name, script) in enumerate(SCRIPTS.items(), 1):
            worker = Prefill(script)

            def register(server: grpc.aio.Server, worker: Prefill = worker) -> None:
                prefill_pb2_grpc.add_PrefillServiceServicer_to_server(worker, server)

            async with MeshServer("127.0.0.1:0", register, services=[]) as server:
                candidate = decode_pb2.PrefillCandidate(worker_id="liar", address=server.address)
                await session.say(start(handle, candidates=[candidate], prefix_key=bytes([handle]) * 32))
                tokens, frame = await session.answer()
            assert not frame.endings[0].HasField("error"), (name, frame.endings)
            assert (len(tokens[handle]) == len(expected)) if name in BELIEVED else (tokens == {handle: expected}), name
        session.close()

    run(test)


def grant(**endpoint: Any) -> prefill_pb2.KVGrant:
    fields = {"tcp_address": "127.0.0.1:1", "grpc": True, "access_key": bytes(16), "regions": [region()]}
    return prefill_pb2.KVGrant(
        transfer_id=os.urandom(16), block_ids=convert.pack_u32(range(3)), endpoint=prefill_pb2.KVEndpoint(**{**fields, **endpoint})
    )


def region(num_blocks: int = 64, block_bytes: int = 1 << 16) -> prefill_pb2.KVRegion:
    return prefill_pb2.KVRegion(num_blocks=num_blocks, block_bytes=block_bytes)


def granted(**fields: Any) -> prefill_pb2.KVGrant:
    changed = grant()
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def test_prefill_when_a_decode_worker_sends_bad_grants_refuses_each_and_frees_what_it_took() -> None:
    invalid, incompatible, away = errors.InvalidRequest, errors.Incompatible, errors.PeerUnavailable

    async def test(bench: Bench) -> None:
        kv = f"127.0.0.1:{bench.kv_port}"
        nobody, silent = f"127.0.0.1:{free_port()}", socket.create_server(("127.0.0.1", 0))  # who never accepts, but the kernel does
        quiet = f"127.0.0.1:{silent.getsockname()[1]}"
        refused: list[tuple[str, dict[str, Any], tuple[type[errors.BatonError], ...]]] = [
            ("no grant", {"grant": prefill_pb2.KVGrant()}, (invalid,)),
            ("no transfer id", {"grant": granted(transfer_id=b"")}, (invalid,)),
            ("a long transfer id", {"grant": granted(transfer_id=bytes(1 << 20))}, (invalid,)),
            ("block ids cut off", {"grant": granted(block_ids=bytes(11))}, (invalid,)),
            ("too few blocks", {"grant": granted(block_ids=bytes(8))}, (invalid,)),
            ("too many blocks", {"grant": granted(block_ids=bytes(4 * 1_000_000))}, (invalid,)),
            ("blocks that begin elsewhere", {"grant": granted(first_block=MOST)}, (invalid,)),
            ("blocks outside of the pool", {"grant": granted(block_ids=convert.pack_u32([0, 1, MOST]))}, (incompatible,)),
            ("a pool of nothing", {"grant": grant(regions=[region(0)])}, (incompatible,)),
            ("a block of nothing", {"grant": grant(regions=[region(block_bytes=0)])}, (incompatible,)),
            ("blocks of another size", {"grant": grant(regions=[region(block_bytes=2**63)])}, (incompatible,)),
            ("no pool", {"grant": grant(regions=[])}, (incompatible,)),
            ("one pool more", {"grant": grant(regions=[region(), region()])}, (incompatible,)),
            ("as many pools as there may be", {"grant": grant(regions=[region()] * 64)}, (incompatible,)),
            ("a million pools", {"grant": grant(regions=[prefill_pb2.KVRegion()] * 1_000_000)}, (invalid,)),
            ("an endless prompt", {"token_ids": convert.token_ids_to_proto([1] * 1_000_000)}, (invalid,)),
            ("more blocks than there is memory", {"grant": grant(regions=[region(2**63)], tcp_address=kv, grpc=False)}, (away,)),
            ("no transport", {"grant": grant(tcp_address="", grpc=False)}, (incompatible,)),
            ("nobody listens", {"grant": grant(tcp_address=nobody, grpc=False)}, (away,)),
            ("somebody else's port", {"grant": grant(tcp_address=bench.router, grpc=False)}, (away,)),
            ("somebody silent", {"grant": grant(tcp_address=quiet, grpc=False)}, (away,)),
            ("another access key", {"grant": grant(tcp_address=kv, grpc=False)}, (away,)),
            ("no address", {"grant": grant(tcp_address="x" * 10_000, grpc=False)}, (away,)),
            ("a port beyond the last one", {"grant": grant(tcp_address="127.0.0.1:" + "9" * 30, grpc=False)}, (away,)),
            ("another layout", {"layout_fingerprint": b"other"}, (incompatible,)),
            ("no prompt", {"token_ids": common_pb2.TokenIds()}, (invalid,)),
            ("bad sampling", {"sampling": sampling(top_p=NAN)}, (invalid,)),
            ("a short key", {"prefix_key": b"k"}, (invalid,)),
        ]
        session = await bench.session().begin()
        session.close()
        values: dict[str, Any] = {
            "request_id": "r",
            "token_ids": convert.token_ids_to_proto(PROMPT),
            "sampling": SAMPLING,
            "layout_fingerprint": session.welcome.model.layout_fingerprint,
            "grant": grant(),
        }
        stub = prefill_pb2_grpc.PrefillServiceStub(bench.mesh.channel(bench.prefill))
        block_bytes = session.welcome.model.block_bytes
        for name, fields, kinds in refused:
            request = prefill_pb2.PrefillRequest(**{**values, **fields})
            for announced in request.grant.endpoint.regions:
                if announced.block_bytes == 1 << 16:
                    announced.block_bytes = block_bytes
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in stub.Prefill(request):
                    pass
            error = status.from_rpc_error(caught.value, "p0")
            assert isinstance(error, kinds), (name, error)
        silent.close()

    run(test)
