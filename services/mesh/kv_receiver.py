"""Where KV blocks arrive: listens for senders, judges their hellos, and gives each connection a thread that lets blocks into the pool.

Strangers are met on the event loop: within a time limit, few at once (one more takes the oldest one's place), at the cost of no thread.
A connection that was welcomed gets its thread, and ends when it breaks the protocol; what the transfers make of that is kv_incoming's.
Knows nothing of gRPC or of engines.
"""

import asyncio
import hmac
import logging
import math
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Self

from services.core.errors import PeerUnavailable, TransferFenced
from services.mesh.kv_channel import ReceivingHalf, ShmReceivingHalf, TcpReceivingHalf
from services.mesh.kv_incoming import Grants, IncomingTransfer
from services.mesh.kv_memory import KVMemory, read_host_id
from services.mesh.kv_wire import (
    HELLO_BYTES,
    TRANSPORTS,
    Frame,
    FrameKind,
    Hello,
    KVEndpoint,
    ProtocolViolation,
    Refusal,
    configure_tcp,
    layout_digest,
    recv_frames,
    send_frames,
    shut_down,
)

# How long senders may take, when the receiver closes, to finish the copy into shared memory that they are in.
_PART_TIMEOUT_S = 1.0
_BACKLOG = 64

_log = logging.getLogger(__name__)


