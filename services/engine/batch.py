"""One engine step as plain arrays: which tokens are computed, where their keys and values go, which rows are sampled.

Made by the scheduler's side, read by the model's side. Knows nothing of queues or requests; everything in it could be sent to another rank.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupBatch:
    """Where the keys and values of S sequences with T new tokens are in one KV group.

    slots          [T] int64, block_id * block_size + offset: the cell each token's K and V go to
    block_tables   S lists of block ids, without leading blocks that lie outside of every new token's window
    context_lens   S entries: tokens of each sequence in those blocks, the new ones included
    """

    slots: npt.NDArray[np.int64]
    block_tables: list[list[int]]
    context_lens: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """T new tokens of S sequences; sequences with one new token come first.

    token_ids      [T] int64
    positions      [T] int64, index within the sequence
    query_lens     S entries that sum to T
    groups         one for each KV group of the model
    logit_rows     [R] int64 rows of the T tokens whose logits are wanted
    """

    token_ids: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    query_lens: list[int]
    groups: list[GroupBatch]
    logit_rows: npt.NDArray[np.int64]
