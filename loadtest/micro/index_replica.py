"""A router's replica in a process of its own, for `micro index`: `python -m loadtest.micro.index_replica ADDRESS`.

Says "synchronized", follows the index until its input ends, then prints how long the blocks of worker "stamped" were on their way, in
nanoseconds: their hashes begin with the time.monotonic_ns() at which they were published, which processes of one machine share.
"""

import asyncio
import json
import sys
import time
from collections.abc import Iterable

from services.core.prefix_index import PrefixIndex
from services.mesh.index_client import IndexReplica

STAMPED = "stamped"


class _StampedIndex(PrefixIndex):
    """Looks at the clock when an event has been applied."""

    def __init__(self) -> None:
        super().__init__()
        self.delays_ns: list[int] = []

    def apply(self, worker_id: str, *, epoch: int, sequence_number: int, stored: Iterable[bytes], removed: Iterable[bytes]) -> bool:
        applied = super().apply(worker_id, epoch=epoch, sequence_number=sequence_number, stored=stored, removed=removed)
        if worker_id == STAMPED:
            now = time.monotonic_ns()
            self.delays_ns.extend(now - int.from_bytes(block_hash[:8], "big") for block_hash in stored)
        return applied


async def _follow(address: str) -> list[int]:
    replica = IndexReplica([address])
    replica.index = index = _StampedIndex()
    async with replica:
        await replica.wait_synchronized()
        print("synchronized", flush=True)
        await asyncio.to_thread(sys.stdin.read)
    return index.delays_ns


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_follow(sys.argv[1]))))
