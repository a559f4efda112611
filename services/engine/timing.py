"""Measures one prompt's way to its first token. Told the time by the engine core; looks at no clock itself."""

from services.core.types import PrefillTiming


class PrefillWatch:
    """Runs from when a prompt could be computed here; chunks are added as they are computed."""

    def __init__(self, queued_at: float) -> None:
        self.queued_at = queued_at
        self._started_at: float | None = None
        self._model_s = 0.0

    def add_chunk(self, step_started_at: float, model_s: float) -> None:
        """A step computed a part of the prompt, and this much of its time in the model was for it."""
        if self._started_at is None:
            self._started_at = step_started_at
        self._model_s += model_s

    def timing(self, sampled_at: float) -> PrefillTiming:
        assert self._started_at is not None
        return PrefillTiming(
            queue_s=self._started_at - self.queued_at,
            prefill_s=sampled_at - self._started_at,
            model_s=self._model_s,
            sampled_at=sampled_at,
        )
