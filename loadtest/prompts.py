"""Which tokens the blocks of a schedule stand for: the same ones wherever and whenever a request is sent.

Token i of block b is a hash of (seed, b, i), so that any process makes any prompt on its own, prompts with equal leading ids share exactly
those tokens, and a block that is partly filled is the beginning of the same block filled. Blocks with different ids begin with different
tokens but for one pair in a vocabulary's size, and no two are equal.
Source: SplitMix64's mixing function (Steele, Lea and Flood 2014), over counters.
"""

import numpy as np
import numpy.typing as npt

from loadtest.files import BadInput
from loadtest.schedule import PlannedRequest

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def token_ids(request: PlannedRequest, *, block_size: int, seed: int, vocab_size: int, first_id: int = 0) -> npt.NDArray[np.uint32]:
    """A request's prompt, [input_tokens]. One that is a text has none: the text is what is sent.

    block_size   of the schedule
    vocab_size   of the model
    first_id     ids below it are left out: that is where vocabularies have their special tokens
    Raises BadInput when no two ids are left.
    """
    assert not request.text
    if vocab_size - first_id < 2:
        raise BadInput(f"a vocabulary of {vocab_size} tokens has no two from {first_id} on to make prompts of")
    runs = [np.arange(first, first + count, dtype=np.uint64) for first, count in request.block_runs]
    blocks = _mixed(np.concatenate(runs) * _GOLDEN + _mixed(np.array([seed % 2**64], dtype=np.uint64)))
    positions = np.arange(1, block_size + 1, dtype=np.uint64) * _GOLDEN
    hashes = _mixed(blocks[:, None] + positions[None, :]).reshape(-1)[: request.input_tokens]  # [B, block_size] → [input_tokens]
    # The upper half as a fraction of the range: cheaper than a remainder, and as even.
    fractions = ((hashes >> np.uint64(32)) * np.uint64(vocab_size - first_id)) >> np.uint64(32)
    return (fractions + np.uint64(first_id)).astype(np.uint32)


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Each value's bits spread over all of it, one to one; arithmetic is modulo 2^64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
