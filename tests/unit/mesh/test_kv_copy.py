"""Copies past the caches: the right bytes, and none beside them."""

import mmap
import os
import platform
import socket
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.mesh import failpoints, kv_copy
from services.mesh.kv_channel import Move, ShmSendingHalf
from services.mesh.kv_copy import copy_past_caches
from services.mesh.kv_memory import KVMemory, PeerMemory
from services.mesh.kv_wire import block_checksum

POOL_BYTES = 4096


def pools(offset: int) -> tuple[np.ndarray, np.ndarray]:
    """Zeros, `offset` bytes from a page's start, and random bytes."""
    target = np.frombuffer(mmap.mmap(-1, 2 * POOL_BYTES), np.uint8)[offset : offset + POOL_BYTES]
    source = np.random.default_rng(0).integers(1, 256, POOL_BYTES, dtype=np.uint8)
    return target, source


@given(
    offset=st.sampled_from([0, 1, 16, 64]),
    moves=st.lists(
        st.tuples(st.integers(0, 7).map(lambda slot: 512 * slot), st.integers(0, 3584), st.sampled_from([0, 1, 63, 64, 65, 128, 512])),
        unique_by=lambda move: move[0],
    ),
)
def test_moves_copy_their_bytes_and_no_others(offset: int, moves: list[tuple[int, int, int]]) -> None:
    target, source = pools(offset)
    expected = np.zeros(POOL_BYTES, np.uint8)
    for to, at, size in moves:
        expected[to : to + size] = source[at : at + size]
    copy_past_caches(target, source, moves)
    assert (target == expected).all()


@pytest.mark.parametrize("move", [(-64, 0, 64), (0, -64, 64), (POOL_BYTES - 63, 0, 64), (0, POOL_BYTES - 63, 64), (0, 0, -64)])
def test_moves_out_of_a_pool_are_refused(move: tuple[int, int, int]) -> None:
    target, source = pools(0)
    with pytest.raises(ValueError, match="bytes from"):
        copy_past_caches(target, source, [move])
    assert not target.any()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86's instructions")
def test_stores_go_past_the_caches_and_are_fenced() -> None:
    instructions = kv_copy.compiled().assembly
    assert "movnt" in instructions and "sfence" in instructions


@pytest.mark.skipif(sys.platform != "linux", reason="shares memory by memfd")
def test_block_that_a_failpoint_damages_arrives_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    with KVMemory([(2, 4096)]) as own, KVMemory([(2, 4096)]) as other, socket.socket() as sock:
        own.block(0)[:] = own.block(1)[:] = bytes([1]) * 4096
        assert other.fd is not None
        peer = PeerMemory(os.dup(other.fd), other.map.regions)
        damaged = iter([memoryview(bytes([2]) * 4096), None])
        monkeypatch.setattr(failpoints, "on_wire", lambda _, block: next(damaged) or block)
        half = ShmSendingHalf(sock, own, peer, checksum=True)
        frames = half.push(bytes(16), [Move(0, 0, 1), Move(1, 1, 0)])
        arrived = [block_checksum(other.block(target)) == frame.checksum for frame, target in zip(frames, (1, 0), strict=True)]
        half.close()
    assert arrived == [False, True]
