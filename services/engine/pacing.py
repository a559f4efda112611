"""How many prompt tokens a step takes: as many as an operator allows, but no more than keep a step short.

A cancel takes effect between steps, and must within a second. Told how long steps take; looks at no clock itself.
"""

# Prompts are cut into smaller chunks when a step takes longer than this.
LONG_STEP_S = 0.5


class ChunkPacer:
    """`chunk_tokens` is what the next step may take: between a block (or `most`, if that is less) and `most`."""

    def __init__(self, *, block_size: int, most: int) -> None:
        self._least = min(block_size, most)
        self._most = most
        self.chunk_tokens = most

    def calibrate(self, num_tokens: int, seconds: float) -> None:
        """Begins with what a step affords if so many prompt tokens take so long."""
        affordable = int(LONG_STEP_S * num_tokens / max(seconds, 1e-6))
        self.chunk_tokens = min(max(affordable, self._least), self._most)

    def took(self, seconds: float) -> None:
        """A step with prompt tokens took so long."""
        if seconds > LONG_STEP_S:
            self.chunk_tokens = max(self.chunk_tokens // 2, self._least)
        elif seconds < LONG_STEP_S / 4:
            self.chunk_tokens = min(self.chunk_tokens * 2, self._most)
