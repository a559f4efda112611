"""The page: it loads nothing, has every plot with its axes named, leaves out what it cannot show, and says so."""

import io
import re
from html.parser import HTMLParser
from typing import Any

import msgspec
import pytest
from rich.console import Console

from loadtest.files import BadInput
from loadtest.records import Outcome, RequestRecord
from loadtest.report.compare import compare
from loadtest.report.compare_page import compare_page, print_comparison
from loadtest.report.page import Page, render
from loadtest.report.run_page import run_page
from loadtest.report.terminal import print_result
from loadtest.report.text import milliseconds, percent, rate, size, three_digits
from loadtest.result import FaultMark
from loadtest.verdict import Verdict
from tests.unit.loadtest.made_results import made_records, made_result

ALL_PLOTS = {
    "ttft-ecdf",
    "ttft-histogram",
    "tpot-ecdf",
    "tpot-histogram",
    "time-rates",
    "time-attainment",
    "time-open",
    "stages-ttft",
    "stages-e2e",
    "broke-plot",
    "caches-plot",
    "kv-plot",
    "by-rate-plot",
    "timeline-median",
    "timeline-worst",
}


class Reader(HTMLParser):
    """Collects what a browser would load, scripts, and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.text: list[str] = []
        self.anchors: set[str] = set()
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        named = dict(attrs)
        self.loads += [f"{tag} {name}={value}" for name, value in attrs if name in ("src", "srcset", "href", "data", "action", "poster")]
        if tag in ("link", "iframe", "img", "object", "embed", "base"):
            self.loads.append(tag)
        self.anchors.add(named.get("id") or "")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        {"script": self.scripts, "style": self.styles}.get(self._inside, self.text).append(data)


def figures(reader: Reader) -> dict[str, Any]:
    """The plots' data and layouts as the browser gets them."""
    text = next(script for script in reader.scripts if "const figures" in script)
    found: dict[str, Any] = msgspec.json.decode(text[text.index("{") : text.index(";\nfor (const")])
    return found


def test_page_when_a_result_has_everything_shows_every_plot_with_named_axes_and_loads_nothing() -> None:
    records = made_records()
    reader = Reader(render(run_page(made_result(records), records)))
    assert reader.loads == []
    assert not re.search(r"@import|url\(", "".join(reader.styles))
    assert not [script for script in reader.scripts if len(script) < 1_000_000 and re.search(r"https?://", script)]
    assert sum("plotly.js v" in script for script in reader.scripts) == 1
    plots = figures(reader)
    assert plots.keys() == ALL_PLOTS
    assert plots.keys() <= reader.anchors
    for name, plot in plots.items():
        assert all(plot["layout"][axis]["title"]["text"] for axis in ("xaxis", "yaxis")), name
        assert all(len(trace["x"]) for trace in plot["data"]), name
    # Units: of time, of rates, or a share or number of something.
    for name, plot in plots.items():
        titles = [plot["layout"][axis]["title"]["text"] for axis in ("xaxis", "yaxis")]
        assert re.search(r"\bms\b|seconds|per second|MiB|share|requests", " ".join(titles)), name
    assert "left-out" not in reader.anchors


def test_page_when_a_fault_was_made_marks_it_on_every_plot_over_time() -> None:
    records = made_records(requests=100)
    plots = figures(Reader(render(run_page(made_result(records), records))))
    for name in ("time-rates", "time-attainment", "time-open"):
        assert [shape["x0"] for shape in plots[name]["layout"]["shapes"]] == [12.0], name
        assert [note["text"] for note in plots[name]["layout"]["annotations"]] == ["kill decode-1"]


def test_page_when_the_objective_is_one_number_draws_its_line() -> None:
    records = made_records(requests=100)
    plots = figures(Reader(render(run_page(made_result(records), records))))
    assert [shape["x0"] for shape in plots["ttft-ecdf"]["layout"]["shapes"]] == [400.0]
    assert [shape["x0"] for shape in plots["tpot-histogram"]["layout"]["shapes"]] == [22.0]


