"""Has a prompt computed by a prefill worker: grants it places in the local pool, calls it, waits until every block has landed.

    grant ─▶ call ─▶ (accepted, progress, block)* ─▶ done ─▶ landed        the first tokens come with `done`
                 any failure, cancel or silence ─▶ call cancelled ─▶ fenced, or quarantined until it is

A call that went well leaves one open for the next. Knows nothing of the engine; whoever calls owns the blocks, and decides what a failure
means.
"""

import asyncio
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from protos.baton.v1 import decode_pb2, prefill_pb2
from services.core.clock import unix_s
from services.core.errors import InvalidRequest, PeerUnavailable
from services.core.types import SampledToken
from services.mesh import convert, failpoints, status
from services.mesh.client import is_address, open_channel
from services.mesh.kv_transport import IncomingTransfer, KVReceiver
from services.mesh.streams import SILENCE_S

# A sender that has stopped acknowledges within a network round trip; one that has not by then is frozen or far away.
FENCE_S = 0.3
# Addresses come from routers, and old ones from workers that have moved: more channels than this are kept only while all are in use.
MAX_IDLE_CHANNELS = 64
# What can wait is done so long after a prefill, when its first token is on its way to the client.
_TIDY_S = 0.01
_METHOD = "/baton.v1.PrefillService/Prefill"
_Call = grpc.aio.StreamStreamCall[prefill_pb2.PrefillRequest, prefill_pb2.PrefillEvent]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillOutcome:
    """What a prefill worker made; its blocks are in the granted places.

    first_tokens   by choice
    facts          the part of baton.v1.Prefilled that is known here
    """

    first_tokens: tuple[SampledToken, ...]
    facts: decode_pb2.Prefilled


class PrefillFailed(Exception):
    """No outcome, for the reason `__cause__`. `unfenced` is the transfer when its sender may still write; else None."""

    def __init__(self, *, num_landed: int, unfenced: IncomingTransfer | None) -> None:
        super().__init__("prefill failed")
        self.num_landed = num_landed  # leading blocks of the grant that are in place
        self.unfenced = unfenced


class PrefillClient:
    """Calls prefill workers, over one channel for each; `async with` closes them."""

    def __init__(self, receiver: KVReceiver, *, layout_fingerprint: bytes) -> None:
        self._receiver = receiver
        self._layout_fingerprint = layout_fingerprint
        self._channels: dict[str, _Channel] = {}  # by address; the one that was used last is last

    async def __aenter__(self) -> "PrefillClient":
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for kept in self._channels.values():
            await kept.close()

    @functools.cached_property
    def _endpoint(self) -> prefill_pb2.KVEndpoint:
        return convert.endpoint_to_proto(self._receiver.endpoint)

    async def run(
        self,
        start: decode_pb2.Start,
        candidate: decode_pb2.PrefillCandidate,
        block_ids: Sequence[int],
        *,
        first_block: int,
        ready_at: float,
    ) -> PrefillOutcome:
        """Has the prompt of `start` computed; its places from `first_block` on (KVGroups.places) go to block_ids.

        ready_at   time.perf_counter() since when it could be asked: the way there counts from then

        Raises PrefillFailed from an error of the tree, or from CancelledError, when it was cancelled: either way nothing of it runs on,
        except for a sender that could not be fenced.
        """
        transfer = self._receiver.grant(block_ids)
        try:
            outcome = await self._call(start, candidate, transfer, block_ids, first_block, ready_at)
        except BaseException as error:
            fenced, cancel = await _fence(transfer)
            unfenced = None if fenced else transfer
            raise PrefillFailed(num_landed=transfer.num_landed_leading, unfenced=unfenced) from cancel or error
        return outcome

    async def _call(
        self,
        start: decode_pb2.Start,
        candidate: decode_pb2.PrefillCandidate,
        transfer: IncomingTransfer,
        block_ids: Sequence[int],
        first_block: int,
        ready_at: float,
    ) -> PrefillOutcome:
        request = prefill_pb2.PrefillRequest(
            request_id=start.request_id,
            attempt=start.attempt,
            token_ids=start.token_ids,
            sampling=start.sampling,
            prefix_key=start.prefix_key,
            layout_fingerprint=self._layout_fingerprint,
            grant=prefill_pb2.KVGrant(
                transfer_id=transfer.transfer_id,
                first_block=first_block,
                block_ids=convert.pack_u32(block_ids),
                endpoint=self._endpoint,
            ),
            trace_context=start.trace_context,
            prompt_length=start.prompt_length,
            sent_unix_s=unix_s(ready_at),
        )
        accepted = prefill_pb2.PrefillAccepted()
        done: prefill_pb2.PrefillDone | None = None
        has_landed = False
        kept = self._channel(candidate)
        kept.num_calls += 1
        call = kept.take_call()
        try:
            await _send(call, request, candidate.worker_id)
            await failpoints.reach("decode.prefill_called", start.request_id)
            while (event := await _read(call, candidate.worker_id)) is not None:
                transfer.raise_error()  # a broken connection or block: no need to wait for the end
                match event.WhichOneof("kind"):
                    case "accepted":
                        accepted = event.accepted
                    case "block":
                        transfer.land_inline(event.block.index, event.block.data, event.block.checksum)
                    case "done":
                        done = event.done
                        break
            if done is None:
                raise PeerUnavailable(f"{candidate.worker_id} ended the prefill without a result")
            done_at = time.perf_counter()
            try:
                async with asyncio.timeout(SILENCE_S):
                    await transfer.wait_landed()
            except TimeoutError:
                raise PeerUnavailable(f"{candidate.worker_id}: KV blocks did not land within {SILENCE_S} s of being sent") from None
            landed_at, has_landed = time.perf_counter(), True
            first_tokens = tuple(_sampled_token(token) for token in done.first_tokens)
            await failpoints.reach("decode.landed", start.request_id)
        except grpc.aio.AioRpcError as error:
            raise status.from_rpc_error(error, candidate.worker_id) from error
        except InvalidRequest as error:
            raise PeerUnavailable(f"{candidate.worker_id} gave a result that cannot be read: {error.message}") from error
        finally:
            kept.num_calls -= 1
            if has_landed:
                asyncio.get_running_loop().call_later(_TIDY_S, kept.tidy, call)
            else:
                call.cancel()
            await self._close_idle()
        landed_s = landed_at - done_at
        return PrefillOutcome(
            first_tokens=first_tokens,
            facts=decode_pb2.Prefilled(
                prefill_worker_id=candidate.worker_id,
                to_prefill_s=done.to_prefill_s,
                prefill_queue_s=done.queue_s,
                prefill_s=done.prefill_s,
                model_s=done.model_s,
                transfer_tail_s=done.since_first_token_s + landed_s,
                prefill_return_s=unix_s(done_at) - done.sent_unix_s,
                first_token_unix_s=unix_s(landed_at),
                transfer_s=done.transfer_s + landed_s,
                prefill_cached_tokens=done.cached_tokens,
                kv_transport=accepted.kv_transport,
                kv_blocks=done.blocks_sent,
                kv_bytes=transfer.bytes_landed,
            ),
        )

    def _channel(self, candidate: decode_pb2.PrefillCandidate) -> "_Channel":
        """The channel to a candidate. Raises PeerUnavailable for an address that is none."""
        address = candidate.address
        if not is_address(address):
            raise PeerUnavailable(f"{candidate.worker_id} is said to be at {address!r}, which is not host:port")
        kept = self._channels.pop(address, None) or _Channel(open_channel(address))
        self._channels[address] = kept
        return kept

    async def _close_idle(self) -> None:
        """Closes the idle channels that were not used for the longest time, as many as there are too many."""
        excess = max(0, len(self._channels) - MAX_IDLE_CHANNELS)
        idle = [address for address, kept in self._channels.items() if not kept.num_calls][:excess]
        for kept in [self._channels.pop(address) for address in idle]:
            await kept.close()


