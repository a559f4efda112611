"""Chained content hashes of KV blocks: equal hashes mean equal tokens from the start, the same tenant and the same model.

A block's hash covers its parent's hash and its own tokens, so one look-up answers for the whole prefix before it.
Keyed BLAKE2b of 128 bits: tenants (salts) and models (fingerprints) never share a hash, and nobody without the key can compute one.
Knows nothing of pools, workers or text. Source: BLAKE2 (RFC 7693); hash chains as in vLLM's automatic prefix caching.
"""

import sys
from array import array
from collections.abc import Iterable
from hashlib import blake2b

HASH_BYTES = 16
KEY_BYTES = 32
TOKEN_BYTES = 4
ROOT = bytes(HASH_BYTES)  # the parent of a first block


def prefix_key(*, model_fingerprint: bytes, salt: bytes = b"") -> bytes:
    """The 32-byte hash key of one model and one tenant; lengths are hashed too, so that no two pairs run together."""
    digest = blake2b(digest_size=KEY_BYTES, person=b"baton.prefix")
    for part in (model_fingerprint, salt):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def pack_tokens(token_ids: Iterable[int]) -> bytes:
    """Token ids as packed little-endian uint32, the form in which they are hashed and travel.

    Raises OverflowError for an id outside 0 … 2**32 - 1.
    """
    packed = array("I", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def block_hash(key: bytes, parent: bytes, block_tokens: bytes | memoryview) -> bytes:
    """The hash of one full block: `parent` is the hash of the block before it (ROOT for the first)."""
    digest = blake2b(parent, digest_size=HASH_BYTES, key=key)
    digest.update(block_tokens)
    return digest.digest()


def chain_hashes(key: bytes, tokens: bytes | memoryview, block_size: int, *, parent: bytes = ROOT) -> list[bytes]:
    """The hashes of all full blocks of `tokens` (packed uint32), in order; a partly filled last block has none."""
    step = block_size * TOKEN_BYTES
    view = memoryview(tokens)
    hashes = []
    for start in range(0, len(view) - step + 1, step):
        parent = block_hash(key, parent, view[start : start + step])
        hashes.append(parent)
    return hashes
