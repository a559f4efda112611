"""Figures: when a target counts as reached."""

import json

import pytest

from loadtest.micro.figure import Figure, print_figures


def figure(value: float, **fields: object) -> Figure:
    return Figure(name="speed", value=value, unit="tokens/s", runs=5, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "fields", "reached"),
    [
        (170.0, {"reference": 100.0, "target": 1.7}, True),
        (169.0, {"reference": 100.0, "target": 1.7}, False),
        (14.0, {"target": 15, "at_most": True, "on_ratio": False}, True),
        (16.0, {"target": 15, "at_most": True, "on_ratio": False}, False),
        (1.0, {"reference": 100.0}, True),
    ],
)
def test_reached_when_compared_with_the_target_follows_its_direction(value: float, fields: dict[str, object], reached: bool) -> None:
    assert figure(value, **fields).reached is reached


def test_print_figures_as_json_gives_value_reference_score_and_target(capsys: pytest.CaptureFixture[str]) -> None:
    print_figures([figure(30.0, reference=10.0, reference_name="slow", target=2.0)], {"threads": 1}, as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert printed["conditions"] == {"threads": 1}
    [row] = printed["figures"]
    assert (row["name"], row["value"], row["reference"], row["score"], row["target"], row["reached"]) == (
        "speed",
        30.0,
        10.0,
        3.0,
        2.0,
        True,
    )
