"""Calls to a prefill worker that is a real server: the one that is opened ahead, what becomes of it, and what it leaves behind."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import grpc
import pytest
import uvloop

from protos.baton.v1 import common_pb2, decode_pb2, prefill_pb2, prefill_pb2_grpc
from services.core.errors import ChecksumMismatch, PeerUnavailable
from services.decode.remote_prefill import PrefillClient, PrefillFailed, PrefillOutcome
from services.mesh import convert
from services.mesh.kv_memory import KVMemory
from services.mesh.kv_receiver import KVReceiver
from services.mesh.kv_wire import block_checksum
from services.mesh.server import MeshServer
from tests.waiting import wait_until

TIMEOUT_S = 20.0
BLOCK_BYTES = 4096


class PrefillWorker(prefill_pb2_grpc.PrefillServiceServicer):
    """Sends one block of zeros and the first token 5."""

    def __init__(self) -> None:
        self.request_ids: list[str] = []
        self.tasks: list[asyncio.Task[Any] | None] = []
        self.is_silent = self.is_damaging = False

    async def Prefill(  # noqa: N802
        self, request: prefill_pb2.PrefillRequest, context: Any
    ) -> AsyncGenerator[prefill_pb2.PrefillEvent, None]:
        self.request_ids.append(request.request_id)
        self.tasks.append(asyncio.current_task())
        yield prefill_pb2.PrefillEvent(accepted=prefill_pb2.PrefillAccepted(worker_id="p", kv_transport="grpc"))
        if self.is_silent:
            await asyncio.Event().wait()
        data = bytes(BLOCK_BYTES)
        checksum = block_checksum(data) + self.is_damaging
        yield prefill_pb2.PrefillEvent(block=prefill_pb2.KVBlock(index=0, data=data, checksum=checksum))
        if self.is_damaging:
            await asyncio.Event().wait()
        yield prefill_pb2.PrefillEvent(done=prefill_pb2.PrefillDone(first_tokens=[prefill_pb2.FirstToken(token_id=5)]))


class Bench:
    """A prefill worker, and who calls it."""

    def __init__(self, client: PrefillClient) -> None:
        self.client = client
        self.worker = PrefillWorker()
        self.server: MeshServer
        self._running = contextlib.AsyncExitStack()

    @property
    def open_calls(self) -> set[asyncio.Task[Any]]:
        """Calls that have reached the worker, whether it has got their request or not."""
        return self.server._interceptor.calls

    async def start_worker(self, address: str = "127.0.0.1:0") -> None:
        def register(server: grpc.aio.Server) -> None:
            prefill_pb2_grpc.add_PrefillServiceServicer_to_server(self.worker, server)

        self.server = await self._running.enter_async_context(MeshServer(address, register, services=[], returns_request_id=False))

    async def stop_worker(self) -> None:
        await self._running.aclose()

    async def prefill(self, request_id: str, *, block_id: int = 0) -> PrefillOutcome:
        start = decode_pb2.Start(request_id=request_id, token_ids=convert.token_ids_to_proto([1, 2]), sampling=common_pb2.SamplingParams())
        candidate = decode_pb2.PrefillCandidate(worker_id="p", address=self.server.address)
        return await self.client.run(start, candidate, [block_id], first_block=0, ready_at=0.0)

    async def wait_spare(self) -> asyncio.Task[Any]:
        """The call that waits at the worker for its request, once it is alone."""
        await wait_until(lambda: len(self.open_calls - set(self.worker.tasks)) == 1 == len(self.open_calls))
        (call,) = self.open_calls
        return call


def run(main: Callable[[Bench], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            with KVMemory([(8, BLOCK_BYTES)]) as memory:
                async with (
                    KVReceiver(memory, layout_fingerprint=b"l", transports=["grpc"]) as receiver,
                    PrefillClient(receiver, layout_fingerprint=b"l") as client,
                ):
                    bench = Bench(client)
                    await bench.start_worker()
                    try:
                        await main(bench)
                    finally:
                        await bench.stop_worker()

    uvloop.run(bounded())


def test_prefill_when_one_has_gone_well_finds_its_call_open_and_leaves_one_for_the_next() -> None:
    async def main(bench: Bench) -> None:
        for request_id in ("1", "2", "3"):
            spare = await bench.wait_spare() if bench.worker.tasks else None
            outcome = await bench.prefill(request_id)
            assert [token.token_id for token in outcome.first_tokens] == [5]
            assert spare is None or bench.worker.tasks[-1] is spare
        await bench.wait_spare()
        assert bench.worker.request_ids == ["1", "2", "3"]

    run(main)


def test_prefill_when_several_come_at_once_shares_no_call() -> None:
    async def main(bench: Bench) -> None:
        await bench.prefill("first")
        await bench.wait_spare()
        await asyncio.gather(*(bench.prefill(str(number), block_id=number) for number in range(5)))
        assert len(set(bench.worker.tasks)) == 6
        await bench.wait_spare()

    run(main)


def test_prefill_when_the_worker_was_restarted_is_not_sent_into_the_old_call() -> None:
    async def main(bench: Bench) -> None:
        await bench.prefill("before")
        await bench.wait_spare()
        address = bench.server.address
        await bench.stop_worker()
        await bench.start_worker(address)
        channel = bench.client._channels[address].channel
        await wait_until(lambda: channel.get_state(try_to_connect=True) is grpc.ChannelConnectivity.READY)
        await bench.prefill("after")
        assert bench.worker.request_ids == ["before", "after"]

    run(main)


def test_prefill_when_the_worker_is_gone_fails_at_once_and_opens_nothing() -> None:
    async def main(bench: Bench) -> None:
        await bench.prefill("before")
        spare = await bench.wait_spare()
        await bench.stop_worker()
        assert spare.done()
        with pytest.raises(PrefillFailed) as failed:
            await bench.prefill("after")
        assert isinstance(failed.value.__cause__, PeerUnavailable) and failed.value.unfenced is None

    run(main)


def test_prefill_when_it_is_cancelled_ends_its_call_at_the_worker() -> None:
    async def main(bench: Bench) -> None:
        await bench.prefill("before")
        await bench.wait_spare()
        bench.worker.is_silent = True
        prefill = asyncio.create_task(bench.prefill("cancelled"))
        await wait_until(lambda: len(bench.worker.request_ids) == 2)
        prefill.cancel()
        with pytest.raises(PrefillFailed):
            await prefill
        await wait_until(lambda: not bench.open_calls)

    run(main)


def test_prefill_when_a_block_is_damaged_ends_its_call_at_the_worker() -> None:
    async def main(bench: Bench) -> None:
        bench.worker.is_damaging = True
        with pytest.raises(PrefillFailed) as failed:
            await bench.prefill("damaged")
        assert isinstance(failed.value.__cause__, ChecksumMismatch)
        await wait_until(lambda: not bench.open_calls)

    run(main)


def test_client_when_it_is_closed_leaves_no_call_open() -> None:
    async def main(bench: Bench) -> None:
        await bench.prefill("1")
        await bench.wait_spare()
        await bench.client.__aexit__(None, None, None)
        await wait_until(lambda: not bench.open_calls)

    run(main)


def test_client_when_it_is_closed_behind_a_prefill_opens_no_call_any_more() -> None:
    async def main(bench: Bench) -> None:
        failures: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: failures.append(context))
        await bench.prefill("1")
        await bench.client.__aexit__(None, None, None)
        await asyncio.sleep(0.05)
        assert not bench.open_calls and not failures

    run(main)
