"""The HTTP client against servers that do what servers do: answer, refuse, break off, send nonsense, say nothing."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

import pytest

from loadtest.clients.answer import Answer
from loadtest.clients.http_client import HttpClient

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def event(body: object) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


TOKEN = event({"choices": [{"text": "a"}]})
USAGE = event(
    {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}},
)
DONE = b"data: [DONE]\n\n"
END = b"0\r\n\r\n"


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    return head + await reader.readexactly(length)


def replying(*pieces: bytes, then_close: bool = True) -> Handler:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        if then_close:
            writer.close()

    return handle


def ask(handler: Handler, *, timeout_s: float = 5.0, times: int = 1) -> list[Answer]:
    async def main() -> list[Answer]:
        writers = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writers.append(writer)
            await handler(reader, writer)

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        client = HttpClient(urlsplit(f"http://127.0.0.1:{port}/v1"), "/completions", {"authorization": "Bearer x"})
        answers = [Answer() for _ in range(times)]
        for answer in answers:
            await client.send(b'{"prompt": [1]}', answer, timeout_s)
        await client.close()
        for writer in writers:
            writer.close()
        server.close()
        await asyncio.sleep(0.01)  # for the handlers to see it
        return answers

    return asyncio.run(main())


def test_answer_when_the_stream_is_whole_has_tokens_times_and_usage() -> None:
    (answer,) = ask(replying(HEAD, chunk(TOKEN), chunk(TOKEN), chunk(USAGE), chunk(DONE), END))
    assert answer.error == "" and answer.is_complete
    assert (answer.output_tokens, answer.input_tokens, answer.cached_tokens) == (2, 7, 4)
    assert [count for _, count in answer.token_times] == [1, 1]
    assert answer.sent_s <= answer.token_times[0][0] <= answer.token_times[1][0] <= answer.finished_s


def test_answer_when_chunks_cut_events_anywhere_is_the_same() -> None:
    stream = TOKEN + TOKEN + USAGE + DONE
    (whole,) = ask(replying(HEAD, chunk(stream), END))
    (cut,) = ask(replying(HEAD, *[chunk(stream[index : index + 3]) for index in range(0, len(stream), 3)], END))
    assert cut.is_complete and cut.digest == whole.digest != ""
    assert cut.output_tokens == whole.output_tokens == 2


def test_answer_when_it_is_refused_says_when_to_come_again() -> None:
    head = b"HTTP/1.1 429 Too Many Requests\r\nretry-after: 1.5\r\ncontent-length: 4\r\n\r\nfull"
    (answer,) = ask(replying(head))
    assert answer.is_refused and answer.retry_after_s == 1.5 and not answer.is_complete
    assert answer.error == "HTTP 429: full"


@pytest.mark.parametrize(
    ("pieces", "error"),
    [
        ((b"HTTP/1.1 500 Oops\r\ncontent-length: 3\r\n\r\nbad",), "HTTP 500: bad"),
        ((HEAD, chunk(TOKEN)), "PeerUnavailable"),
        ((HEAD, chunk(TOKEN), END), "InvalidAnswer: the stream ended without"),
        ((HEAD, chunk(b"data: {nonsense\n\n"), chunk(DONE), END), "InvalidAnswer: an event is no JSON"),
        ((HEAD, chunk(event({"error": {"message": "gone"}})), chunk(DONE), END), '{"message": "gone"}'),
        ((b"\x00\x01garbage\r\n\r\n",), "InvalidAnswer"),
    ],
)
def test_answer_when_the_server_fails_names_the_error_and_is_not_complete(pieces: tuple[bytes, ...], error: str) -> None:
    (answer,) = ask(replying(*pieces))
    assert answer.error.startswith(error), answer.error
    assert not answer.is_complete and not answer.is_refused
    assert answer.finished_s >= answer.sent_s > 0.0


def test_answer_when_the_server_is_silent_ends_at_the_deadline() -> None:
    (answer,) = ask(replying(HEAD, chunk(TOKEN), then_close=False), timeout_s=0.2)
    assert answer.error == "DeadlineExceeded: no end within 0.2 s"
    assert len(answer.token_times) == 1


def test_connection_when_the_server_keeps_it_is_used_again_and_after_a_deadline_is_not() -> None:
    connections = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while not reader.at_eof():
            try:
                await read_request(reader)
            except asyncio.IncompleteReadError:
                break
            writer.write(HEAD + chunk(TOKEN + USAGE + DONE) + END)
        writer.close()

    answers = ask(handle, times=3)
    assert all(answer.is_complete for answer in answers) and connections == 1

    connections = 0
    first = True

    async def handle_once_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal first
        if first:
            first = False
            await read_request(reader)
            return
        await handle(reader, writer)

    silent, answered = ask(handle_once_silent, times=2, timeout_s=0.3)
    assert not silent.is_complete and answered.is_complete


def test_request_when_a_kept_connection_is_closed_under_it_is_sent_again_and_one_that_was_answered_in_part_is_not() -> None:
    num_requests = 0

    def closing_after(first_reply: bytes) -> Handler:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal num_requests
            for reply in (HEAD + chunk(TOKEN + USAGE + DONE) + END, first_reply):
                await read_request(reader)
                num_requests += 1
                writer.write(reply)
            writer.close()

        return handle

    answers = ask(closing_after(b""), times=2)
    assert all(answer.is_complete and answer.output_tokens == 2 for answer in answers) and num_requests == 3
    num_requests = 0
    first, second = ask(closing_after(HEAD + chunk(TOKEN)), times=2)
    assert first.is_complete and num_requests == 2
    assert second.error.startswith("PeerUnavailable") and not second.is_complete
