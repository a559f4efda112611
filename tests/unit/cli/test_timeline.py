"""The timeline of a request: every fact that the wire has is on it, the bars agree with the numbers, and 80 columns hold it."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.baton.v1 import inference_pb2
from services.cli.timeline import WIDTH, bar, duration, size, timeline, totals

USAGE = inference_pb2.Usage(prompt_tokens=412, completion_tokens=65, cached_tokens=320)


def remote_timing() -> inference_pb2.RequestTiming:
    return inference_pb2.RequestTiming(
        request_id="3f9a17c2",
        router_id="router-0",
        decode_worker_id="decode-0",
        prefill_worker_id="prefill-1",
        route_reason="prefill-1 holds 20 of 26 blocks and has nothing to do; decode-0 has the least work of two workers that are up",
        seed=7,
        tokenize_s=0.0004,
        admission_s=0.0001,
        route_s=0.0002,
        to_decode_s=0.0005,
        decode_queue_s=0.001,
        to_prefill_s=0.0007,
        prefill_queue_s=0.002,
        prefill_s=0.030,
        transfer_tail_s=0.0024,
        prefill_return_s=0.0006,
        first_token_return_s=0.0018,
        first_response_s=0.0003,
        ttft_s=0.040,
        decode_s=0.640,
        finish_s=0.0012,
        total_s=0.6809,
        decode_cached_tokens=16,
        prefill_cached_tokens=320,
        predicted_cached_tokens=304,
        kv_transport="shm",
        kv_blocks=25,
        kv_bytes=3_276_800,
        transfer_s=0.020,
        attempts=1,
        predicted_ttft_s=0.038,
    )


def local_timing() -> inference_pb2.RequestTiming:
    timing = remote_timing()
    timing.prefill_worker_id = timing.kv_transport = ""
    timing.kv_blocks = timing.kv_bytes = timing.prefill_cached_tokens = 0
    timing.transfer_s = timing.transfer_tail_s = timing.to_prefill_s = timing.prefill_return_s = 0.0
    return timing


def lines_of(timing: inference_pb2.RequestTiming, usage: inference_pb2.Usage = USAGE, **options: int) -> list[str]:
    return [line.plain for line in timeline(timing, usage, **options)]


def row(lines: list[str], label: str) -> str:
    [line] = [line for line in lines if "│" in line and line[:13].rstrip() == label]
    return line


def span(line: str) -> tuple[int, int]:
    """First and last column of a row's bar."""
    drawn = line.split("│")[1]
    return len(drawn) - len(drawn.lstrip()), len(drawn.rstrip())


def test_timeline_when_blocks_moved_tells_everything_about_it() -> None:
    lines = lines_of(remote_timing())
    assert lines[0] == "3f9a17c2 · router-0 → prefill-1 → decode-0 · seed 7"
    assert " ".join(line.strip() for line in lines[1:3]) == f"why: {remote_timing().route_reason}"
    assert row(lines, "tokenize").startswith("tokenize        400 µs │")
    assert row(lines, "tokenize").endswith("│ 412 tokens")
    assert row(lines, "route").endswith("│ 304 tokens expected in a cache")
    assert "1.00 ms" in row(lines, "decode queue")
    assert "2.00 ms" in row(lines, "prefill queue")
    assert row(lines, "prefill").endswith("│ 92 tokens computed, 320 cached")
    assert "20.0 ms" in row(lines, "KV moved")
    assert row(lines, "KV moved").endswith("│ 25 blocks, 3.3 MB, shm, 0.16 GB/s")
    assert "2.40 ms" in row(lines, "transfer tail")
    told = {"admission": "100 µs", "to decode": "500 µs", "to prefill": "700 µs", "from prefill": "600 µs"}
    told |= {"from decode": "1.80 ms", "respond": "300 µs", "finish": "1.20 ms"}
    assert {label: row(lines, label)[13:22].strip() for label in told} == told
    assert "40.0 ms" in row(lines, "first token") and row(lines, "first token").endswith("│ TTFT; predicted 38.0 ms")
    assert "640.0 ms" in row(lines, "decode") and row(lines, "decode").endswith("│ 65 tokens, TPOT 10.0 ms")
    assert "680.9 ms" in row(lines, "total") and row(lines, "total").endswith("│ cached: decode 16, prefill 320")


