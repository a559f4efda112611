"""Where KV blocks leave: finds the best transport to a receiver, keeps one connection to each, and opens transfers on it.

The transport is agreed at first contact: shm if both allow it, the hosts are one and the socket answers; else tcp; else grpc. A
connection that ended is made anew at the next open, by the same choice. Knows nothing of gRPC or of engines.
"""

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

from services.core.errors import Incompatible, InvalidRequest, PeerUnavailable
from services.mesh import kv_copy
from services.mesh.client import is_address
from services.mesh.kv_channel import SendingHalf, ShmSendingHalf, TcpSendingHalf
from services.mesh.kv_memory import KVMemory, PeerMemory, read_host_id
from services.mesh.kv_outgoing import Connection, InlineBlock, InlineTransfer
from services.mesh.kv_wire import (
    FRAME_BYTES,
    TRANSFER_ID_BYTES,
    TRANSPORTS,
    Frame,
    FrameKind,
    Hello,
    KVEndpoint,
    Refusal,
    configure_tcp,
    layout_digest,
)

_CONNECT_TIMEOUT_S = 2.0
# Where only grpc is left, the better transports are tried again after this time, and not with every transfer.
_RETRY_AFTER_S = 30.0

_log = logging.getLogger(__name__)


class OutgoingTransfer(Protocol):
    """What both kinds of transfer can do; StreamedTransfer and InlineTransfer in kv_outgoing say how."""

    transport: str
    transfer_id: bytes

    async def send(self, blocks: Sequence[tuple[int, int]]) -> list[InlineBlock]:
        """Sends (index, own block id) pairs. What it returns the caller must send in its own stream: all over grpc, nothing otherwise."""

    async def finish(self) -> None:
        """After the last send."""

    async def stop(self, timeout_s: float) -> None:
        """On every other way out: after it no byte of the own pool is read for this transfer."""


@dataclass(slots=True)
class _Peer:
    """What is known of one endpoint."""

    connection: Connection | None = None
    inline_until: float = 0.0  # loop time: no connection is tried before
    connecting: asyncio.Lock = field(default_factory=asyncio.Lock)


