"""`baton generate`: one prompt, its text streamed to the terminal as it is made, its speed on stderr."""

import asyncio
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from services.core.errors import InvalidRequest
from services.core.noise import draw_seed
from services.core.types import SamplingParams, TokenEvent
from services.engine.engine import Engine
from services.engine.loader import LoadedModel, demo_model_dir, load_model
from services.engine.sequence import EngineRequest
from services.engine.settings import EngineSettings
from services.tokenizer.detokenizer import Detokenizer
from services.tokenizer.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 128


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; '-' reads it from standard input.")] = None,
    local: Annotated[bool, typer.Option("--local", help="Run the engine in this process.")] = False,
    token_ids: Annotated[str | None, typer.Option(help="The prompt as comma-separated token ids, instead of text.")] = None,
    model: Annotated[Path | None, typer.Option(help="Checkpoint directory; default: the demo model.")] = None,
    served_model_name: Annotated[str | None, typer.Option(help="What the model is called; default: its directory's name.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16: of activations, keys and values.")] = "auto",
    max_model_len: Annotated[int | None, typer.Option(help="Longest sequence in tokens; default: the checkpoint's.")] = None,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt as a user's message in the chat template.")] = False,
    max_tokens: Annotated[int | None, typer.Option(help=f"New tokens at most; default: {DEFAULT_MAX_TOKENS} or what fits.")] = None,
    min_tokens: Annotated[int, typer.Option(help="New tokens at least.")] = 0,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; default: the checkpoint's, else 1.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k best tokens; 0 keeps all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the best tokens up to this mass.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Keep tokens at least this probable, relative to the best.")] = None,
    frequency_penalty: Annotated[float, typer.Option()] = 0.0,
    presence_penalty: Annotated[float, typer.Option()] = 0.0,
    repetition_penalty: Annotated[float | None, typer.Option()] = None,
    seed: Annotated[int | None, typer.Option(help="Repeats a run exactly; default: a new one, printed at the end.")] = None,
    n: Annotated[int, typer.Option("--n", help="Choices.")] = 1,
    stop_token_id: Annotated[list[int] | None, typer.Option(help="Ends a choice; may be given several times.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the model's end token.")] = False,
) -> None:
    """Generates text from a prompt."""
    if not local:
        raise InvalidRequest("--local", "is needed: this version runs the engine in process only")
    if (prompt is None) == (token_ids is None):
        raise InvalidRequest("prompt", "give either a text or --token-ids")
    directory = model or demo_model_dir()
    loaded = load_model(directory, EngineSettings(dtype=dtype, max_model_len=max_model_len, num_threads=threads))
    tokenizer = Tokenizer.from_checkpoint(directory)
    if token_ids is not None:
        prompt_ids = _parse_token_ids(token_ids)
    else:
        text = sys.stdin.read() if prompt == "-" else prompt or ""
        if chat:
            text = tokenizer.apply_chat_template([{"role": "user", "content": text}])
        prompt_ids = tokenizer.encode(text, add_special_tokens=not chat)
    defaults = loaded.generation
    room = loaded.core.max_model_len - len(prompt_ids)
    sampling = SamplingParams(
        temperature=_first(temperature, defaults.temperature, 1.0),
        top_k=int(_first(top_k, defaults.top_k, 0)),
        top_p=_first(top_p, defaults.top_p, 1.0),
        min_p=_first(min_p, defaults.min_p, 0.0),
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
        repetition_penalty=_first(repetition_penalty, defaults.repetition_penalty, 1.0),
        seed=draw_seed() if seed is None else seed,
        n=n,
        min_tokens=min_tokens,
        max_tokens=max(1, min(DEFAULT_MAX_TOKENS, room)) if max_tokens is None else max_tokens,
        ignore_eos=ignore_eos,
        stop_token_ids=tuple(stop_token_id or ()),
    )
    asyncio.run(_stream_local(loaded, tokenizer, prompt_ids, sampling, served_model_name or directory.resolve().name))


async def _stream_local(
    loaded: LoadedModel, tokenizer: Tokenizer, prompt_ids: list[int], sampling: SamplingParams, model_name: str
) -> None:
    printer = _Printer(tokenizer, sampling.n)
    speed = _Speed()
    async with Engine(loaded.core, max_num_requests=1) as engine:
        request = EngineRequest(request_id="generate", prompt_token_ids=prompt_ids, sampling=sampling)
        engine.submit(request)
        try:
            async for event in engine.stream(request.request_id):
                speed.saw(event)
                printer.show(event)
        finally:
            # On Ctrl-C too: whoever interrupts wants to know what was made so far, and its seed.
            printer.close()
            dtype = str(loaded.dtype).removeprefix("torch.")
            print(f"[{model_name}, {dtype}: {len(prompt_ids)} prompt tokens, {speed.summary()}, seed {sampling.seed}]", file=sys.stderr)


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


def _parse_token_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InvalidRequest("--token-ids", f"{text!r} is not a list of integers") from None
