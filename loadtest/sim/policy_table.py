"""Both policies at several arrival speeds as one table, beside what NVIDIA Dynamo's replay of the same trace gave, where that is known."""

from collections.abc import Callable, Mapping
from typing import Any

from rich.table import Table

from loadtest.sim.simulation import Policy

SPEEDUPS = (1.0, 2.0, 3.0, 4.0, 6.0)
COLUMNS = ("reuse", "TTFT mean", "p50", "p90", "p99", "TPOT mean")
Row = tuple[float | None, ...]

# NVIDIA Dynamo 1.6.1, `dynamo.replay` of mooncake_conversation_first30min with its default worker model: 8 prefill and 8 decode workers of
# 2,000 blocks of 512 tokens. Milliseconds; its ties are broken at random, reuse varies by ±.006 and the mean by ±1 %.
DYNAMO_DIGEST = "b677cfd0316516e55a4a072da16491c29207a20a87e8c66a4cac3ea933ca1e34"
DYNAMO: Mapping[tuple[Policy, float], Row] = {
    (Policy.ROUND_ROBIN, 1.0): (0.082, 329, 200, 715, 2066, 6.86),
    (Policy.ROUND_ROBIN, 2.0): (0.082, 345, None, 756, None, 7.72),
    (Policy.ROUND_ROBIN, 3.0): (0.082, 376, None, 837, None, 8.87),
    (Policy.ROUND_ROBIN, 4.0): (0.082, 424, None, 1031, None, 10.20),
    (Policy.ROUND_ROBIN, 6.0): (0.082, 603, 351, 1560, 3010, 14.04),
    (Policy.BATON, 1.0): (0.245, 249, 175, 541, 1761, 6.68),
    (Policy.BATON, 2.0): (0.235, 255, 176, 543, 1765, 7.31),
    (Policy.BATON, 3.0): (0.231, 260, 179, 553, 1765, 8.29),
    (Policy.BATON, 4.0): (0.225, 271, 181, 563, 1771, 9.54),
    (Policy.BATON, 6.0): (0.206, 311, 193, 618, 1783, 13.28),
}


def policy_table(report_of: Callable[[Policy, float], dict[str, Any]], *, beside_dynamo: bool) -> tuple[Table, list[dict[str, Any]]]:
    """The table, and the reports that it was made of. `report_of(policy, speedup)` simulates."""
    table = Table("policy", "speed-up", *COLUMNS, "on decode", title="TTFT and TPOT in ms; reuse of prompt tokens on prefill workers")
    reports = []
    for policy in (Policy.ROUND_ROBIN, Policy.BATON):
        for speedup in SPEEDUPS:
            report = report_of(policy, speedup)
            reports.append({"policy": policy.value, "speedup": speedup, **report})
            ttft = report["ttft_ms"]
            row = (report["prefix_reuse"], ttft["mean"], ttft["p50"], ttft["p90"], ttft["p99"], report["tpot_ms"]["mean"])
            table.add_row(policy.value, f"{speedup:g}", *map(_cell, COLUMNS, row), f"{report['decode_reuse']:.3f}")
            if beside_dynamo:
                peer = "Dynamo's round robin" if policy is Policy.ROUND_ROBIN else "Dynamo's KV router"
                cells = map(_cell, COLUMNS, DYNAMO[policy, speedup])
                table.add_row(peer, "", *cells, "", style="dim", end_section=True)
    return table, reports


def _cell(column: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if column == "reuse" else f"{value:.2f}" if column.startswith("TPOT") else f"{value:,.0f}"
