"""Where sampling noise comes from: which Philox stream belongs to a request's choice at a position.

The noise of a token is a function of (seed, position, token id) alone. Token `t` at position `p` of a sequence with seed `s` reads
word `t % 4` of Philox4x32-10 with key (s low, s high) and counter (t // 4, p, 0, 0): one Philox call serves four neighbouring tokens.
`position` is the index of the sampled token in its sequence, prompt included, so that a request that moves or restarts meets the
same noise again. Standard library only: `philox` here is the specification for the vectorized ones (kernels/).
Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Random123).
"""

import secrets
from hashlib import blake2b

MASK = 0xFFFFFFFF
PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
WORDS_PER_CALL = 4
MAX_SEED = 2**64 - 1


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10: four 32-bit words from a 128-bit counter under a 64-bit key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        product0, product1 = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (product1 >> 32) ^ c1 ^ k0, product1 & MASK, (product0 >> 32) ^ c3 ^ k1, product0 & MASK
        k0, k1 = (k0 + PHILOX_WEYL[0]) & MASK, (k1 + PHILOX_WEYL[1]) & MASK
    return c0, c1, c2, c3


def draw_seed() -> int:
    """A fresh 64-bit seed for a request that brought none."""
    return secrets.randbits(64)


def choice_seed(seed: int, choice: int) -> int:
    """The seed of choice `choice` of n: choice 0 keeps the request's own, so that it equals the same request with n = 1."""
    if choice == 0:
        return seed
    digest = blake2b(seed.to_bytes(8, "little") + choice.to_bytes(8, "little"), digest_size=8, person=b"baton.choice")
    return int.from_bytes(digest.digest(), "little")