@dataclass(slots=True, eq=False)
class _Channel:
    """`spare` is a call that was opened ahead: it has reached the worker and waits there for its request, which saves half of the way."""

    channel: grpc.aio.Channel
    num_calls: int = 0
    spare: _Call | None = None
    is_closed: bool = False

    def take_call(self) -> _Call:
        """A call whose request is to be written."""
        call, self.spare = self.spare, None
        return self._open() if call is None or call.done() else call

    def tidy(self, call: _Call) -> None:
        """After a call that went well, and has told all that it had to tell."""
        call.cancel()
        if not self.is_closed and (self.spare is None or self.spare.done()):
            self.spare = self._open()

    async def close(self) -> None:
        self.is_closed = True
        await self.channel.close()

    def _open(self) -> _Call:
        # To the worker it is the call of its proto, with one request; only here may it come later than the call.
        method: grpc.aio.StreamStreamMultiCallable[prefill_pb2.PrefillRequest, prefill_pb2.PrefillEvent] = self.channel.stream_stream(
            _METHOD,
            request_serializer=prefill_pb2.PrefillRequest.SerializeToString,
            response_deserializer=prefill_pb2.PrefillEvent.FromString,
        )
        return method()


async def _send(call: _Call, request: prefill_pb2.PrefillRequest, worker_id: str) -> None:
    """Raises PeerUnavailable when the worker does not take it, AioRpcError."""
    try:
        async with asyncio.timeout(SILENCE_S):
            await call.write(request)
            await call.done_writing()
    except TimeoutError:
        raise PeerUnavailable(f"{worker_id} has not taken the request within {SILENCE_S} s") from None
    except (asyncio.InvalidStateError, grpc.aio.InternalError):  # the latter from the half-close alone, when the worker dies just then
        raise PeerUnavailable(f"{worker_id} has ended the call") from None


async def _read(call: _Call, worker_id: str) -> prefill_pb2.PrefillEvent | None:
    """The next event; None at the end. Raises PeerUnavailable for silence, AioRpcError."""
    try:
        async with asyncio.timeout(SILENCE_S):  # which cancels the call: there is no reading on after it
            event = await call.read()
            return event if isinstance(event, prefill_pb2.PrefillEvent) else None
    except TimeoutError:
        raise PeerUnavailable(f"{worker_id} has said nothing for {SILENCE_S} s") from None


async def _fence(transfer: IncomingTransfer) -> tuple[bool, asyncio.CancelledError | None]:
    """Waits for the fence even while being cancelled: blocks must not be reused before. Also returns the cancel that came meanwhile."""
    fence = asyncio.ensure_future(transfer.fence(FENCE_S))
    cancel = None
    while not fence.done():
        try:
            await asyncio.shield(fence)
        except asyncio.CancelledError as error:
            cancel = error
    return fence.result(), cancel


def _sampled_token(token: prefill_pb2.FirstToken) -> SampledToken:
    logprobs = convert.logprobs_from_proto(token.logprobs) if token.HasField("logprobs") else None
    return SampledToken(token.token_id, logprobs)