class KVReceiver:
    """`async with KVReceiver(memory, ...) as receiver`: grants blocks of `memory` to senders. Leaving ends all connections and transfers.

    After leaving, memory that was not fenced may still be written by a frozen sender until this process ends.
    """

    def __init__(
        self,
        memory: KVMemory,
        *,
        layout_fingerprint: bytes,
        transports: Sequence[str] = TRANSPORTS,
        host: str = "127.0.0.1",
        advertised_host: str | None = None,
        tcp_port: int = 0,
        checksum: bool = True,
        max_connections: int = 256,
        handshake_timeout_s: float = 5.0,
    ) -> None:
        """`host` is where tcp listens, `advertised_host` how others reach it. Without `checksum` nothing is checked: for measurements."""
        assert set(transports) <= set(TRANSPORTS), transports
        self._memory = memory
        self._transports = tuple(transports)
        self._layout_digest = layout_digest(layout_fingerprint, [region.block_bytes for region in memory.map.regions])
        self._host, self._advertised_host, self._tcp_port = host, advertised_host or host, tcp_port
        self._checksum = checksum
        self._max_connections, self._handshake_timeout_s = max_connections, handshake_timeout_s
        self._access_key = os.urandom(16)
        self._strangers: dict[socket.socket, None] = {}  # the one that came first is first
        self._connections: set[_Connection] = set()

    async def __aenter__(self) -> Self:
        """Raises OSError when the TCP port cannot be taken."""
        self._grants = Grants(self._memory, checksum=self._checksum)
        self._listeners: dict[str, socket.socket] = {}
        shm_address = tcp_address = ""
        if "tcp" in self._transports:
            family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
            listener = self._listeners["tcp"] = socket.create_server((self._host, self._tcp_port), family=family, backlog=_BACKLOG)
            tcp_address = f"{self._advertised_host}:{listener.getsockname()[1]}"
        if "shm" in self._transports and self._memory.fd is not None:
            shm_address = f"baton-kv-{os.urandom(16).hex()}"
            # Packets, not a stream: whole frames, however many threads of the sender write them.
            listener = self._listeners["shm"] = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            listener.bind(f"\0{shm_address}")
            listener.listen(_BACKLOG)
        self.endpoint = KVEndpoint(
            host_id=read_host_id(),
            shm_address=shm_address,
            tcp_address=tcp_address,
            grpc="grpc" in self._transports,
            access_key=self._access_key,
            regions=self._memory.map.regions,
        )
        self._tasks = await asyncio.TaskGroup().__aenter__()
        self._accepting = [self._tasks.create_task(self._accept(listener, transport)) for transport, listener in self._listeners.items()]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for task in self._accepting:
            task.cancel()
        for stranger in self._strangers:
            shut_down(stranger, socket.SHUT_RDWR)  # its handshake reads the end of it
        await self._tasks.__aexit__(None, None, None)
        for listener in self._listeners.values():
            listener.close()
        for transfer in self._grants.all():
            transfer.end(TransferFenced("the KV receiver is closed"))
        connections = list(self._connections)
        for connection in connections:
            connection.part()
        await asyncio.to_thread(_join, connections, _PART_TIMEOUT_S)
        for connection in connections:
            connection.abandon()
        await asyncio.to_thread(_join, connections)
        for connection in connections:
            connection.close()

    def grant(self, block_ids: Sequence[int]) -> IncomingTransfer:
        """A transfer that one sender may open, into blocks that the caller owns (at least one) and does not touch until it has ended."""
        return self._grants.add(block_ids)

    @property
    def blocks_landed(self) -> Mapping[str, int]:
        """How many by transport, since the start."""
        return self._grants.blocks_landed

    async def _accept(self, listener: socket.socket, transport: str) -> None:
        listener.setblocking(False)
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError as error:
                _log.warning("cannot accept a KV connection: %s", error)
                await asyncio.sleep(0.1)  # out of descriptors, most likely: the next try at once would spin
                continue
            if transport == "shm" and not _is_same_user(sock):
                sock.close()
                continue
            if len(self._strangers) >= self._max_connections:
                # Who has been silent for the longest time makes room: a sender says hello at once, a crowd that only waits never does.
                oldest = next(iter(self._strangers))
                del self._strangers[oldest]
                shut_down(oldest, socket.SHUT_RDWR)  # its handshake reads the end of it
            self._strangers[sock] = None
            self._tasks.create_task(self._meet(sock, transport))

    async def _meet(self, sock: socket.socket, transport: str) -> None:
        """Hears a stranger's hello and answers; who is welcome gets a thread."""
        welcome = False
        try:
            async with asyncio.timeout(self._handshake_timeout_s):
                refusal = self._judge(await _recv_hello(sock))
                await self._answer(sock, transport, refusal)
                welcome = refusal is Refusal.NONE
                if not welcome:
                    _log.warning("refused a KV sender over %s: %s", transport, refusal.name)
        except OSError as error:
            _log.warning("a KV connection over %s failed at its hello: %s", transport, error or type(error).__name__)
        finally:
            self._strangers.pop(sock, None)
            if not welcome:
                sock.close()
        if welcome:
            self._start_connection(sock, transport)

    def _judge(self, hello: Hello) -> Refusal:
        if not hmac.compare_digest(hello.access_key, self._access_key):
            return Refusal.WRONG_KEY
        if hello.layout_digest != self._layout_digest:
            return Refusal.OTHER_LAYOUT
        if hello.checksum != self._checksum:
            return Refusal.OTHER_CHECKSUM
        return Refusal.FULL if len(self._connections) >= self._max_connections else Refusal.NONE

    async def _answer(self, sock: socket.socket, transport: str, refusal: Refusal) -> None:
        if refusal is not Refusal.NONE:
            await asyncio.get_running_loop().sock_sendall(sock, Frame(FrameKind.REFUSED, refusal=refusal).pack())
            return
        welcome = Frame(FrameKind.WELCOME).pack()
        if transport == "shm":
            assert self._memory.fd is not None
            socket.send_fds(sock, [welcome], [self._memory.fd])  # the first packet of a connection never waits
        else:
            await asyncio.get_running_loop().sock_sendall(sock, welcome)

    def _start_connection(self, sock: socket.socket, transport: str) -> None:
        sock.setblocking(True)
        if transport == "tcp":
            configure_tcp(sock)
        channel = (TcpReceivingHalf if transport == "tcp" else ShmReceivingHalf)(sock, checksum=self._checksum)
        loop = asyncio.get_running_loop()
        connection = _Connection(channel, self._grants, on_end=lambda: loop.call_soon_threadsafe(self._drop, connection))
        self._connections.add(connection)
        connection.thread.start()

    def _drop(self, connection: "_Connection") -> None:
        self._connections.discard(connection)
        connection.close()