@pytest.mark.parametrize(("transfer_s", "words"), [(0.001, "3.28 GB/s"), (0.03, "0.11 GB/s"), (0.04, "81.9 MB/s"), (0.0, "shm")])
def test_timeline_when_blocks_moved_fast_or_slowly_gives_a_readable_rate(transfer_s: float, words: str) -> None:
    timing = remote_timing()
    timing.transfer_s = transfer_s
    assert row(lines_of(timing), "KV moved").endswith(f", {words}")


def test_timeline_when_decode_computed_the_prompt_says_that_nothing_moved() -> None:
    lines = lines_of(local_timing())
    assert lines[0] == "3f9a17c2 · router-0 → decode-0 · seed 7"
    assert row(lines, "KV moved").endswith("│ nothing: computed on decode")
    assert row(lines, "prefill").endswith("│ 396 tokens computed, 16 cached")
    assert row(lines, "total").endswith("│ cached: decode 16")
    assert not any(line.startswith(("transfer tail", "to prefill", "from prefill")) for line in lines)


def test_timeline_when_drawn_lays_the_stages_end_to_end_and_the_transfer_beside_prefill() -> None:
    lines = lines_of(remote_timing())
    stages = (
        *("tokenize", "admission", "route", "to decode", "decode queue", "to prefill", "prefill queue", "prefill"),
        *("transfer tail", "from prefill", "from decode", "respond"),
    )
    spans = [span(row(lines, label)) for label in stages]
    for (start, end), (next_start, _) in itertools.pairwise(spans):
        assert start <= next_start <= end, "a gap, or a step back"
    assert spans[-1][1] == span(row(lines, "first token"))[1], "the stages end at the first token"
    moved, prefill, tail = (span(row(lines, label)) for label in ("KV moved", "prefill", "transfer tail"))
    assert prefill[0] < moved[0] < prefill[1]
    assert moved[1] == tail[1]
    assert prefill[1] - prefill[0] == pytest.approx(18 * 0.030 / 0.040, abs=2)


def test_timeline_when_a_request_was_tried_again_says_so() -> None:
    timing = remote_timing()
    timing.attempts = 3
    assert not any("retry" in line for line in lines_of(timing))
    timing.retry_s, timing.prefill_retry_s, timing.decode_retry_s = 0.001, 0.002, 0.064
    lines = lines_of(timing)
    assert lines[0].endswith("· seed 7 · 3 attempts")
    assert [row(lines, label)[13:22].strip() for label in ("retry", "prefill retry", "decode retry")] == ["1.00 ms", "2.00 ms", "64.0 ms"]
    assert row(lines, "decode").endswith("TPOT 11.0 ms"), "what was lost is the client's time, too"


def test_timeline_when_there_are_choices_gives_the_time_per_token_of_one() -> None:
    usage = inference_pb2.Usage(prompt_tokens=412, completion_tokens=68)
    assert row(lines_of(remote_timing(), usage, num_choices=4), "decode").endswith("│ 68 tokens, TPOT 40.0 ms")


def test_timeline_when_there_was_one_token_has_no_time_per_token() -> None:
    usage = inference_pb2.Usage(prompt_tokens=1, completion_tokens=1)
    assert row(lines_of(local_timing(), usage), "decode").endswith("│ 1 token")
    assert row(lines_of(local_timing(), usage), "prefill").endswith("│ 0 tokens computed, 16 cached")