class KVSender:
    """`async with KVSender(memory, ...) as sender`: sends blocks of `memory`. Leaving ends all transfers."""

    def __init__(
        self,
        memory: KVMemory,
        *,
        layout_fingerprint: bytes,
        transports: Sequence[str] = TRANSPORTS,
        checksum: bool = True,
        copy_threads: int = 2,
    ) -> None:
        """`copy_threads` is per shm connection: while one of them copies, another one hashes, or tells of what it has copied.

        Without `checksum` nothing is checked: for measurements.
        """
        assert set(transports) <= set(TRANSPORTS), transports
        if "shm" in transports:
            kv_copy.compiled()
        self._memory = memory
        self._transports = tuple(transports)
        self._block_sizes = [region.block_bytes for region in memory.map.regions]
        self._layout_digest = layout_digest(layout_fingerprint, self._block_sizes)
        self._checksum = checksum
        self._copy_threads = copy_threads
        self._host_id = read_host_id()
        self._peers: dict[KVEndpoint, _Peer] = {}
        self._blocks_sent: Counter[str] = Counter()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        async with asyncio.TaskGroup() as closing:
            for peer in self._peers.values():
                if peer.connection:
                    closing.create_task(peer.connection.close())

    @property
    def blocks_sent(self) -> Mapping[str, int]:
        """How many by transport, since the start."""
        return self._blocks_sent

    async def open(self, transfer_id: bytes, endpoint: KVEndpoint, block_ids: Sequence[int]) -> OutgoingTransfer:
        """Opens a transfer that the receiver granted, into `block_ids` of its pool.

        Raises Incompatible (no transport in common, other layout), TransferFenced (the receiver does not wait for it, or not any more),
        PeerUnavailable, InvalidRequest for an id that is none. Cancelling leaves nothing behind.
        """
        if len(transfer_id) != TRANSFER_ID_BYTES:
            raise InvalidRequest("transfer_id", f"has {len(transfer_id)} bytes", limit=TRANSFER_ID_BYTES)
        if (sizes := [region.block_bytes for region in endpoint.regions]) != self._block_sizes:
            raise Incompatible(f"KV blocks have {_some(self._block_sizes)} bytes here and {_some(sizes)} at the receiver")
        if not all(0 <= block_id < endpoint.num_blocks for block_id in block_ids):
            raise Incompatible(f"the grant names blocks outside of the receiver's pool of {endpoint.num_blocks}")
        if connection := await self._connection(endpoint):
            return await connection.open(transfer_id, block_ids)
        return InlineTransfer(self._memory, transfer_id, block_ids, checksum=self._checksum, blocks_sent=self._blocks_sent)

    async def _connection(self, endpoint: KVEndpoint) -> Connection | None:
        """The living connection to a receiver, made if need be; None: its blocks must go inline."""
        common = [name for name in TRANSPORTS if name in self._transports and endpoint.offers(name, host_id=self._host_id)]
        if not common:
            raise Incompatible(f"no KV transport in common: this side allows {', '.join(self._transports)}")
        self._forget_gone_peers()
        peer = self._peers.setdefault(endpoint, _Peer())
        async with peer.connecting:
            if peer.connection and peer.connection.is_usable:
                return peer.connection
            if peer.connection:
                await peer.connection.close()
                peer.connection = None
            now = asyncio.get_running_loop().time()
            if now < peer.inline_until:
                return None
            for transport in common:
                if transport == "grpc":
                    peer.inline_until = now + _RETRY_AFTER_S
                    return None
                try:
                    async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                        peer.connection = await self._connect(transport, endpoint)
                    return peer.connection
                except (OSError, ValueError) as error:  # ValueError: an address that is none
                    _log.warning("no %s to the KV receiver at %s: %s", transport, endpoint.tcp_address, error or type(error).__name__)
        raise PeerUnavailable(f"the KV receiver cannot be reached by {' or '.join(common)}")

    def _forget_gone_peers(self) -> None:
        now = asyncio.get_running_loop().time()
        for endpoint, peer in list(self._peers.items()):
            if not peer.connecting.locked() and peer.inline_until < now and (not peer.connection or peer.connection.is_gone):
                del self._peers[endpoint]

    async def _connect(self, transport: str, endpoint: KVEndpoint) -> Connection:
        """Raises OSError when the next transport should be tried, Incompatible when that would not help."""
        sock = await (_dial_unix(endpoint.shm_address) if transport == "shm" else _dial_tcp(endpoint.tcp_address))
        try:
            hello = Hello(
                access_key=endpoint.access_key,
                layout_digest=self._layout_digest,
                checksum=self._checksum,
            )
            await asyncio.get_running_loop().sock_sendall(sock, hello.pack())
            channel = await self._be_welcomed(sock, transport, endpoint)
        except BaseException:
            sock.close()
            raise
        lanes = self._copy_threads if transport == "shm" else 1
        return Connection(channel, self._memory, num_lanes=lanes, blocks_sent=self._blocks_sent)

    async def _be_welcomed(self, sock: socket.socket, transport: str, endpoint: KVEndpoint) -> SendingHalf:
        await _wait_readable(sock)
        # One small frame, sent at once: it is here whole, or this is no receiver.
        data, fds, _, _ = socket.recv_fds(sock, FRAME_BYTES, 1, getattr(socket, "MSG_CMSG_CLOEXEC", 0))
        peer_memory = PeerMemory(fds[0], endpoint.regions) if fds else None
        try:
            _check_welcome(Frame.unpack(data))
            sock.setblocking(True)
            if transport == "tcp":
                return TcpSendingHalf(sock, self._memory, checksum=self._checksum)
            if not peer_memory:
                raise ConnectionAbortedError("the receiver did not hand over its memory")
            channel = ShmSendingHalf(sock, self._memory, peer_memory, checksum=self._checksum)
            peer_memory = None
            return channel
        finally:
            if peer_memory:
                peer_memory.close()


def _check_welcome(frame: Frame) -> None:
    if frame.refusal in (Refusal.OTHER_LAYOUT, Refusal.OTHER_CHECKSUM):
        raise Incompatible(f"the KV receiver refused: {frame.refusal.name}")
    if frame.kind is not FrameKind.WELCOME:
        raise ConnectionRefusedError(f"the KV receiver refused: {frame.refusal.name}")


async def _dial_unix(address: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(sock, f"\0{address}")
    except BaseException:
        sock.close()
        raise
    return sock


async def _dial_tcp(address: str) -> socket.socket:
    loop = asyncio.get_running_loop()
    if not is_address(address):
        raise ValueError(f"{address!r} is not host:port")
    host, _, port = address.rpartition(":")
    family, kind, protocol, _, resolved = (await loop.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM))[0]
    sock = socket.socket(family, kind, protocol)
    sock.setblocking(False)
    try:
        await loop.sock_connect(sock, resolved)
        configure_tcp(sock)
    except BaseException:
        sock.close()
        raise
    return sock


async def _wait_readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(sock, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(sock)


def _some(sizes: Sequence[int]) -> str:
    shown = " and ".join(str(size) for size in sizes[:4])
    return shown if len(sizes) <= 4 else f"{shown} and {len(sizes) - 4} more sizes"
