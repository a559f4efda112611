"""Attention by Triton: what the kernels are told about a step, and how they are launched.

A step's sequences with few new tokens go to decode_attention, the others to prefill_attention. All that kernels must know of a step is on
the device once per step and window; a layer is then one launch for each of the two. Specification: reference.paged_attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import triton

from kernels.block_lists import BlockLists
from kernels.kv_layout import KVFormat, KVLayout
from kernels.triton_decode import decode_attention, plan_units
from kernels.triton_prefill import prefill_attention
from kernels.triton_shapes import capability, decode_warps, num_programs, prefill_rows, tile_rows

MAX_DECODE_QUERY = 16  # new tokens of a sequence that decode_attention takes
INVARIANT_CHUNK = 16  # blocks
DECODE_STAGES = 5  # of the pipeline: block ids are a stage of their own, so that two or three blocks are on their way
LATENT_STAGES = 3  # a block of latents takes as much shared memory as two of other keys and values
PREFILL_STAGES = 3
# To ptxas, for tiles of latents: else it keeps the addresses of all pieces of the queries in registers, up to 70, and spills others for it.
FEW_REGISTERS = "--register-usage-level=0"


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePlan:
    """Sequences with few new tokens each; all tensors are on the device, int32.

    first_row         of the query, where these sequences begin
    num_tokens        new tokens of them all
    block_tables      [S, M] or, where heads have tables of their own, [S, Hk, M]
    context_lens      [S]; query_starts [S + 1]
    starts            [S + 1] units of work before each sequence, see triton_decode
    ancestors         [T] int64 and tree_positions [T], for trees
    most_query        new tokens of any sequence at most: a launch is shaped by it
    """

    first_row: int
    num_tokens: int
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    query_starts: torch.Tensor
    starts: torch.Tensor
    ancestors: torch.Tensor | None
    tree_positions: torch.Tensor | None
    most_query: int
    window: int | None
    layout: KVLayout
    invariant: bool


def plan_decode(
    *,
    block_tables: Sequence[Sequence[int]] | torch.Tensor,
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    layout: KVLayout,
    num_heads: int,
    device: torch.device,
    window: int | None = None,
    first_row: int = 0,
    ancestors: torch.Tensor | None = None,
    invariant: bool = False,
) -> DecodePlan:
    """Arguments as of reference.paged_attention; a tree has at most MAX_DECODE_QUERY tokens."""
    assert query_lens and (ancestors is None or max(query_lens) <= MAX_DECODE_QUERY)
    tables = block_tables if isinstance(block_tables, torch.Tensor) else padded(block_tables)
    query_starts = torch.tensor([0, *query_lens]).cumsum(0)
    tree_positions = None
    if ancestors is not None:
        prefixes = torch.tensor([context - query for context, query in zip(context_lens, query_lens, strict=True)])
        depths = (ancestors[:, None] >> torch.arange(MAX_DECODE_QUERY) & 1).sum(1) - 1
        tree_positions = (prefixes.repeat_interleave(torch.tensor(query_lens)) + depths).to(device, torch.int32)
        ancestors = ancestors.to(device)
    plan = DecodePlan(
        first_row=first_row,
        num_tokens=sum(query_lens),
        block_tables=tables.to(device, torch.int32),
        context_lens=torch.tensor(context_lens, dtype=torch.int32).to(device),
        query_starts=query_starts.to(device, torch.int32),
        starts=torch.empty(len(query_lens) + 1, dtype=torch.int32, device=device),
        ancestors=ancestors,
        tree_positions=tree_positions,
        most_query=max(query_lens),
        window=window,
        layout=layout,
        invariant=invariant,
    )
    share_units(plan, num_heads)
    return plan


def padded(block_tables: Sequence[Sequence[int]]) -> torch.Tensor:
    """[S, M] int32 of tables that are not equally long."""
    tables = np.zeros((len(block_tables), max(1, *map(len, block_tables))), dtype=np.int32)
    for row, table in zip(tables, block_tables, strict=True):
        row[: len(table)] = table
    return torch.from_numpy(tables)


def share_units(plan: DecodePlan, num_heads: int) -> None:
    """Computes `starts` on the device, from lengths that lie there: part of a captured graph too."""
    num_sequences = len(plan.context_lens)
    rows = num_heads // plan.layout.num_kv_heads * plan.most_query
    plan_units[(1,)](
        plan.starts,
        plan.context_lens,
        plan.query_starts,
        num_sequences,
        plan.window or 0,
        plan.layout.num_kv_heads * -(-rows // tile_rows(rows, plan.layout, capability(plan.starts.device), invariant=plan.invariant)),
        BLOCK_N=plan.layout.block_size,
        CHUNK=INVARIANT_CHUNK if plan.invariant else 1,
        HAS_WINDOW=plan.window is not None,
        CAPACITY=max(256, triton.next_power_of_2(num_sequences)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PartsRoom:
    """What a launch's parts take: slots of `rows` times `columns` sums, and a counter for each pair of a sequence's head and tile.

    block_rows   of a tile; tiles: of a sequence's head
    """

    block_rows: int
    tiles: int
    num_slots: int
    rows: int
    columns: int
    num_pairs: int

    @property
    def num_bytes(self) -> int:
        return 4 * self.num_slots * self.rows * self.columns


def parts_room(
    num_sequences: int, most_query: int, num_blocks: int, layout: KVLayout, num_heads: int, device: torch.device, *, invariant: bool
) -> PartsRoom:
    """Of a launch for sequences of up to most_query new tokens, whose tables have up to num_blocks."""
    rows = num_heads // layout.num_kv_heads * most_query
    block_rows = tile_rows(rows, layout, capability(device), invariant=invariant)
    tiles = -(-rows // block_rows)
    num_pairs = num_sequences * layout.num_kv_heads * tiles
    return PartsRoom(
        block_rows=block_rows,
        tiles=tiles,
        num_slots=num_pairs * -(-num_blocks // INVARIANT_CHUNK) if invariant else 2 * num_programs(device),
        rows=rows if rows < block_rows and most_query == 1 else block_rows,  # one of two numbers, for kernels are compiled for it
        columns=int(triton.next_power_of_2(layout.value_dim)),
        num_pairs=num_pairs,
    )


class Workspace:
    """Memory of one device for parts of results, kept from launch to launch; its counters are zero between launches.

    What has become too small is kept as well, for captured graphs go on using it; sizes are powers of two, so that this is no more than
    what is used.
    """

    def __init__(self, device: torch.device) -> None:
        self._outgrown: list[torch.Tensor] = []
        self._parts, self._sums = torch.empty(0, device=device), torch.empty(0, device=device)
        self._arrived = torch.zeros(0, dtype=torch.int32, device=device)

    def take(self, room: PartsRoom) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Room for the parts, for their sums and maxima, and counters; at least as large as asked for."""
        self._parts = self._grown(self._parts, room.num_slots * room.rows * room.columns)
        self._sums = self._grown(self._sums, room.num_slots * 2 * room.rows)
        self._arrived = self._grown(self._arrived, room.num_pairs)
        return self._parts, self._sums, self._arrived

    def _grown(self, memory: torch.Tensor, size: int) -> torch.Tensor:
        """The same, or zeros."""
        if memory.numel() >= size:
            return memory
        self._outgrown.append(memory)
        return memory.new_zeros(triton.next_power_of_2(size))


