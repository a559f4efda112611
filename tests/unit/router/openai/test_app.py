"""Routes over a scripted generate(): forms of the answers, names, limits, errors before and within a stream."""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from services.core.errors import InvalidRequest, Overloaded, PeerUnavailable
from services.core.types import FinishReason, TokenLogprobs
from services.engine.demo import TARGET_DIR
from services.router.openai.app import MAX_BODY_BYTES
from services.router.openai.pieces import Piece
from services.router.request import Delta, GenerationRequest, PromptLogprobs
from services.tokenizer.tokenizer import Tokenizer
from tests.unit.router.openai.scripted_face import TOKENIZER, WORD, Face, answer, request_bytes, run, summary, timed

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


def test_completion_when_several_prompts_have_several_choices_numbers_them_in_order() -> None:
    async def script(request: GenerationRequest) -> AsyncGenerator[Piece, None]:
        for choice in reversed(range(request.sampling.n)):
            yield Delta(choice, f"{request.request_id}/{choice}", WORD[:1], (), FinishReason.STOP)
        yield summary(request, request.sampling.n)

    async def test(face: Face) -> None:
        for stream in (False, True):
            reply = await face.post(
                COMPLETIONS,
                {"prompt": [[5], [6, 7]], "n": 2, "stream": stream, "stream_options": {"include_usage": True} if stream else None},
            )
            name = reply.headers["x-request-id"]
            wanted = {0: f"{name}-0/0", 1: f"{name}-0/1", 2: f"{name}-1/0", 3: f"{name}-1/1"}
            answers = reply.events() if stream else [reply.json]
            assert {choice["index"]: choice["text"] for each in answers for choice in each["choices"]} == wanted
            assert {each["id"] for each in answers} == {f"cmpl-{name}"}
            usage = answers[-1]["usage"]
            assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (3, 4, 7)
            assert usage["prompt_tokens_details"] == {"cached_tokens": 2}

    run(test, script)


def test_chat_when_streamed_begins_with_the_role_and_ends_with_done() -> None:
    async def test(face: Face) -> None:
        options = {"include_usage": True, "continuous_usage_stats": True}
        reply = await face.post(CHATS, {"messages": HELLO, "n": 2, "stream": True, "stream_options": options})
        assert reply.headers["content-type"].startswith("text/event-stream")
        events = reply.events()
        assert [event["choices"][0]["delta"] for event in events[:2]] == [{"role": "assistant", "content": ""}] * 2
        assert [event["choices"][0]["index"] for event in events[:-1]] == [0, 1, 0, 1, 0, 1]
        assert [event["choices"][0]["finish_reason"] for event in events[:-1]] == [None] * 4 + ["length"] * 2
        assert [event["usage"]["completion_tokens"] for event in events] == [0, 0, 1, 2, 3, 4, 4]
        assert {event["object"] for event in events} == {"chat.completion.chunk"}
        assert reply.body.endswith(b"data: [DONE]\n\n")

    run(test)


def test_answer_when_no_usage_is_wanted_has_none_in_its_stream() -> None:
    async def test(face: Face) -> None:
        reply = await face.post(COMPLETIONS, {"prompt": [5], "stream": True})
        assert all("usage" not in event for event in reply.events())
        whole = await face.post(CHATS, {"messages": HELLO})
        assert whole.json["choices"][0]["message"] == {"role": "assistant", "content": " = None", "refusal": None, "tool_calls": []}
        assert whole.json["usage"]["completion_tokens"] == 2

    run(test)


def test_timing_when_asked_for_comes_with_the_last_chunk() -> None:
    async def test(face: Face) -> None:
        for fields, headers in (({"baton_timing": True}, ()), ({}, ("x-baton-timing: 1",))):
            for stream in (False, True):
                reply = await face.post(COMPLETIONS, {"prompt": [5], "stream": stream, **fields}, headers)
                last = reply.events()[-1] if stream else reply.json
                assert last["baton"]["timings"][0]["ttft_s"] == 0.5
        assert "baton" not in (await face.post(COMPLETIONS, {"prompt": [5]})).json

    run(test)


