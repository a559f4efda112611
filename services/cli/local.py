"""Runs `baton generate` on an engine in this process: loads the checkpoint, streams the text, says how fast it was."""

import asyncio
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from services.core.noise import draw_seed
from services.core.types import MAX_CHOICES, SamplingParams, TokenEvent
from services.engine.engine import Engine
from services.engine.loader import LoadedModel, demo_model_dir, load_model
from services.engine.model_config import GenerationDefaults
from services.engine.sequence import EngineRequest
from services.engine.settings import EngineSettings
from services.tokenizer.detokenizer import Detokenizer
from services.tokenizer.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """What the command line says of SamplingParams; None where it is silent and the checkpoint may speak."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    frequency_penalty: float
    presence_penalty: float
    repetition_penalty: float | None
    seed: int | None
    n: int
    min_tokens: int
    max_tokens: int | None
    ignore_eos: bool
    stop_token_ids: tuple[int, ...]

    def resolve(self, defaults: GenerationDefaults, *, room: int) -> SamplingParams:
        """The option, else the checkpoint's default, else OpenAI's; `room` tokens are left in the model's context."""
        return SamplingParams(
            temperature=_first(self.temperature, defaults.temperature, 1.0),
            top_k=int(_first(self.top_k, defaults.top_k, 0)),
            top_p=_first(self.top_p, defaults.top_p, 1.0),
            min_p=_first(self.min_p, defaults.min_p, 0.0),
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            repetition_penalty=_first(self.repetition_penalty, defaults.repetition_penalty, 1.0),
            seed=draw_seed() if self.seed is None else self.seed,
            n=self.n,
            min_tokens=self.min_tokens,
            max_tokens=max(1, min(DEFAULT_MAX_TOKENS, room)) if self.max_tokens is None else self.max_tokens,
            ignore_eos=self.ignore_eos,
            stop_token_ids=self.stop_token_ids,
        )


class LocalGeneration:
    """A loaded checkpoint (default: the demo model). Raises CheckpointError and InvalidRequest as the parts do."""

    def __init__(
        self,
        *,
        model: Path | None,
        served_model_name: str | None,
        dtype: str,
        max_model_len: int | None,
        num_threads: int,
        num_choices: int,
    ) -> None:
        directory = model or demo_model_dir()
        # A pool for one request, not for a server's: its memory is cleared at the start.
        settings = EngineSettings(
            dtype=dtype, max_model_len=max_model_len, num_threads=num_threads, max_num_seqs=min(max(num_choices, 1), MAX_CHOICES)
        )
        self._loaded: LoadedModel = load_model(directory, settings)
        self._tokenizer = Tokenizer.from_checkpoint(directory)
        self._model_name = served_model_name or directory.resolve().name

    def run(self, *, text: str | None, token_ids: list[int] | None, chat: bool, options: SamplingOptions) -> None:
        """Generates from `text`, or from `token_ids` where there is no text; returns when all choices have ended."""
        if text is not None and chat:
            text = self._tokenizer.apply_chat_template([{"role": "user", "content": text}])
        prompt_ids = token_ids or [] if text is None else self._tokenizer.encode(text, add_special_tokens=not chat)
        sampling = options.resolve(self._loaded.generation, room=self._loaded.core.max_model_len - len(prompt_ids))
        asyncio.run(self._stream(prompt_ids, sampling))

    async def _stream(self, prompt_ids: list[int], sampling: SamplingParams) -> None:
        printer = _Printer(self._tokenizer, sampling.n)
        speed = _Speed()
        async with Engine(self._loaded.core, max_num_requests=1) as engine:
            request = EngineRequest(request_id="generate", prompt_token_ids=prompt_ids, sampling=sampling)
            engine.submit(request)
            try:
                async for event in engine.stream(request.request_id):
                    speed.saw(event)
                    printer.show(event)
            finally:
                # On Ctrl-C too: whoever interrupts wants to know what was made so far, and its seed.
                printer.close()
                words = f"{len(prompt_ids)} prompt tokens, {speed.summary()}, seed {sampling.seed}"
                print(f"[{self._model_name}, {str(self._loaded.dtype).removeprefix('torch.')}: {words}]", file=sys.stderr)


class _Printer:
    """Text of one choice as it comes; of several choices one after another, each when it is complete."""

    def __init__(self, tokenizer: Tokenizer, num_choices: int) -> None:
        self._detokenizers: list[Detokenizer] = [tokenizer.detokenizer() for _ in range(num_choices)]
        self._texts = [""] * num_choices
        self._ended = False

    def show(self, event: TokenEvent) -> None:
        detokenizer = self._detokenizers[event.choice]
        text = detokenizer.push([event.token_id]) if event.token_id is not None else ""
        if event.finish_reason is not None:
            text += detokenizer.finish()
        if len(self._texts) == 1:
            _write(text)
            return
        self._texts[event.choice] += text
        if event.finish_reason is not None:
            _write(f"── choice {event.choice} ({event.finish_reason.value})\n{self._texts[event.choice]}\n")

    def close(self) -> None:
        if len(self._texts) == 1:
            _write("\n")


class _Speed:
    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._first_token_s: float | None = None
        self._last_token_s = 0.0
        self._num_tokens = 0

    def saw(self, event: TokenEvent) -> None:
        self._last_token_s = time.perf_counter() - self._started
        if self._first_token_s is None:
            self._first_token_s = self._last_token_s
        self._num_tokens += event.token_id is not None

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


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)
