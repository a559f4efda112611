"""KV groups: what a window keeps, takes over from earlier prompts, and lets go; and which blocks of a prompt a peer needs."""

import pytest
import torch

from kernels import KVLayout
from services.engine.kv_groups import KVGroups, Place
from services.engine.loader import share_kv_memory
from services.engine.sequence import Purpose, Sequence
from services.engine.settings import EngineSettings
from tests.unit.engine.simulation import Arrival, Peer, Simulation, prompt

BLOCK = 4
# A model of six layers, one of which keeps all tokens.
LAYOUTS = [KVLayout(num_layers=layers, num_kv_heads=2, block_size=16, head_dim=8, dtype=torch.float32) for layers in (1, 5)]


def make(*windows: int | None, num_blocks: tuple[int, ...], chunk: int = 8, max_num_seqs: int = 4) -> Simulation:
    return Simulation(num_blocks=list(num_blocks), windows=windows, block_size=BLOCK, max_num_seqs=max_num_seqs, chunk_tokens=[chunk])


def serve(simulation: Simulation, arrival: Arrival, order: int) -> Sequence:
    """A request from its beginning to its end."""
    sequence = simulation.add(arrival, order)
    while simulation.scheduler.has_work:
        simulation.step()
    assert simulation.finished[-1] == (order, 0)
    return sequence