def test_page_when_latencies_spread_wide_has_a_logarithmic_axis_with_the_objective_in_its_place() -> None:
    records = made_records(requests=100)
    records[0].first_token_s = records[0].at_s + 60.0
    plot = figures(Reader(render(run_page(made_result(records), records))))["ttft-ecdf"]["layout"]
    assert plot["xaxis"]["type"] == "log" and "logarithmic" in plot["xaxis"]["title"]["text"]
    assert plot["shapes"][0]["x0"] == 400.0 and plot["annotations"][0]["x"] == pytest.approx(2.60206)


def test_page_when_a_result_is_bare_leaves_sections_out_and_says_why() -> None:
    records = made_records(requests=80)
    for record in records:
        record.stages, record.tenant, record.cached_tokens, record.gaps_s = {}, "", None, ()
        record.prefill_cached_tokens = record.decode_cached_tokens = record.kv_bytes = 0
        record.prefill_worker_id = record.decode_worker_id = ""
    full = made_result(records, faults=(), extra={}, ceilings=None)
    result = msgspec.structs.replace(full, summary=msgspec.structs.replace(full.summary, kv_bytes_expected=None))
    page = run_page(result, records)
    assert dict(page.left_out) == {
        "Stages": "the server told no stages",
        "Cache hits": "the server told no cached tokens",
        "KV moved": "the expected number of bytes is not known",
        "Tenants": "the requests name none",
        "Attainment against rate": "there is one rate only",
        "One request": "the server told no stages",
    }
    assert figures(Reader(render(page))).keys() == {name for name in ALL_PLOTS if name.startswith(("ttft", "tpot", "time-", "broke"))}


@pytest.mark.parametrize(
    "records", [[], [RequestRecord(index=0, at_s=0.0)], [RequestRecord(index=0, at_s=0.0, sent_s=0.0, outcome=Outcome.FAILED)]]
)
def test_page_when_nothing_completed_still_renders(records: list[RequestRecord]) -> None:
    page = run_page(made_result(records, ceilings=None, faults=(), extra={}), records)
    reader = Reader(render(page))
    assert "TTFT distribution" in dict(page.left_out)
    assert "configuration" in reader.anchors


def test_page_when_a_run_is_invalid_says_so_first_with_every_problem() -> None:
    records = made_records(requests=60)
    result = made_result(records, verdict=Verdict(valid=False, problems=("the sender was late", "CORRECTNESS: wrong")))
    text = " ".join(Reader(render(run_page(result, records))).text)
    assert text.index("Invalid") < text.index("the sender was late") < text.index("CORRECTNESS: wrong") < text.index("attainment")


def test_page_when_names_are_hostile_does_not_run_them() -> None:
    records = made_records(requests=60)
    evil = "</script><script>alert(1)</script>"
    for record in records:
        record.tenant = record.decode_worker_id = evil
        record.stages[evil] = 5.0
    html = render(run_page(made_result(records, name=evil), records))
    assert "<script>alert" not in html


def test_page_when_several_results_are_given_draws_attainment_over_their_rates() -> None:
    records = made_records(requests=60)
    fast, slow = (made_result(records, extra={}), made_result(made_records(requests=90, slowdown=2.0), extra={}))
    slower = msgspec.structs.replace(slow, summary=msgspec.structs.replace(slow.summary, offered_rate=99.0))
    plot = figures(Reader(render(run_page(fast, records, [slower]))))["by-rate-plot"]["data"][0]
    assert plot["x"] == [fast.summary.offered_rate, 99.0]
    assert plot["y"] == [fast.summary.attainment, slow.summary.attainment]


def test_page_when_probes_have_another_shape_says_which_field() -> None:
    records = made_records(requests=60)
    with pytest.raises(BadInput, match=r"made up, extra.probes: .*`rate`"):
        run_page(made_result(records, extra={"probes": [{"speed": 1}]}), records)


def test_timeline_when_drawn_begins_each_stage_where_the_one_before_it_ended() -> None:
    records = made_records(requests=60)
    for record in records:
        record.stages = {"prefill_queue": 0.1, "prefill": 0.2, "first_response_hop": 0.05, "decode": 0.3}
    bars = figures(Reader(render(run_page(made_result(records), records))))["timeline-worst"]["data"][0]
    assert bars["y"] == ["prefill queue", "prefill", "first response hop", "decode"]
    assert bars["base"] == pytest.approx([0, 100, 300, 300])
    assert bars["x"] == pytest.approx([100, 200, 50, 300])


