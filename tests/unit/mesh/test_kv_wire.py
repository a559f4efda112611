"""Hellos and frames as bytes, and whole reads and writes over sockets that give less."""

import dataclasses
import os
import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.mesh.kv_wire import (
    FRAME_BYTES,
    HELLO_BYTES,
    MAX_PACKET_FRAMES,
    Frame,
    FrameKind,
    Hello,
    ProtocolViolation,
    Refusal,
    layout_digest,
    recv_frames,
    recv_whole,
    send_frames,
    send_whole,
)


@given(
    kind=st.sampled_from(FrameKind),
    transfer_id=st.binary(min_size=16, max_size=16),
    block_index=st.integers(0, 2**32 - 1),
    length=st.integers(0, 2**64 - 1),
    checksum=st.integers(0, 2**64 - 1),
    refusal=st.sampled_from(Refusal),
)
def test_frame_when_packed_and_unpacked_is_the_same(
    kind: FrameKind, transfer_id: bytes, block_index: int, length: int, checksum: int, refusal: Refusal
) -> None:
    frame = Frame(kind, transfer_id, block_index, length, checksum, refusal)
    assert Frame.unpack(frame.pack()) == frame
    assert len(frame.pack()) == FRAME_BYTES


WHOLE = [Frame(FrameKind.OPEN).pack(), Hello(access_key=bytes(16), layout_digest=bytes(16), checksum=False).pack()]


@given(data=st.binary(min_size=0, max_size=2 * HELLO_BYTES), whole=st.none() | st.sampled_from(WHOLE), flags=st.booleans())
def test_frame_and_hello_when_the_bytes_are_anything_are_violations_or_what_packs_to_them_again(
    data: bytes, whole: bytes | None, flags: bool
) -> None:
    if whole is not None:  # the right length and first word; with `flags` only the word after it is any
        data = whole[:4] + (data + bytes(len(whole)))[: 4 if flags else len(whole) - 4]
        data += whole[len(data) :]
    for kind in (Frame, Hello):
        try:
            value = kind.unpack(data)
        except ProtocolViolation:
            continue
        assert value.pack() == data


def test_hello_when_packed_and_unpacked_is_the_same() -> None:
    hello = Hello(access_key=os.urandom(16), layout_digest=layout_digest(b"x" * 100, [12345]), checksum=True)
    assert Hello.unpack(hello.pack()) == hello
    unchecked = dataclasses.replace(hello, checksum=False)
    assert Hello.unpack(unchecked.pack()) == unchecked
    assert hello.access_key.hex() not in repr(hello) and repr(hello.access_key) not in repr(hello)


def test_send_whole_when_buffers_are_small_loses_nothing() -> None:
    left, right = socket.socketpair()
    with left, right:
        left.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        parts = [os.urandom(size) for size in (1, 300_000, 42, 0, 100_000, 7)]
        sender = threading.Thread(target=send_whole, args=(left, [memoryview(part) for part in parts]))
        sender.start()
        received = bytearray(sum(map(len, parts)))
        recv_whole(right, memoryview(received))
        sender.join()
        assert received == b"".join(parts)


def test_send_whole_when_the_kernel_takes_a_part_sends_the_rest() -> None:
    class Stingy:
        """Takes at most five bytes of a sendmsg, like a socket interrupted at a bad moment."""

        def __init__(self) -> None:
            self.taken = b""

        def sendmsg(self, parts: list[bytes]) -> int:
            self.taken += b"".join(parts)[:5]
            return 5

        def sendall(self, data: bytes) -> None:
            self.taken += data

    for parts in ([b"abc", b"defg", b"hi"], [b"abcdefg", b"hi"], [b"abcde", b"fghi"], [b"a", b"b", b"c", b"d", b"efghi"]):
        stingy = Stingy()
        send_whole(stingy, parts)  # type: ignore[arg-type]
        assert stingy.taken == b"abcdefghi"


def test_recv_whole_when_the_peer_goes_raises_connection_reset() -> None:
    left, right = socket.socketpair()
    with right:
        left.sendall(b"half")
        left.close()
        with pytest.raises(ConnectionResetError):
            recv_whole(right, memoryview(bytearray(8)))


def test_recv_frames_when_the_stream_ends_gives_none_and_inside_a_frame_a_violation() -> None:
    left, right = socket.socketpair()
    with right:
        left.sendall(Frame(FrameKind.STOP).pack() + b"bKV1")
        left.close()
        assert recv_frames(right) == [Frame(FrameKind.STOP)]
        with pytest.raises(ProtocolViolation):
            recv_frames(right)
        assert recv_frames(right) == []


def test_recv_frames_when_a_packet_holds_many_gives_all_in_order() -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with right:
        frames = [Frame(FrameKind.BLOCK, block_index=index) for index in range(MAX_PACKET_FRAMES)]
        send_frames(left, frames)
        send_frames(left, [])
        left.sendall(Frame(FrameKind.STOPPED).pack() + b"x")
        left.close()
        assert recv_frames(right) == frames
        with pytest.raises(ProtocolViolation):
            recv_frames(right)
        assert recv_frames(right) == []
