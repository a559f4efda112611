"""Runs `baton generate` on an engine in this process: loads the checkpoint, streams the text, says how fast it was."""

import asyncio
import sys
from pathlib import Path

from services.cli.printer import ChoicePrinter, Speed
from services.cli.sampling import SamplingOptions
from services.core.types import MAX_CHOICES, SamplingParams
from services.engine.demo import TARGET_DIR
from services.engine.engine import Engine
from services.engine.loader import LoadedModel, load_model
from services.engine.sequence import EngineRequest
from services.engine.settings import EngineSettings
from services.tokenizer.tokenizer import Tokenizer


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
        directory = model or TARGET_DIR
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
        detokenizers = [self._tokenizer.detokenizer() for _ in range(sampling.n)]
        printer = ChoicePrinter(sampling.n)
        speed = Speed()
        async with Engine(self._loaded.core, max_num_requests=1) as engine:
            request = EngineRequest(request_id="generate", prompt_token_ids=prompt_ids, sampling=sampling)
            engine.submit(request)
            try:
                async for event in engine.stream(request.request_id):
                    new_ids = [] if event.token_id is None else [event.token_id]
                    speed.saw(len(new_ids))
                    text = detokenizers[event.choice].push(new_ids)
                    if event.finish_reason is not None:
                        text += detokenizers[event.choice].finish()
                    printer.show(event.choice, text, event.finish_reason.value if event.finish_reason else None)
            finally:
                # On Ctrl-C too: whoever interrupts wants to know what was made so far, and its seed.
                printer.close()
                words = f"{len(prompt_ids)} prompt tokens, {speed.summary()}, seed {sampling.seed}"
                print(f"[{self._model_name}, {str(self._loaded.dtype).removeprefix('torch.')}: {words}]", file=sys.stderr)
