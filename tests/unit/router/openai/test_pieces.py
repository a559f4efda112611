"""Several requests as one: what is ready together is shown together, and nothing is taken that nobody reads."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence

from services.core.types import SamplingParams
from services.router.openai.pieces import MAX_WAITING, Piece, follow_all
from services.router.request import Delta, GenerationRequest
from tests.unit.router.openai.scripted_face import WORD, summary


def requests(count: int, *, num_choices: int = 2) -> list[GenerationRequest]:
    sampling = SamplingParams(n=num_choices)
    return [
        GenerationRequest(request_id=str(index), prompt_token_ids=[5], sampling=sampling, received_at=time.perf_counter(), tokenize_s=0.0)
        for index in range(count)
    ]


def test_pieces_when_a_step_brings_one_for_each_choice_are_shown_at_once() -> None:
    async def steps(request: GenerationRequest) -> AsyncGenerator[Piece, None]:
        for _ in range(3):
            await asyncio.sleep(0.01)
            for choice in range(request.sampling.n):
                yield Delta(choice, "x", WORD[:1], (), None)
        yield summary(request, 6)

    shown: list[int] = []

    async def show(pieces: Sequence[tuple[int, Piece]]) -> None:
        shown.append(len(pieces))

    asyncio.run(follow_all(steps, requests(1), show))
    assert shown == [2, 2, 3]


def test_pieces_when_they_are_shown_slowly_wait_within_their_bound() -> None:
    taken = [0, 0]

    async def torrent(request: GenerationRequest) -> AsyncGenerator[Piece, None]:
        for _ in range(4 * MAX_WAITING):
            taken[int(request.request_id)] += 1
            yield Delta(0, "x", WORD[:1], (), None)
            await asyncio.sleep(0)
        yield summary(request, 4 * MAX_WAITING)

    shown = ahead = 0

    async def show(pieces: Sequence[tuple[int, Piece]]) -> None:
        nonlocal shown, ahead
        for _ in range(3 * MAX_WAITING):
            await asyncio.sleep(0)
        shown += len(pieces)
        ahead = max(ahead, sum(taken) - shown)

    asyncio.run(follow_all(torrent, requests(2), show))
    assert shown == 2 * (4 * MAX_WAITING + 1)
    assert ahead <= MAX_WAITING + 2
