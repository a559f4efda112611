"""`baton generate` against a gRPC server whose answers are known: what it asks for, what it shows, how it ends."""

import asyncio
import os
import signal
import socket

import pytest

from protos.baton.v1 import inference_pb2
from services.cli.remote import RouterClient, make_prompt
from services.core.errors import InvalidRequest, Overloaded, PeerUnavailable, UnknownModel
from services.mesh.convert import unpack_u32
from tests.unit.cli.scripted_router import Finished, ScriptedRouter, baton, last, piece, serving, start_baton

ANSWER = (
    piece("def ", 11),
    piece("f():", 12, 13),
    piece("", 14, finish="length"),
    last(prompt_tokens=9, completion_tokens=4, cached_tokens=8),
)


async def ask(router: ScriptedRouter, *arguments: str) -> Finished:
    async with serving(router) as server:
        return await baton("generate", "--router", server.address, *arguments)


def test_generate_when_a_router_answers_streams_text_and_tells_speed_path_and_seed() -> None:
    router = ScriptedRouter(ANSWER)
    result = asyncio.run(ask(router, "the prompt", "--max-tokens", "4"))
    assert (result.status, result.out) == (0, "def f():\n")
    assert result.err.startswith("[4 new in ") and result.err.count("\n") == 1
    assert result.err.endswith(", 8 of 9 prompt tokens cached, prefill-1 → decode-0, 3 KV blocks over shm, seed 42]\n")
    [request] = router.requests
    assert request.prompt.text == "the prompt" and request.include_timing and request.model == ""
    # Nothing was said about these: the checkpoint's defaults are the mesh's to know.
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "logprobs"):
        assert not request.sampling.HasField(name)
    assert router.deadlines == [None]


def test_generate_when_options_are_given_sends_all_of_them() -> None:
    router = ScriptedRouter(ANSWER)
    options = "--temperature 0.5 --top-k 7 --top-p 0.9 --min-p 0.1 --frequency-penalty 0.2 --presence-penalty -0.3 --repetition-penalty 1.1"
    options += " --seed 18446744073709551615 --n 2 --min-tokens 1 --max-tokens 5 --ignore-eos --stop-token-id 5 --stop-token-id 6"
    options += " --stop A --stop B --cache-salt salt --model demo --timeout 30"
    assert asyncio.run(ask(router, "x", *options.split())).status == 0
    [request] = router.requests
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.5, 7, 0.9, 0.1)
    assert (sampling.frequency_penalty, sampling.presence_penalty, sampling.repetition_penalty) == (0.2, -0.3, 1.1)
    assert (sampling.seed, sampling.n, sampling.min_tokens, sampling.max_tokens, sampling.ignore_eos) == (2**64 - 1, 2, 1, 5, True)
    assert (list(sampling.stop_token_ids), list(request.stop)) == ([5, 6], ["A", "B"])
    assert (request.cache_salt, request.model) == ("salt", "demo")
    [remaining_s] = router.deadlines
    # gRPC rounds a deadline's header up, this one to the next tenth of a second.
    assert remaining_s is not None and 0 < remaining_s <= 30.1


@pytest.mark.parametrize(("max_model_len", "expected"), [(4096, 128), (103, 100), (3, 1)])
def test_generate_when_nobody_says_how_many_tokens_asks_for_what_fits(max_model_len: int, expected: int) -> None:
    router = ScriptedRouter(ANSWER, prompt_tokens=3, max_model_len=max_model_len)
    assert asyncio.run(ask(router, "the prompt")).status == 0
    tokenize, request = router.requests
    assert tokenize.text == "the prompt" and request.sampling.max_tokens == expected


def test_generate_when_the_prompt_is_token_ids_asks_the_model_list_how_many_fit() -> None:
    router = ScriptedRouter(ANSWER, max_model_len=20)
    assert asyncio.run(ask(router, "--token-ids", "1,2,65536")).status == 0
    assert isinstance(router.requests[0], inference_pb2.ListModelsRequest)
    assert unpack_u32(router.requests[1].prompt.token_ids.packed) == [1, 2, 65536]
    assert router.requests[1].sampling.max_tokens == 17


