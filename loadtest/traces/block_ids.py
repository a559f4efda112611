"""Numbers for content blocks: a reader takes them one after another, so that nothing is shared but what it means to share."""


class BlockIds:
    """Hands out ids that nobody has yet, from 0."""

    def __init__(self) -> None:
        self._next = 0

    def take(self, count: int) -> tuple[int, int]:
        """So many new ones in a row, as a run: (first, count)."""
        first, self._next = self._next, self._next + count
        return first, count

    def take_for(self, num_tokens: int, block_size: int) -> tuple[int, int]:
        """As many as a text of so many tokens has blocks; the last may be partly filled."""
        return self.take(-(-num_tokens // block_size))