def test_timeline_when_clocks_disagree_shows_by_how_much_and_draws_within_the_axis() -> None:
    timing = remote_timing()
    timing.to_decode_s -= 0.005
    timing.first_token_return_s += 0.005
    lines = lines_of(timing)
    assert (row(lines, "to decode")[13:22].strip(), row(lines, "from decode")[13:22].strip()) == ("-4.50 ms", "6.80 ms")
    assert span(row(lines, "decode queue")) == (0, 1)
    assert span(row(lines, "respond"))[1] == span(row(lines, "first token"))[1]


@given(
    st.builds(
        inference_pb2.RequestTiming,
        route_reason=st.text(st.characters(codec="ascii", exclude_categories=["C"]), max_size=300),
        prefill_worker_id=st.sampled_from(["", "prefill-12"]),
        decode_worker_id=st.just("decode-3"),
        kv_transport=st.sampled_from(["shm", "tcp", "grpc"]),
        kv_blocks=st.integers(0, 2**32 - 1),
        kv_bytes=st.integers(0, 2**50),
        **{
            name: st.floats(0, 5000)
            for name in (
                "tokenize_s",
                "retry_s",
                "route_s",
                "decode_queue_s",
                "prefill_queue_s",
                "prefill_s",
                "transfer_tail_s",
                "transfer_s",
                "ttft_s",
            )
        },
        **{name: st.floats(-5000, 5000) for name in ("to_decode_s", "to_prefill_s", "prefill_return_s", "first_token_return_s")},
        total_s=st.floats(0, 50_000),
        predicted_ttft_s=st.floats(0, 5000),
    ),
    st.builds(inference_pb2.Usage, prompt_tokens=st.integers(0, 2**32 - 1), completion_tokens=st.integers(0, 2**32 - 1)),
)
def test_timeline_when_its_numbers_are_anything_fits_the_width(timing: inference_pb2.RequestTiming, usage: inference_pb2.Usage) -> None:
    assert max(map(len, lines_of(timing, usage))) <= WIDTH


def test_totals_when_blocks_moved_name_path_and_transport() -> None:
    assert totals(remote_timing(), USAGE) == "320 of 412 prompt tokens cached, prefill-1 → decode-0, 25 KV blocks over shm"
    assert totals(local_timing(), USAGE) == "320 of 412 prompt tokens cached, decode-0"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 µs"),
        (0.00085, "850 µs"),
        (-0.00085, "-850 µs"),
        (0.0009994, "999 µs"),
        (0.0009996, "1.00 ms"),
        (0.00999, "9.99 ms"),
        (0.009996, "10.0 ms"),
        (0.0456, "45.6 ms"),
        (0.99996, "1.00 s"),
        (1, "1.00 s"),
        (75.5, "75.50 s"),
    ],
)
def test_duration_when_told_has_a_unit_and_about_three_digits(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("num_bytes", "words"),
    [(0, "0 B"), (999, "999 B"), (3100, "3.1 kB"), (4.2e6, "4.2 MB"), (720_900, "721 kB"), (99_960, "100 kB"), (1.5e9, "1.5 GB")],
)
def test_size_when_told_has_a_decimal_unit(num_bytes: float, words: str) -> None:
    assert size(num_bytes) == words


@pytest.mark.parametrize(
    ("start", "end", "drawn"),
    [
        (0, 10, "██████████"),
        (0, 0, ""),
        (5, 4, ""),
        (0, 0.01, "▏"),
        (2, 4, "  ██"),
        (2, 4.5, "  ██▌"),
        (9.99, 10, "         █"),
        (12, 15, "         █"),
        (0, 50, "██████████"),
        (-5, -3, "▏"),
        (-5, 2, "██"),
    ],
)
def test_bar_when_drawn_covers_its_columns_and_stays_on_the_axis(start: float, end: float, drawn: str) -> None:
    assert bar(start, end, length=10, columns=10) == drawn


def test_bar_when_the_axis_has_no_length_is_as_thin_as_can_be() -> None:
    assert bar(0, 1, length=0, columns=10) == "▏"