@lru_cache
def workspace(device: torch.device) -> Workspace:
    return Workspace(device)


def run_decode(
    query: torch.Tensor,
    pool: torch.Tensor,
    layer: int,
    plan: DecodePlan,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    output: torch.Tensor | None = None,
    log_sums: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.paged_attention; what of it belongs to a step is in the plan. query [T, Hq, D] is contiguous."""
    layout = plan.layout
    num_heads = query.shape[1]
    output = query.new_empty(len(query), num_heads, layout.value_dim) if output is None else output
    log_sums = torch.empty(len(query), num_heads, device=query.device) if log_sums is None else log_sums
    group = num_heads // layout.num_kv_heads
    num_sequences, table_width = len(plan.context_lens), plan.block_tables.shape[-1]
    room = parts_room(num_sequences, plan.most_query, table_width, layout, num_heads, query.device, invariant=plan.invariant)
    parts, part_sums, arrived = workspace(query.device).take(room)
    numbers, scales = _at_layer(pool, layout, layer)
    stages = LATENT_STAGES if layout.is_latent else DECODE_STAGES
    decode_attention[(num_programs(query.device),)](
        query,
        numbers,
        scales,
        plan.block_tables,
        plan.context_lens,
        plan.query_starts,
        plan.starts,
        sinks,
        plan.ancestors,
        plan.tree_positions,
        parts,
        part_sums,
        arrived,
        output,
        log_sums,
        num_sequences,
        room.tiles,
        plan.block_tables.stride(0),
        plan.block_tables.stride(1) if plan.block_tables.dim() == 3 else 0,
        query.stride(0),
        numbers.stride(0),
        numbers.stride(1),
        0 if scales is None else scales.stride(0),
        0 if scales is None else scales.stride(1),
        scale,
        softcap or 0.0,
        plan.window or 0,
        GROUP=group,
        BLOCK_M=room.block_rows,
        PART_ROWS=room.rows,
        CHUNK=INVARIANT_CHUNK if plan.invariant else 1,
        INVARIANT=plan.invariant,
        HAS_WINDOW=plan.window is not None,
        HAS_TREE=plan.ancestors is not None,
        HAS_SOFTCAP=softcap is not None,
        HAS_SINKS=sinks is not None,
        STAGES=stages,
        num_stages=stages,
        maxnreg=255,
        num_warps=decode_warps(room.block_rows, layout),
        # The loops over masked blocks and over whole ones must do the same.
        enable_fp_fusion=not plan.invariant,
        ptx_options=FEW_REGISTERS if layout.is_latent and room.block_rows >= 32 else None,
        **_widths(layout),
    )
    return output, log_sums


def _at_layer(pool: torch.Tensor, layout: KVLayout, layer: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Numbers and scales [blocks, heads, tokens, …] of one layer; no scales where numbers are plain."""
    numbers = layout.numbers(pool)[:, layer]
    return numbers, None if layout.format is KVFormat.PLAIN else layout.scales(pool)[:, layer]


def _widths(layout: KVLayout) -> dict[str, int | bool]:
    """What kernels are compiled for."""
    key = layout.value_dim if layout.is_latent else layout.head_dim
    return {
        "KV_HEADS": layout.num_kv_heads,
        "KEY": key,
        "BLOCK_KEY": triton.next_power_of_2(key),
        "REST": layout.head_dim - key,
        "VALUE": layout.value_dim,
        "BLOCK_VALUE": triton.next_power_of_2(layout.value_dim),
        "BLOCK_N": layout.block_size,
        "CELL": layout.cell_numbers // (2 if layout.format is KVFormat.INT4 else 1),
        "SHARED": layout.is_latent,
        "FORMAT": layout.format.value,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillPlan:
    """Sequences with any number of new tokens; all tensors are on the device, int32.

    first_row         of the query, where these sequences begin
    rows              of a program's tile: new tokens by the query heads of a KV head
    tile_sequences    [tiles] whose tokens each has; tile_tokens [tiles]: the first of them
    lists, list_lens  [tiles, Hk, …] block ids that a tile sees whole, and how many they are; None: all before its own
    """

    first_row: int
    num_tokens: int
    rows: int
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    query_starts: torch.Tensor
    tile_sequences: torch.Tensor
    tile_tokens: torch.Tensor
    lists: torch.Tensor | None
    list_lens: torch.Tensor | None
    window: int | None
    layout: KVLayout


def plan_prefill(
    *,
    block_tables: Sequence[Sequence[int]],
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    layout: KVLayout,
    num_heads: int,
    device: torch.device,
    window: int | None = None,
    first_row: int = 0,
    block_lists: Sequence[BlockLists] | None = None,
) -> PrefillPlan:
    """Arguments as of reference.paged_attention; block_lists: one for each sequence, which exclude a window."""
    assert block_lists is None or window is None
    group = num_heads // layout.num_kv_heads
    rows = max(prefill_rows(layout, capability(device)), triton.next_power_of_2(group))
    tokens = rows // group
    tiles = []  # (blocks to visit, sequence, first token)
    for sequence, (query_len, context_len) in enumerate(zip(query_lens, context_lens, strict=True)):
        prefix_len, token = context_len - query_len, 0
        while token < query_len:
            end = min(token + tokens, query_len)
            if block_lists is not None:  # a list is that of one block of queries
                end = min(end, (prefix_len + token) // layout.block_size * layout.block_size + layout.block_size - prefix_len)
            tiles.append(((prefix_len + end) // layout.block_size, sequence, token))
            token = end
    tiles.sort(key=lambda tile: -tile[0])
    lists = list_lens = None
    if block_lists is not None:
        chosen = []
        for _, sequence, token in tiles:
            query_block = (context_lens[sequence] - query_lens[sequence] + token) // layout.block_size
            chosen.append(block_lists[sequence].before(query_block))
        list_lens = torch.tensor([[len(blocks) for blocks in heads] for heads in chosen], dtype=torch.int32)
        lists = torch.zeros(*list_lens.shape, max(1, int(list_lens.max())), dtype=torch.int32)
        for index, (_, sequence, _) in enumerate(tiles):
            for head, blocks in enumerate(chosen[index]):
                lists[index, head, : len(blocks)] = torch.tensor([block_tables[sequence][block] for block in blocks])
        lists, list_lens = lists.to(device), list_lens.to(device)
    return PrefillPlan(
        first_row=first_row,
        num_tokens=sum(query_lens),
        rows=rows,
        block_tables=padded(block_tables).to(device),
        context_lens=torch.tensor(context_lens, dtype=torch.int32).to(device),
        query_starts=torch.tensor([0, *query_lens]).cumsum(0).to(device, torch.int32),
        tile_sequences=torch.tensor([tile[1] for tile in tiles], dtype=torch.int32).to(device),
        tile_tokens=torch.tensor([tile[2] for tile in tiles], dtype=torch.int32).to(device),
        lists=lists,
        list_lens=list_lens,
        window=window,
        layout=layout,
    )


def run_prefill(
    query: torch.Tensor,
    pool: torch.Tensor,
    layer: int,
    plan: PrefillPlan,
    *,
    scale: float,
    output: torch.Tensor,
    log_sums: torch.Tensor,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """See reference.paged_attention; query [T, Hq, D], output [T, Hq, Dv] and log_sums [T, Hq] are of the plan's sequences."""
    layout = plan.layout
    numbers, scales = _at_layer(pool, layout, layer)
    lists, list_lens = plan.lists, plan.list_lens
    prefill_attention[(layout.num_kv_heads, len(plan.tile_tokens))](
        query,
        numbers,
        scales,
        plan.block_tables,
        plan.tile_sequences,
        plan.tile_tokens,
        plan.context_lens,
        plan.query_starts,
        lists,
        list_lens,
        sinks,
        output,
        log_sums,
        plan.block_tables.stride(0),
        0 if lists is None else lists.stride(0),
        0 if lists is None else lists.stride(1),
        0 if list_lens is None else list_lens.stride(0),
        query.stride(0),
        numbers.stride(0),
        numbers.stride(1),
        0 if scales is None else scales.stride(0),
        0 if scales is None else scales.stride(1),
        scale,
        softcap or 0.0,
        plan.window or 0,
        GROUP=query.shape[1] // layout.num_kv_heads,
        BLOCK_M=plan.rows,
        HAS_WINDOW=plan.window is not None,
        HAS_LISTS=lists is not None,
        HAS_SOFTCAP=softcap is not None,
        HAS_SINKS=sinks is not None,
        STAGES=PREFILL_STAGES,
        num_stages=PREFILL_STAGES,
        num_warps=8,
        **_widths(layout),
    )