def test_compare_page_when_two_runs_differ_overlays_them_and_loads_nothing() -> None:
    before, after = made_records(requests=120), made_records(requests=120, seed=2, slowdown=1.3)
    runs = (made_result(before, name="old"), before), (made_result(after, name="new"), after)
    comparison = compare(*runs)
    reader = Reader(render(compare_page(comparison, *runs, tolerance=0.02)))
    assert reader.loads == []
    plots = figures(reader)
    assert plots.keys() == {"ttft-ecdf", "tpot-ecdf", "e2e-ecdf"}
    assert [trace["name"] for trace in plots["e2e-ecdf"]["data"]] == ["A: old", "B: new"]
    assert "B is worse in" in " ".join(reader.text)


def printed(width: int = 130) -> tuple[Console, io.StringIO]:
    output = io.StringIO()
    return Console(file=output, width=width), output


def test_print_result_when_a_result_has_everything_names_it_all() -> None:
    records = made_records(requests=300)
    result = made_result(records)
    console, output = printed()
    print_result(console, result, records)
    text = output.getvalue()
    for part in ("300 requests offered", "TTFT", "TPOT", "ITL", "E2E", "send lag", "one pool", "KV moved", "3 tenants", "kill decode-1"):
        assert part in text, part
    assert "prefill queue" in text and "around P99" in text and text.rstrip().endswith("valid")


def test_print_result_when_invalid_says_why_and_when_bare_has_nothing_else() -> None:
    result = made_result([], ceilings=None, faults=(), extra={})
    console, output = printed()
    print_result(console, result, [])
    assert "INVALID: the schedule has no requests" in output.getvalue()
    assert "stages" not in output.getvalue() and "tenants" not in output.getvalue()


def test_print_comparison_when_one_is_worse_marks_the_figures() -> None:
    before, after = made_records(requests=120), made_records(requests=120, seed=2, slowdown=1.3)
    console, output = printed()
    print_comparison(console, compare((made_result(before), before), (made_result(after), after)), tolerance=0.02)
    [line] = [line for line in output.getvalue().splitlines() if line.startswith("TPOT mean")]
    assert line.rstrip().endswith("worse") and "…" in line
    assert "worse by more than 2.0 %: " in output.getvalue()


def test_text_when_numbers_are_large_small_or_missing_keeps_three_digits_and_the_unit() -> None:
    assert [milliseconds(value) for value in (None, 0.0, 0.1234, 5.678, 12.34, 1234.5, 65_432.1)] == [
        "—",
        "0 ms",
        "0.123 ms",
        "5.68 ms",
        "12.3 ms",
        "1,234 ms",
        "65.4 s",
    ]
    assert [percent(value) for value in (0.0, 0.005, 0.5, 0.9987, 1.0)] == ["0.0 %", "0.50 %", "50.0 %", "99.87 %", "100.0 %"]
    assert (rate(2.5), rate(None), three_digits(None)) == ("2.50 /s", "—", "—")
    assert [size(value) for value in (None, 12, 2048, 3 * 2**40, 2**60)] == ["—", "12 B", "2.0 KiB", "3.0 TiB", "1,048,576.0 TiB"]


def test_render_when_a_page_has_no_plots_carries_no_script() -> None:
    assert "<script" not in render(Page(title="empty", subtitle=""))


def test_page_when_faults_are_close_together_marks_them_by_their_number_in_the_table() -> None:
    records = made_records(requests=200)
    faults = tuple(FaultMark(at_s=float(second), kind="kill", worker_id=f"decode-{second}") for second in (1, 2, 8))
    reader = Reader(render(run_page(made_result(records, faults=faults), records)))
    assert [note["text"] for note in figures(reader)["time-open"]["layout"]["annotations"]] == ["1", "2", "3"]
    text = " ".join(reader.text).split()
    assert text[text.index("decode-8") - 4 : text.index("decode-8")] == ["3", "8.0", "s", "kill"]
