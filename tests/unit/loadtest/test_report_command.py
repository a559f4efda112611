"""`python -m loadtest report`: what it writes, prints, and exits with."""

from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner, Result

from loadtest.app import app
from loadtest.result import save_result
from loadtest.verdict import Verdict
from tests.unit.loadtest.made_results import made_records, made_result


def report(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


@pytest.fixture
def result_path(tmp_path: Path) -> Path:
    records = made_records(requests=120)
    save_result(made_result(records), records, tmp_path / "run.json")
    return tmp_path / "run.json"


@pytest.fixture
def slower_path(tmp_path: Path) -> Path:
    records = made_records(requests=120, seed=2, slowdown=1.3)
    save_result(made_result(records, name="slower"), records, tmp_path / "slower.json")
    return tmp_path / "slower.json"


def test_report_when_given_a_result_writes_a_page_beside_it_and_prints_the_summary(result_path: Path) -> None:
    ran = report(result_path)
    assert ran.exit_code == 0
    assert "120 requests offered" in ran.output and ran.output.rstrip().endswith("run.html")
    assert "<h1>made up</h1>" in result_path.with_suffix(".html").read_text()


def test_report_when_asked_for_json_prints_one_object_and_writes_a_page_only_with_o(result_path: Path, tmp_path: Path) -> None:
    ran = report(result_path, "--json")
    assert msgspec.json.decode(ran.stdout)["summary"]["offered"] == 120
    assert not result_path.with_suffix(".html").exists()
    report(result_path, "--json", "-o", tmp_path / "out.html")
    assert (tmp_path / "out.html").exists()


def test_report_when_checked_exits_with_1_for_low_attainment_or_an_invalid_run(result_path: Path) -> None:
    records = made_records(requests=120)
    attainment = made_result(records).summary.attainment
    assert report(result_path, "--check", "--min-attainment", attainment).exit_code == 0
    ran = report(result_path, "--check", "--min-attainment", attainment + 0.001)
    assert ran.exit_code == 1 and "is below" in ran.stderr
    assert report(result_path, "--min-attainment", 1.0).exit_code == 0
    save_result(made_result(records, verdict=Verdict(valid=False, problems=("late",))), records, result_path)
    assert report(result_path, "--check").exit_code == 1
    assert report(result_path).exit_code == 0


def test_report_when_another_objective_is_asked_for_judges_by_it(result_path: Path) -> None:
    found = msgspec.json.decode(report(result_path, "--json", "--ttft-ms", 0.001, "--tpot-ms", 50).stdout)
    assert found["objective"] == {"ttft_s": 1e-6, "ttft_per_token_s": 0.0, "tpot_s": 0.05}
    assert found["summary"]["attainment"] == 0.0
    # Of a microsecond a hundredth is sooner than any sender.
    assert not found["verdict"]["valid"]


def test_compare_when_the_second_is_worse_exits_with_1_unless_tolerated(result_path: Path, slower_path: Path) -> None:
    ran = report("--compare", result_path, slower_path)
    assert ran.exit_code == 1 and "worse by more than 2.0 %" in ran.output
    assert "<h1>A: made up" in (result_path.parent / "run.compare.html").read_text()
    assert report("--compare", result_path, slower_path, "--tolerance", 100_000).exit_code == 0
    assert report("--compare", slower_path, result_path).exit_code == 0
    assert report("--compare", result_path, result_path).exit_code == 0


def test_compare_when_asked_for_json_prints_every_difference(result_path: Path, slower_path: Path) -> None:
    found = msgspec.json.decode(report("--compare", "--json", result_path, slower_path).stdout)
    assert found["paired"] is True
    assert {"attainment", "TTFT p99", "TPOT mean"} <= {difference["name"] for difference in found["differences"]}


def test_report_when_input_is_bad_exits_with_2_and_says_why(result_path: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ([tmp_path / "none.json"], "none.json: No such file"),
        (["--compare", result_path], "--compare takes two results, not 1"),
        ([result_path, "-o", tmp_path / "no" / "out.html"], "out.html: No such file"),
    ):
        ran = report(*arguments)
        assert ran.exit_code == 2 and message in ran.stderr.replace("\n", "")