def test_generate_when_it_is_a_chat_sends_a_message_of_the_user() -> None:
    router = ScriptedRouter(ANSWER)
    assert asyncio.run(ask(router, "Why?", "--chat")).status == 0
    for asked in (router.requests[0].chat, router.requests[1].prompt.chat):
        assert [(message.role, message.content) for message in asked.messages] == [("user", "Why?")]


def test_generate_when_choices_interleave_prints_each_when_it_is_complete() -> None:
    pieces = (
        piece("a", 1, choice=0),
        piece("x", 2, choice=1),
        piece("y", 3, choice=1, finish="stop"),
        piece("b", 4, choice=0, finish="length"),
    )
    result = asyncio.run(ask(ScriptedRouter((*pieces, last())), "x", "--n", "2", "--max-tokens", "2"))
    assert result.out == "── choice 1 (stop)\nxy\n── choice 0 (length)\nab\n"


def test_generate_when_timing_is_wanted_prints_the_timeline_after_the_text() -> None:
    result = asyncio.run(ask(ScriptedRouter(ANSWER), "x", "--max-tokens", "4", "--timing"))
    assert result.out == "def f():\n"
    lines = result.err.splitlines()
    assert lines[1] == "r1 · router-0 → prefill-1 → decode-0 · seed 42"
    assert any(line.startswith("KV moved") and "3 blocks, 3.0 kB, shm" in line for line in lines)


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (InvalidRequest("max_tokens", "5000 is more than 4096", limit=4096), 2, "error: max_tokens: 5000 is more than 4096\n"),
        (Overloaded("no worker would be in time"), 1, "error: no worker would be in time; try again in 1 s\n"),
        (UnknownModel("model 'x' is not served here"), 1, "error: model 'x' is not served here\n"),
    ],
)
def test_generate_when_the_mesh_refuses_says_why_in_one_line(error: InvalidRequest, status: int, words: str) -> None:
    result = asyncio.run(ask(ScriptedRouter((error,)), "x", "--max-tokens", "1"))
    assert (result.status, result.out, result.err) == (status, "", words)


def test_generate_when_the_call_fails_halfway_keeps_what_came_and_says_why() -> None:
    result = asyncio.run(ask(ScriptedRouter((piece("def ", 1), PeerUnavailable("decode-0 has gone"))), "x", "--max-tokens", "9"))
    assert (result.status, result.out) == (1, "def \n")
    assert result.err.startswith("[1 new in ") and result.err.endswith("]\nerror: decode-0 has gone; try again in 1 s\n")


def test_generate_when_the_stream_ends_before_its_end_is_an_error() -> None:
    result = asyncio.run(ask(ScriptedRouter((piece("def ", 1),)), "x", "--max-tokens", "9"))
    assert result.status == 1
    assert result.err.endswith("the stream ended before the request did; try again in 1 s\n")


def test_generate_when_time_is_over_says_so() -> None:
    router = ScriptedRouter((asyncio.Event().wait,))
    result = asyncio.run(ask(router, "x", "--max-tokens", "1", "--timeout", "0.3"))
    assert (result.status, result.out) == (1, "")
    assert result.err.startswith("error: 127.0.0.1:") and result.err.endswith(" did not answer in time\n")


def test_generate_when_no_router_listens_gives_the_address_and_a_hint() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        for arguments in (("x",), ("x", "--max-tokens", "1"), ("--token-ids", "1")):
            result = asyncio.run(baton("generate", *arguments, environment={**os.environ, "BATON_ROUTER": address}))
            assert (result.status, result.out) == (1, "")
            assert result.err.startswith(f"error: {address}: ") and result.err.endswith("`baton up` starts one; try again in 1 s\n")
            assert result.err.count("\n") == 1


