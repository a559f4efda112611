"""How generated text gets to the terminal, and how fast it came. Knows neither engines nor the mesh."""

import sys
import time


class ChoicePrinter:
    """Text of one choice as it comes; of several choices one after another, each when it is complete."""

    def __init__(self, num_choices: int) -> None:
        self._texts = [""] * num_choices

    def show(self, choice: int, text: str, finish_reason: str | None) -> None:
        """Takes the next piece of a choice; `finish_reason` with its last one."""
        if len(self._texts) == 1:
            _write(text)
            return
        self._texts[choice] += text
        if finish_reason is not None:
            _write(f"── choice {choice} ({finish_reason})\n{self._texts[choice]}\n")

    def close(self) -> None:
        """Ends the line of a single choice, which ends where its text does."""
        if len(self._texts) == 1:
            _write("\n")


class Speed:
    """Counts tokens against the clock, from its making on."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._first_token_s: float | None = None
        self._last_token_s = 0.0
        self._num_tokens = 0

    @property
    def has_begun(self) -> bool:
        return self._first_token_s is not None

    def saw(self, num_tokens: int) -> None:
        """Tokens that came just now, for any choice; 0 for an end without one."""
        self._last_token_s = time.perf_counter() - self._started
        if self._first_token_s is None:
            self._first_token_s = self._last_token_s
        self._num_tokens += num_tokens

    def summary(self) -> str:
        if self._first_token_s is None:
            return "no token yet"
        words = f"{self._num_tokens} new in {self._last_token_s:.2f} s, TTFT {self._first_token_s * 1e3:.0f} ms"
        if self._num_tokens > 1:
            decode_s = max(self._last_token_s - self._first_token_s, 1e-9)
            words += f", {(self._num_tokens - 1) / decode_s:.0f} tokens/s after it"
        return words


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
