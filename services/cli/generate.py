"""`baton generate`: the options, and from them a request."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from services.core.errors import InvalidRequest


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
    max_tokens: Annotated[int | None, typer.Option(help="New tokens at most; default: 128, or what fits.")] = None,
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
    # Imported only now: torch takes seconds, which `baton --help` and a mistyped option should not.
    from services.cli.local import LocalGeneration, SamplingOptions

    LocalGeneration(
        model=model,
        served_model_name=served_model_name,
        dtype=dtype,
        max_model_len=max_model_len,
        num_threads=threads,
        num_choices=n,
    ).run(
        text=sys.stdin.read() if prompt == "-" else prompt,
        token_ids=None if token_ids is None else _parse_token_ids(token_ids),
        chat=chat,
        options=SamplingOptions(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            frequency_penalty=frequency_penalty,
            presence_penalty=presence_penalty,
            repetition_penalty=repetition_penalty,
            seed=seed,
            n=n,
            min_tokens=min_tokens,
            max_tokens=max_tokens,
            ignore_eos=ignore_eos,
            stop_token_ids=tuple(stop_token_id or ()),
        ),
    )


def _parse_token_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InvalidRequest("--token-ids", f"{text!r} is not a list of integers") from None