def test_logprobs_when_wanted_are_in_the_form_of_the_route() -> None:
    async def test(face: Face) -> None:
        completion = (await face.post(COMPLETIONS, {"prompt": [5], "logprobs": 2})).json["choices"][0]["logprobs"]
        assert completion["tokens"] == [" =", " None"]
        assert completion["text_offset"] == [0, 2]
        assert completion["token_logprobs"] == [-0.5, -0.5]
        assert completion["top_logprobs"][0] == {" =": -0.5, " None": -1.5}
        chunks = (await face.post(COMPLETIONS, {"prompt": [5], "logprobs": 2, "stream": True})).events()
        assert [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks] == [[0], [2]]
        chat = (await face.post(CHATS, {"messages": HELLO, "logprobs": True, "top_logprobs": 2})).json["choices"][0]["logprobs"]
        assert [entry["token"] for entry in chat["content"]] == [" =", " None"]
        assert chat["content"][0]["bytes"] == list(b" =")
        assert [other["token"] for other in chat["content"][0]["top_logprobs"]] == [" =", " None"]

    run(test)


def test_token_when_it_is_part_of_a_character_is_shown_by_its_bytes() -> None:
    halves = TOKENIZER.encode("\N{OGHAM LETTER BEITH}")
    assert len(halves) > 1

    async def script(request: GenerationRequest) -> AsyncGenerator[Piece, None]:
        logprobs = [TokenLogprobs(chosen=-float("inf"), top=())] * len(halves)
        yield Delta(0, "\N{OGHAM LETTER BEITH}", halves, logprobs, FinishReason.LENGTH)
        yield summary(request, len(halves))

    async def test(face: Face) -> None:
        columns = (await face.post(COMPLETIONS, {"prompt": [5], "logprobs": 0})).json["choices"][0]["logprobs"]
        assert columns["tokens"][0].startswith("bytes:\\xe1")
        assert columns["token_logprobs"][0] == -9999.0  # JSON has no infinity
        chat = (await face.post(CHATS, {"messages": HELLO, "logprobs": True})).json["choices"][0]["logprobs"]
        assert bytes(byte for entry in chat["content"] for byte in entry["bytes"]).decode() == "\N{OGHAM LETTER BEITH}"

    run(test, script)


async def scored(request: GenerationRequest) -> AsyncGenerator[Piece, None]:
    """answer() of a request that asks for the prompt's logprobs."""
    assert request.sampling.prompt_logprobs == 1
    yield PromptLogprobs([TokenLogprobs(chosen=-float(i), top=((token_id, -float(i)),)) for i, token_id in enumerate(WORD[1:], 1)])
    async for piece in answer(request):
        yield piece