def test_generate_when_interrupted_cancels_the_call_and_exits_with_130() -> None:
    async def run() -> tuple[int | None, bytes, bytes]:
        router = ScriptedRouter((piece("def ", 1), asyncio.Event().wait))
        async with serving(router) as server:
            process = await start_baton("generate", "--router", server.address, "x", "--max-tokens", "9")
            assert process.stdout is not None
            async with asyncio.timeout(30):
                first = await process.stdout.read(4)
                process.send_signal(signal.SIGINT)
                rest, err = await process.communicate()
                await router.cancelled.wait()
            return process.returncode, first + rest, err

    # Whoever runs the tests in the background of a shell ignores interrupts, and so would the child.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status, out, err = asyncio.run(run())
    finally:
        signal.signal(signal.SIGINT, before)
    assert (status, out) == (130, b"def \n")
    assert err.startswith(b"[1 new in ") and b"Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("x", "--seed", "-1"), "seed: -1 is outside [0, 18446744073709551615]"),
        (("x", "--top-k", "4294967296"), "top_k: 4294967296 is outside [0, 4294967295]"),
        (("x", "--max-tokens", "-5"), "max_tokens: -5 is outside [0, 4294967295]"),
        (("x", "--max-tokens", "1", "--stop-token-id", "-1"), "stop_token_ids: -1 is no token id"),
        (("--token-ids", "1,-1"), "prompt: a token id is outside [0, 4294967295]"),
        (("--token-ids", "1,x"), "--token-ids: '1,x' is not a list of integers"),
        (("x", "--token-ids", "1"), "prompt: give either a text or --token-ids"),
        ((), "prompt: give either a text or --token-ids"),
        (("x", "--timeout", "0"), "--timeout: 0.0 is outside (0, 1000000000] s"),
        (("x", "--timeout", "nan"), "--timeout: nan is outside (0, 1000000000] s"),
        (("x", "--timeout", "inf"), "--timeout: inf is outside (0, 1000000000] s"),
        (("--token-ids", "1,2", "--chat"), "--chat: does not work with --token-ids: a template takes text"),
        (("--token-ids", "1,2", "--chat", "--local"), "--chat: does not work with --token-ids: a template takes text"),
        (("x", "--router", "h:²"), "--router: 'h:²' is not host:port"),
        (("x", "--router", "h:" + "9" * 5000), f"--router: 'h:{'9' * 5000}' is not host:port"),
        (("x", "--router", "nowhere"), "--router: 'nowhere' is not host:port"),
        (("x", "--router", "h:70000"), "--router: 'h:70000' is not host:port"),
        (("x", "--dtype", "float32"), "--dtype: works with --local only"),
        (("x", "--max-model-len", "5"), "--max-model-len: works with --local only"),
        (("x", "--local", "--stop", "A"), "--stop: does not work with --local"),
        (("x", "--local", "--cache-salt", "A"), "--cache-salt: does not work with --local"),
        (("x", "--local", "--timing"), "--timing: does not work with --local"),
        (("x", "--local", "--timeout", "1"), "--timeout: does not work with --local"),
    ],
)
def test_generate_when_the_command_line_is_wrong_says_so_without_asking_anybody(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.cli.app import main

    monkeypatch.setattr("sys.argv", ["baton", "generate", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert (ended.value.code, capsys.readouterr().err) == (2, f"error: {words}\n")


def test_client_when_several_requests_share_it_keeps_them_apart() -> None:
    async def run() -> list[str]:
        async with serving(ScriptedRouter(ANSWER)) as server, RouterClient(server.address) as client:
            texts = [""] * 3

            async def one(index: int) -> None:
                def show(response: inference_pb2.GenerateResponse) -> None:
                    texts[index] += response.text

                request = inference_pb2.GenerateRequest(prompt=make_prompt(text="x", token_ids=None, chat=False))
                ended = await client.generate(request, timeout_s=20, show=show)
                assert ended.usage.completion_tokens == 4

            async with asyncio.TaskGroup() as tasks:
                for index in range(3):
                    tasks.create_task(one(index))
            return texts

    assert asyncio.run(run()) == ["def f():"] * 3


def test_client_when_what_came_cannot_be_shown_cancels_the_call_though_the_channel_goes_on() -> None:
    router = ScriptedRouter((piece("def ", 1), asyncio.Event().wait))

    def show(response: inference_pb2.GenerateResponse) -> None:
        raise BrokenPipeError

    async def run() -> None:
        async with asyncio.timeout(20), serving(router) as server, RouterClient(server.address) as client:
            with pytest.raises(BrokenPipeError):
                await client.generate(inference_pb2.GenerateRequest(), timeout_s=None, show=show)
            await router.cancelled.wait()

    asyncio.run(run())
