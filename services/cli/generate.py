"""`baton generate`: the options, and from them a request to a mesh, or to an engine in this process."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from services.cli.remote import DEFAULT_ROUTER, RemoteGeneration, Router, make_prompt, run_remote
from services.cli.sampling import SamplingOptions
from services.core.errors import InvalidRequest

MAX_TIMEOUT_S = 1e9


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; '-' reads it from standard input.")] = None,
    router: Router = DEFAULT_ROUTER,
    local: Annotated[bool, typer.Option("--local", help="Run the engine in this process instead.")] = False,
    token_ids: Annotated[str | None, typer.Option(help="The prompt as comma-separated token ids, instead of text.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Name of the model to ask for; with --local its directory, by default the demo model.")
    ] = None,
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
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends a choice and is not shown; may be given several times.")] = None,
    cache_salt: Annotated[str | None, typer.Option(help="Share cached prefixes only with requests of the same salt.")] = None,
    timing: Annotated[bool, typer.Option("--timing", help="Print where the time went.")] = False,
    timeout: Annotated[float | None, typer.Option(help="Seconds until the request is given up; default: none.")] = None,
    served_model_name: Annotated[str | None, typer.Option(help="--local: what the model is called; default: its directory's name.")] = None,
    dtype: Annotated[str | None, typer.Option(help="--local: auto, float32, bfloat16 or float16: of activations, keys and values.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="--local: longest sequence in tokens; default: the checkpoint's.")] = None,
    threads: Annotated[int | None, typer.Option(help="--local: threads of torch; default: 1.")] = None,
) -> None:
    """Generates text from a prompt."""
    if (prompt is None) == (token_ids is None):
        raise InvalidRequest("prompt", "give either a text or --token-ids")
    if chat and token_ids is not None:
        raise InvalidRequest("--chat", "does not work with --token-ids: a template takes text")
    ids = None if token_ids is None else _parse_token_ids(token_ids)
    options = SamplingOptions(
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
    )
    if not local:
        _refuse("works with --local only", served_model_name=served_model_name, dtype=dtype, max_model_len=max_model_len, threads=threads)
        # The library counts a deadline further away than 64 bits of nanoseconds as one that has passed.
        if timeout is not None and not 0 < timeout <= MAX_TIMEOUT_S:
            raise InvalidRequest("--timeout", f"{timeout} is outside (0, {MAX_TIMEOUT_S:.0f}] s", limit=MAX_TIMEOUT_S)
        run_remote(
            RemoteGeneration(
                router=router,
                model=model or "",
                prompt=make_prompt(text=_text(prompt), token_ids=ids, chat=chat),
                options=options,
                stop=tuple(stop or ()),
                cache_salt=cache_salt or "",
                timeout_s=timeout,
                with_timeline=timing,
            )
        )
        return
    _refuse("does not work with --local", stop=stop, cache_salt=cache_salt, timing=timing or None, timeout=timeout)
    # Imported only now: torch takes seconds, which `baton --help` and a mistyped option should not.
    from services.cli.local import LocalGeneration

    LocalGeneration(
        model=None if model is None else Path(model),
        served_model_name=served_model_name,
        dtype=dtype or "auto",
        max_model_len=max_model_len,
        num_threads=1 if threads is None else threads,
        num_choices=n,
    ).run(text=_text(prompt), token_ids=ids, chat=chat, options=options)


def _text(prompt: str | None) -> str | None:
    return sys.stdin.read() if prompt == "-" else prompt


def _refuse(why: str, **options: object) -> None:
    """Raises InvalidRequest for the first option that was given: ignoring it would mislead."""
    for name, value in options.items():
        if value is not None:
            raise InvalidRequest(f"--{name.replace('_', '-')}", why)


def _parse_token_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InvalidRequest("--token-ids", f"{text!r} is not a list of integers") from None
