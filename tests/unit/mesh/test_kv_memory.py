"""The pool: views of it, its descriptor, and what a peer maps or refuses to map."""

import fcntl
import gc
import mmap
import os

import numpy as np
import pytest

from services.mesh.kv_memory import KVMemory, PeerMemory, read_host_id


def test_memory_when_new_is_zeroed_and_its_views_show_the_same_bytes() -> None:
    with KVMemory([(4, 4096)]) as memory:
        assert memory.pool_bytes == len(memory.buffer) == 4 * 4096
        assert not any(memory.buffer)
        memory.block(2)[:3] = b"abc"
        assert bytes(memory.buffer[2 * 4096 : 2 * 4096 + 3]) == b"abc"
        assert memory.blocks[0][2, :3].tobytes() == b"abc"
        with pytest.raises(AssertionError):
            memory.block(4)


def test_memory_when_mapped_by_a_peer_is_one_memory() -> None:
    with KVMemory([(4, 4096)]) as memory:
        assert memory.fd is not None
        peer = PeerMemory(os.dup(memory.fd), memory.map.regions)
        peer.block(3)[:] = 7
        assert set(memory.block(3)) == {7}
        peer.close()


def test_memory_when_it_has_regions_numbers_their_blocks_one_after_another() -> None:
    with KVMemory([(3, 100), (2, 64), (1, 7)]) as memory:
        sizes = [memory.map.size(block_id) for block_id in range(memory.num_blocks)]
        assert sizes == [100, 100, 100, 64, 64, 7]
        for block_id in range(6):
            memory.block(block_id)[:] = bytes([block_id + 1]) * sizes[block_id]
        assert bytes(memory.buffer) == b"".join(bytes([index + 1]) * size for index, size in enumerate(sizes))
        assert [part.shape for part in memory.blocks] == [(3, 100), (2, 64), (1, 7)]
        assert memory.blocks[1].max(axis=1).tolist() == [4, 5]
        assert memory.fd is not None
        peer = PeerMemory(os.dup(memory.fd), memory.map.regions)
        assert [peer.block(block_id).tobytes() for block_id in range(6)] == [bytes(memory.block(block_id)) for block_id in range(6)]
        peer.close()
        with pytest.raises(AssertionError):
            memory.block(6)


def test_memory_when_closed_under_a_view_keeps_the_bytes_until_the_view_goes() -> None:
    memory = KVMemory([(2, mmap.PAGESIZE)])
    fd = memory.fd
    assert fd is not None
    tensor = np.frombuffer(memory.buffer, np.uint8)
    memory.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    assert tensor[-1] == 0
    num_mappings = _num_pool_mappings()
    del tensor, memory
    gc.collect()
    assert _num_pool_mappings() == num_mappings - 1


def test_peer_memory_when_the_pool_could_shrink_is_refused() -> None:
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 8192)
    with pytest.raises(OSError, match="sealed"):
        PeerMemory(fd, [(2, 4096)])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_peer_memory_when_its_size_is_not_the_announced_one_is_refused() -> None:
    fd = os.memfd_create("short", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4096)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    with pytest.raises(OSError, match="4096 bytes"):
        PeerMemory(fd, [(2, 4096)])


def test_memory_when_shared_cannot_be_cut_short() -> None:
    with KVMemory([(2, 4096)]) as memory:
        assert memory.fd is not None
        with pytest.raises(PermissionError):
            os.ftruncate(memory.fd, 4096)


def test_host_id_when_read_twice_is_the_same_and_not_empty() -> None:
    assert read_host_id() == read_host_id() != ""


def _num_pool_mappings() -> int:
    with open("/proc/self/maps", encoding="ascii") as maps:
        return sum("baton-kv-pool" in line for line in maps)


def test_memory_when_new_has_all_its_pages() -> None:
    with KVMemory([(64, 1 << 20)]) as memory:
        assert memory.fd is not None
        assert os.fstat(memory.fd).st_blocks * 512 == memory.pool_bytes