class _Connection:
    """One sender's connection and the thread that reads it; the Writer of the transfers that were opened on it.

    Its socket is closed by the event loop, after the thread has ended: whoever shuts it down then never hits a descriptor that has become
    somebody else's.
    """

    def __init__(self, channel: ReceivingHalf, grants: Grants, *, on_end: Callable[[], object]) -> None:
        self.transport = channel.transport
        self.peer_writes_memory = channel.peer_writes_memory
        self.thread = threading.Thread(target=self._run, name=f"kv-receive-{channel.transport}", daemon=True)
        self._channel = channel
        self._grants = grants
        self._on_end = on_end
        self._abandoned = False

    def ask_to_stop(self, transfer_id: bytes) -> None:
        if not self.peer_writes_memory:
            return
        try:
            self._channel.sock.send(Frame(FrameKind.STOP, transfer_id).pack(), socket.MSG_DONTWAIT)
        except OSError as error:
            _log.warning("a KV sender cannot be asked to stop, only its end will fence it: %s", error)

    def cut_off(self) -> bool:
        if self.peer_writes_memory:
            return False
        shut_down(self._channel.sock, socket.SHUT_RDWR)
        return True

    def part(self) -> None:
        """Lets the peer know that this is the end. It closes its side when it is out of our memory."""
        shut_down(self._channel.sock, socket.SHUT_WR if self.peer_writes_memory else socket.SHUT_RDWR)

    def abandon(self) -> None:
        """Waits for the peer no longer; what it still has open is never called fenced."""
        self._abandoned = True
        shut_down(self._channel.sock, socket.SHUT_RDWR)

    def close(self) -> None:
        """After the thread has ended."""
        self._channel.sock.close()

    def _run(self) -> None:
        error = PeerUnavailable("the KV sender closed its connection")
        try:
            while frames := recv_frames(self._channel.sock):
                for frame in frames:
                    self._take(frame)
        except ProtocolViolation as violation:
            _log.warning("a KV sender over %s broke the protocol: %s", self.transport, violation)
            error = PeerUnavailable(f"the KV sender broke the protocol: {violation}")
        except OSError as failure:
            error = PeerUnavailable(f"the connection to the KV sender failed: {failure}")
        if self.peer_writes_memory:
            self._end_transfers(error, writer_is_out=False)
            self.part()
            _wait_closed_by_peer(self._channel.sock)
        self._end_transfers(error, writer_is_out=not self._abandoned)
        self._on_end()

    def _take(self, frame: Frame) -> None:
        transfer = self._grants.find(frame.transfer_id)
        if frame.kind is FrameKind.OPEN:
            answer = Frame(FrameKind.OPENED, frame.transfer_id)
            if transfer is None or not transfer.open_by(self):
                answer = Frame(FrameKind.REFUSED, frame.transfer_id, refusal=Refusal.NO_SUCH_GRANT)
            send_frames(self._channel.sock, [answer])
        elif frame.kind is FrameKind.BLOCK:
            if all(frame.length != region.block_bytes for region in self._grants.memory.map.regions):
                raise ProtocolViolation(f"a block of {frame.length} bytes")
            target = transfer.begin_block(frame.block_index, self, frame.length) if transfer else None
            intact = self._channel.land(frame, target)
            if transfer and target is not None:
                transfer.end_block(frame.block_index, intact=intact)
        elif frame.kind is FrameKind.STOPPED and self.peer_writes_memory:
            if transfer:
                transfer.end_writing(self, TransferFenced("the KV sender stopped the transfer"), writer_is_out=True)
        else:
            raise ProtocolViolation(f"{frame.kind.name} is not for a receiver")

    def _end_transfers(self, error: PeerUnavailable, *, writer_is_out: bool) -> None:
        for transfer in self._grants.all():
            transfer.end_writing(self, error, writer_is_out=writer_is_out)


async def _recv_hello(sock: socket.socket) -> Hello:
    """Raises OSError, ProtocolViolation for anything that is not a hello."""
    data = bytearray()
    while len(data) < HELLO_BYTES:
        part = await asyncio.get_running_loop().sock_recv(sock, HELLO_BYTES - len(data))
        if not part:
            raise ConnectionResetError("closed inside the hello")
        data += part
    return Hello.unpack(data)


def _is_same_user(sock: socket.socket) -> bool:
    assert sys.platform == "linux"
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return bool(uid == os.getuid())


def _wait_closed_by_peer(sock: socket.socket) -> None:
    """Reads past everything up to the end of the connection, which a Unix socket gives as a reset when the peer had not read all."""
    try:
        while sock.recv(1):
            pass
    except OSError as error:
        _log.debug("the peer is gone: %s", error)


def _join(connections: Sequence[_Connection], timeout_s: float = math.inf) -> None:
    """Waits until the threads have ended, or `timeout_s` in all."""
    deadline = time.monotonic() + timeout_s
    for connection in connections:
        connection.thread.join(None if timeout_s == math.inf else max(0.0, deadline - time.monotonic()))
