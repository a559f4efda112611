"""Philox4x32-10 as the paper prints it (Salmon et al. 2011), in NumPy: what both noise and sampler are held to."""

import numpy as np
import numpy.typing as npt


def numpy_words(seed: int, position: int, num_calls: int) -> npt.NDArray[np.uint64]:
    """Words [4 * num_calls] of one stream, in unsigned 64-bit arithmetic."""
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    calls = np.arange(num_calls, dtype=np.uint64)
    counter = [calls, np.full_like(calls, position), np.zeros_like(calls), np.zeros_like(calls)]
    key = [seed % 2**32, seed // 2**32]
    for _ in range(10):
        first, third = counter[0] * np.uint64(0xD2511F53), counter[2] * np.uint64(0xCD9E8D57)
        counter = [
            (third >> shift) ^ counter[1] ^ np.uint64(key[0]),
            third & low,
            (first >> shift) ^ counter[3] ^ np.uint64(key[1]),
            first & low,
        ]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return np.stack(counter, axis=1).reshape(-1)