def test_places_when_groups_differ_come_block_by_block_with_what_the_last_block_sees() -> None:
    groups = KVGroups((None, 6), BLOCK)
    # The token at 16, the first of the last block, sees 11 … 16 through its window: from block 2 on.
    assert groups.places(17) == [(0, 0), (0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (0, 4), (1, 4)]
    assert groups.places(20) == groups.places(17)
    assert groups.places(17, 4) == [Place(0, 4), Place(1, 4)]
    assert groups.places(17, 5) == groups.places(17, 2**32 - 1) == []
    assert KVGroups((1,), BLOCK).places(8) == [(0, 1)]  # a token that sees nothing but itself
    assert KVGroups((None,), BLOCK).places(9) == [(0, 0), (0, 1), (0, 2)]


def test_window_when_a_long_prompt_is_computed_holds_no_more_than_window_and_chunk() -> None:
    simulation = make(None, 6, num_blocks=(40, 6))
    sequence = simulation.add(Arrival(prompt=prompt(0, 150), max_tokens=1), 0)
    held: list[int] = []
    while sequence.num_uncomputed or not held:
        simulation.step()
        held.append(simulation.pools[1].num_owned)
        if not sequence.tables:
            break
    assert max(held) == 6  # (6 - 1 + 8) tokens, a block for where they begin, and one for what the last block saw
    assert simulation.finished == [(0, 0)]


def test_window_when_a_prompt_begins_like_an_earlier_one_takes_over_only_what_is_seen() -> None:
    simulation = make(None, 6, num_blocks=(40, 20))
    serve(simulation, Arrival(prompt=prompt(0, 40), max_tokens=3), 10)
    again = simulation.add(Arrival(prompt=(*prompt(0, 33), *prompt(7, 30)), max_tokens=1), 1)
    simulation.step()
    # 33 tokens in common: 8 blocks of the first group, and of the window those of 27 … 31. Now 40 are computed, and what 36 saw is kept.
    assert again.cached_tokens == 32
    assert [table.first for table in again.tables] == [0, (36 - 6 + 1) // BLOCK]
    assert simulation.scheduler.num_cached_tokens == 32


def test_prefix_when_the_window_before_its_end_is_gone_is_as_long_as_the_next_window_that_is_there() -> None:
    simulation = make(None, 6, num_blocks=(40, 9))
    serve(simulation, Arrival(prompt=prompt(0, 33), max_tokens=1), 10)
    # A stranger takes the window's blocks that were released first.
    serve(simulation, Arrival(prompt=prompt(1, 12), max_tokens=1), 11)
    assert simulation.pools[0].num_evictions == 0 < simulation.pools[1].num_evictions
    sequence = serve(simulation, Arrival(prompt=prompt(0, 33), max_tokens=1), 2)
    assert sequence.cached_tokens == 32
    assert simulation.pools[1].match_prefix(sequence.block_hashes) == []  # not even the first block, which nobody needs any more
    # With the last of the window's blocks gone, nothing can be gone on from, though the first group has it all.
    simulation.pools[1].clear_cache()
    assert serve(simulation, Arrival(prompt=prompt(0, 33), max_tokens=1), 3).cached_tokens == 0


@pytest.mark.parametrize("num_blocks", [15, 16, 17, 18, 24])
def test_window_when_it_moves_on_from_blocks_that_others_hold_finds_as_many(num_blocks: int) -> None:
    """Whoever releases a block that others hold frees none, and needs one all the same."""
    simulation = make(None, 12, num_blocks=(400, num_blocks), max_num_seqs=12)
    stem = prompt(0, 32)
    serve(simulation, Arrival(prompt=(*stem, 1), max_tokens=1), 100)
    # Eight prefills are held with the blocks of the stem's window in common, and each with one of its own, while a long prompt moves on.
    held = [
        simulation.add(Arrival(prompt=(*stem, index), max_tokens=1, purpose=Purpose.PREFILL, peer=Peer(delay=30)), index)
        for index in range(8)
    ]
    long = simulation.add(Arrival(prompt=(*stem, *prompt(9, 60)), max_tokens=4), 8)
    while simulation.scheduler.has_work or simulation.scheduler.held or simulation.scheduler.waiting:
        simulation.tick()
        assert simulation.now < 200
    assert {sequence.cached_tokens for sequence in (*held, long)} == {32}
    assert simulation.finished[-1] == (8, 0)


def receive(simulation: Simulation, length: int, order: int, stem: int = 0) -> Sequence:
    arrival = Arrival(prompt=prompt(stem, length), max_tokens=1, purpose=Purpose.RECEIVE, peer=Peer(delay=10**6))
    sequence = simulation.add(arrival, order)
    simulation.step()
    assert simulation.scheduler.reserved == {str(order): sequence}
    return sequence


def test_reserved_when_a_peer_fills_it_has_room_for_the_window_alone_and_is_computed_anew_if_the_peer_fails() -> None:
    simulation = make(None, 6, num_blocks=(40, 6))
    sequence = receive(simulation, 33, 0)
    assert [len(table.block_ids) for table in sequence.tables] == [9, 3]
    assert len(simulation.received_blocks(sequence)) == 12
    simulation.land(sequence, 16)
    # Sixteen tokens have landed in one group; the window before the seventeenth has not.
    simulation.scheduler.start("0", 16)
    assert sequence in simulation.scheduler.waiting
    while simulation.scheduler.has_work:
        simulation.step()
    assert simulation.finished == [(0, 0)]


def test_reserved_when_little_is_missing_is_computed_here_from_what_is_cached() -> None:
    simulation = make(None, 6, num_blocks=(40, 12))
    serve(simulation, Arrival(prompt=prompt(0, 33), max_tokens=1), 10)
    sequence = receive(simulation, 35, 1)
    assert sequence.num_computed == 32
    simulation.scheduler.start("1", 32)
    assert sequence in simulation.scheduler.running
    while simulation.scheduler.has_work:
        simulation.step()
    assert simulation.finished[-1] == (1, 0)


@pytest.mark.parametrize("memory", [1 << 17, 1 << 18, 1 << 20, 1 << 22, 1 << 26])
def test_memory_when_it_is_shared_among_groups_is_never_exceeded_and_gives_windows_what_a_batch_fills(memory: int) -> None:
    windows = (None, 40)
    settings = EngineSettings(block_size=16, max_num_seqs=4, kv_memory_bytes=memory, prefill_chunk_tokens=32)
    num_blocks = share_kv_memory(windows, LAYOUTS, settings, max_model_len=256)
    used = sum(number * layout.block_bytes for number, layout in zip(num_blocks, LAYOUTS, strict=True))
    assert used <= memory
    least = KVGroups(windows, 16).most_blocks(1, 32)
    assert least is not None and num_blocks[1] >= least
    assert num_blocks[0] <= 2 * 4 * 16 and num_blocks[1] <= 2 * 4 * least
    assert num_blocks == [2 * 4 * 16, 2 * 4 * least] or used > memory - 2 * max(layout.block_bytes for layout in LAYOUTS)
    if memory < 1 << 20:  # less than a full batch needs
        assert num_blocks[1] * LAYOUTS[1].block_bytes < memory * 0.75