def test_echo_when_logprobs_are_wanted_scores_the_prompt() -> None:
    async def test(face: Face) -> None:
        for prompt in (" = None", WORD):
            for stream in (False, True):
                for max_tokens in (0, 2):
                    fields = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": max_tokens, "stream": stream}
                    reply = await face.post(COMPLETIONS, fields)
                    choices = [event["choices"][0] for event in (reply.events() if stream else [reply.json])]
                    columns = [choice["logprobs"] for choice in choices if choice["logprobs"]]
                    shown = 2 if max_tokens else 0
                    assert "".join(choice["text"] for choice in choices) == " = None" * (1 + shown // 2)
                    assert [entry for each in columns for entry in each["tokens"]] == [" =", " None"] * (1 + shown // 2)
                    assert [entry for each in columns for entry in each["token_logprobs"]] == [None, -1.0, *[-0.5] * shown]
                    assert [entry for each in columns for entry in each["top_logprobs"]][:2] == [None, {" None": -1.0}]
                    assert [entry for each in columns for entry in each["text_offset"]] == [0, 2, 7, 9][: 2 + shown]
                    assert choices[-1]["finish_reason"] == "length"
                    if not stream:
                        assert reply.json["usage"]["completion_tokens"] == shown
        assert {request.sampling.max_tokens for request in face.seen} == {1, 2}

    run(test, scored)


def test_echo_when_the_prompt_was_not_scored_is_no_answer() -> None:
    async def test(face: Face) -> None:
        for max_tokens in (0, 2):
            reply = await face.post(COMPLETIONS, {"prompt": WORD, "echo": True, "logprobs": 1, "max_tokens": max_tokens})
            assert reply.status == 500

    run(test, answer)


def test_echo_when_no_logprobs_are_wanted_begins_each_choice_with_the_prompt() -> None:
    async def test(face: Face) -> None:
        reply = await face.post(COMPLETIONS, {"prompt": "import os", "echo": True, "n": 2})
        assert [choice["text"] for choice in reply.json["choices"]] == ["import os = None"] * 2
        assert face.seen[0].sampling.prompt_logprobs is None

    run(test)


def test_max_tokens_when_absent_are_sixteen_for_a_completion_and_what_is_left_for_a_chat() -> None:
    async def test(face: Face) -> None:
        await face.post(COMPLETIONS, {"prompt": [5]})
        await face.post(COMPLETIONS, {"prompt": [5] * 4090})
        await face.post(CHATS, {"messages": HELLO})
        assert [request.sampling.max_tokens for request in face.seen] == [16, 6, None]

    run(test)


def test_chat_when_the_template_takes_tools_and_variables_gets_them(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").symlink_to(TARGET_DIR / "tokenizer.json")
    (tmp_path / "chat_template.jinja").write_text("{{ tools | length }} {{ mood }} {{ reasoning_effort }} {{ add_generation_prompt }}")
    fields = {"tools": [{"type": "function"}], "chat_template_kwargs": {"mood": "calm"}, "reasoning_effort": "low"}

    async def test(face: Face) -> None:
        await face.post(CHATS, {"messages": HELLO, "add_generation_prompt": False, **fields})
        assert TOKENIZER.decode(face.seen[0].prompt_token_ids) == "1 calm low False"

    run(test, tokenizer=Tokenizer.from_checkpoint(tmp_path))


def test_chat_when_the_checkpoint_has_no_template_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").symlink_to(TARGET_DIR / "tokenizer.json")

    async def test(face: Face) -> None:
        reply = await face.post(CHATS, {"messages": HELLO})
        assert reply.status == 400
        assert reply.json["error"]["message"] == "messages: this checkpoint has no chat template"

    run(test, tokenizer=Tokenizer.from_checkpoint(tmp_path))


def test_request_id_when_given_names_the_answer() -> None:
    async def test(face: Face) -> None:
        reply = await face.post(CHATS, {"messages": HELLO, "request_id": "mine"})
        assert (reply.headers["x-request-id"], reply.json["id"], face.seen[-1].request_id) == ("mine", "chatcmpl-mine", "mine")
        reply = await face.post(CHATS, {"messages": HELLO, "request_id": "mine"}, ["X-Request-Id: header"])
        assert (reply.headers["x-request-id"], reply.json["id"]) == ("header", "chatcmpl-header")
        reply = await face.post(CHATS, {"messages": HELLO, "request_id": "a\r\nb: c"})
        assert reply.json["id"] == f"chatcmpl-{reply.headers['x-request-id']}" and "\n" not in reply.json["id"]
        refused = await face.post(CHATS, {}, ["X-Request-Id: header"])
        assert refused.headers["x-request-id"] == "header"

    run(test)


def test_errors_when_they_come_before_the_first_piece_are_statuses() -> None:
    async def script(request: GenerationRequest) -> AsyncGenerator[Piece, None]:
        if request.cache_salt == b"late":
            raise Overloaded("too late", retry_after_s=1.2)
        if request.cache_salt == b"bug":
            raise KeyError("secret")
        if not request.cache_salt:
            raise PeerUnavailable("nobody")
        yield summary(request, 0)

    async def test(face: Face) -> None:
        for stream in (False, True):
            reply = await face.post(COMPLETIONS, {"prompt": [5], "cache_salt": "late", "stream": stream})
            assert (reply.status, reply.headers["retry-after"], reply.json["error"]["code"]) == (429, "2", "overloaded")
            reply = await face.post(COMPLETIONS, {"prompt": [5], "stream": stream})
            assert (reply.status, reply.headers["retry-after"]) == (503, "1")
            reply = await face.post(COMPLETIONS, {"prompt": [5], "cache_salt": "bug", "stream": stream})
            assert reply.status == 500 and b"secret" not in reply.body

    run(test, script)


def test_error_when_it_comes_within_a_stream_is_its_last_event() -> None:
    async def script(request: GenerationRequest) -> AsyncGenerator[Piece, None]:
        yield Delta(0, " =", WORD[:1], (), None)
        await asyncio.sleep(0.01)
        raise PeerUnavailable("the worker is gone")

    async def test(face: Face) -> None:
        reply = await face.post(COMPLETIONS, {"prompt": [5], "stream": True})
        assert reply.status == 200
        first, last = reply.events()
        assert first["choices"][0]["text"] == " ="
        assert last["error"]["code"] == "peer_unavailable"
        assert b"[DONE]" not in reply.body

    run(test, script)


def test_batch_when_one_prompt_fails_cancels_the_others() -> None:
    async def script(request: GenerationRequest) -> AsyncGenerator[Piece, None]:
        if len(request.prompt_token_ids) == 2:
            raise InvalidRequest("prompt", "is wrong")
        await asyncio.Event().wait()
        yield summary(request, 0)

    async def test(face: Face) -> None:
        reply = await face.post(COMPLETIONS, {"prompt": [[5], [6, 7], [8]]})
        assert (reply.status, reply.json["error"]["param"]) == (400, "prompt")
        assert len(face.ended) == 3

    run(test, script)


def test_deadline_when_it_passes_ends_the_request() -> None:
    async def script(request: GenerationRequest) -> AsyncGenerator[Piece, None]:
        if request.cache_salt:
            yield Delta(0, " =", WORD[:1], (), None)
        await asyncio.Event().wait()
        yield summary(request, 0)

    async def test(face: Face) -> None:
        reply = await face.post(COMPLETIONS, {"prompt": [5]}, ["x-request-timeout: 0.05"])
        assert (reply.status, reply.json["error"]["code"]) == (504, "deadline_exceeded")
        assert face.seen[0].remaining_s == 0.05
        reply = await face.post(COMPLETIONS, {"prompt": [5], "stream": True, "cache_salt": "s"}, ["x-request-timeout: 0.05"])
        assert reply.events()[-1]["error"]["code"] == "deadline_exceeded"
        assert len(face.ended) == 2
        for wrong in ("x", "-1", "0", "nan", "inf"):
            reply = await face.post(COMPLETIONS, {"prompt": [5]}, [f"x-request-timeout: {wrong}"])
            assert (reply.status, reply.json["error"]["param"]) == (400, "x-request-timeout")

    run(test, script)


@pytest.mark.parametrize(
    ("path", "status"), [("/health", 200), ("/version", 200), ("/v1/models", 200), ("/v1/models/demo", 200), ("/v1/models/other", 404)]
)
def test_get_when_something_is_served_answers(path: str, status: int) -> None:
    async def test(face: Face) -> None:
        assert (await face.get(path)).status == status

    run(test)


def test_health_when_no_worker_can_serve_is_unavailable() -> None:
    async def test(face: Face) -> None:
        reply = await face.get("/health")
        assert (reply.status, reply.headers["retry-after"]) == (503, "1")
        assert (await face.get("/v1/models")).json["data"] == []

    run(test, can_serve=False)


def test_requests_when_they_are_not_for_us_are_told_so_in_openais_shape() -> None:
    async def test(face: Face) -> None:
        replies = {
            404: await face.post("/v1/embeddings", {}),
            405: await face.get(COMPLETIONS),
            415: await face.post(COMPLETIONS, {"prompt": "x"}, kind="text/plain"),
            413: await face.send(request_bytes(COMPLETIONS, b"", num_bytes=MAX_BODY_BYTES + 1)),
        }
        for status, reply in replies.items():
            assert reply.status == status
            assert reply.json["error"].keys() == {"message", "type", "param", "code"}
        assert replies[405].headers["allow"] == "POST"
        assert (await face.post(COMPLETIONS, {"prompt": "x"}, ["content-encoding: gzip"])).status == 415

    run(test)


def test_body_when_it_is_too_long_and_says_nothing_of_its_length_is_refused_while_it_is_read() -> None:
    async def test(face: Face) -> None:
        reader, writer = await face.connect()
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\ncontent-type: application/json\r\n\r\n"
        writer.write(head.encode())
        chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        for _ in range(MAX_BODY_BYTES // 0x10000 + 1):
            writer.write(chunk)
            await writer.drain()
        assert b"413" in await reader.readline()
        writer.close()

    run(test)


def test_body_when_it_is_long_does_not_hold_up_others() -> None:
    async def test(face: Face) -> None:
        long = asyncio.create_task(face.post(COMPLETIONS, {"prompt": [7] * 4_000_000}))
        slowest = 0.0
        while not long.done():
            slowest = max(slowest, await timed(asyncio.sleep(0)))
        assert (await long).status == 200  # the scripted generate() takes all
        assert slowest < 1.0

    run(test)


def test_tokenize_when_asked_gives_ids_and_back() -> None:
    async def test(face: Face) -> None:
        reply = (await face.post("/tokenize", {"prompt": "import os", "return_token_strs": True})).json
        assert reply["count"] == len(reply["tokens"]) and "".join(reply["token_strs"]) == "import os"
        assert (await face.post("/detokenize", {"tokens": reply["tokens"]})).json == {"prompt": "import os"}
        chat = (await face.post("/tokenize", {"messages": HELLO, "add_generation_prompt": False})).json
        assert TOKENIZER.decode(chat["tokens"]) == "# user: hello\n"
        assert (await face.post("/detokenize", {"tokens": [5000]})).status == 400

    run(test)
