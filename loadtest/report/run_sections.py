"""Sections of a report: stages, caches, tenants, single requests, configuration. Each is None when there is nothing to show."""

from collections import Counter
from collections.abc import Sequence

from loadtest.attribution import e2e_stages, ttft_stages
from loadtest.records import Outcome, RequestRecord
from loadtest.report.page import Plot, Row, Section, Table
from loadtest.report.plots import caches as cache_plots
from loadtest.report.plots import stages as stage_plots
from loadtest.report.plots.attainment_by_rate import attainment_by_rate, probes_of
from loadtest.report.plots.one_request import timeline
from loadtest.report.stacks import stacks
from loadtest.report.text import DASH, milliseconds, percent, size
from loadtest.result import Result

NUM_SLOWEST = 12


def faults(result: Result) -> Section | None:
    rows = tuple(
        Row((str(number), f"{fault.at_s:,.1f} s", fault.kind, fault.worker_id, _seconds(fault.detected_s), _seconds(fault.recovered_s)))
        for number, fault in enumerate(result.faults, 1)
    )
    head = ("no.", "at", "fault", "worker", "detected after", "95 % of goodput after")
    text = "" if result.exactness is None else f"{result.exactness}."
    return Section("faults", "Faults", text, tables=(Table(head, rows, frozenset({1, 4, 5})),)) if rows else None


def stages(completed: Sequence[RequestRecord]) -> Section | None:
    found = {
        "TTFT": stacks(completed, lambda record: record.ttft_s, ttft_stages),
        "E2E": stacks(completed, lambda record: record.e2e_s, e2e_stages),
    }
    plots = tuple(Plot(f"stages-{name.lower()}", stage_plots.stacked(stack, name=name), name) for name, stack in found.items() if stack)
    text = (
        "Percentiles of stages do not add up, so each stack is the mean, stage by stage, of the requests whose latency lies around that "
        "percentile: 2 % of all on each side."
    )
    return Section("stages", "Where the time goes", text, plots, wide=True) if plots else None


def broke(result: Result) -> Section | None:
    counts = result.summary.broke
    if not counts:
        return None
    breaker = result.summary.breaker
    winner = f"{breaker.replace('_', ' ')} broke the objective most often: {counts[breaker]:,} requests. " if breaker else ""
    text = (
        winner + "Of a request with a late first token, the stage that exceeded its median among good requests by most; of one with slow "
        "tokens, decode; of one that did not complete, how it ended."
    )
    return Section(
        "broke", "What broke the objective", text[0].upper() + text[1:], (Plot("broke-plot", stage_plots.broke(counts)),), wide=True
    )


def caches(result: Result) -> Section | None:
    if result.summary.reuse is None:
        return None
    request_mean = percent(result.summary.reuse_request_mean)
    text = f"Prompt tokens not computed again ÷ all prompt tokens. Mean of each request's own ratio: {request_mean}."
    if result.ceilings is None:
        text += " The ceilings of this schedule were not computed."
    elif result.ceilings.one_pool:
        text += f" Achieved ÷ one pool's ceiling: {percent(result.summary.reuse / result.ceilings.one_pool)}."
    return Section("caches", "Cache hits", text, (Plot("caches-plot", cache_plots.reuse(result.summary, result.ceilings)),), wide=True)


def kv(result: Result) -> Section | None:
    moved, expected = result.summary.kv_bytes, result.summary.kv_bytes_expected
    if expected is None:
        return None
    ratio = f" Moved ÷ expected: {moved / expected:.3f}." if expected else ""
    text = f"{size(moved)} moved from prefill to decode workers; the prompts computed elsewhere need {size(expected)}.{ratio}"
    if expected and not moved:
        text += " Nothing moved: prefill and decode were not separate."
    return Section("kv", "KV moved", text, (Plot("kv-plot", cache_plots.kv_bytes(moved, expected)),), wide=True)


def tenants(result: Result) -> Section | None:
    found = result.summary.tenants
    if not found:
        return None
    rows = tuple(
        Row((name or "(none)", f"{tenant.offered:,}", f"{tenant.good:,}", percent(tenant.attainment)))
        for name, tenant in sorted(found.items(), key=lambda item: item[1].attainment)
    )
    jain = result.summary.jain
    text = "The worst first. " + ("" if jain is None else f"Jain's index of their attainments: {jain:.3f} (1: all fare alike).")
    return Section("tenants", "Tenants", text, tables=(Table(("tenant", "offered", "good", "attainment"), rows, frozenset({1, 2, 3})),))


def by_rate(results: Sequence[Result]) -> Section | None:
    probes = probes_of(results)
    if len({probe.rate for probe in probes}) < 2:
        return None
    text = "; ".join(str(result.capacity) for result in results if result.capacity is not None)
    return Section("by-rate", "Attainment against rate", text, (Plot("by-rate-plot", attainment_by_rate(probes)),), wide=True)


def timelines(completed: Sequence[RequestRecord]) -> Section | None:
    """The median request and the worst one, by TTFT, which is what queues lengthen."""
    staged = sorted(
        (record for record in completed if record.stages and record.ttft_s is not None),
        key=lambda record: (record.ttft_s or 0.0, record.index),
    )
    if not staged:
        return None
    chosen = {"median": staged[(len(staged) - 1) // 2], "worst": staged[-1]}
    plots = tuple(
        Plot(f"timeline-{name}", timeline(record), f"The {name} by TTFT: request {record.index}, {_about(record)}")
        for name, record in chosen.items()
    )
    return Section("timelines", "One request, stage by stage", "", plots, wide=True)


def slowest(completed: Sequence[RequestRecord]) -> Section | None:
    timed = sorted((record for record in completed if record.ttft_s is not None), key=lambda record: -(record.ttft_s or 0.0))
    rows = tuple(
        Row(
            (
                str(record.index),
                f"{record.at_s:,.2f} s",
                f"{record.input_tokens:,}",
                DASH if record.cached_tokens is None else f"{record.cached_tokens:,}",
                f"{record.output_tokens:,}",
                milliseconds(_ms(record.ttft_s)),
                milliseconds(_ms(record.tpot_s)),
                milliseconds(_ms(record.e2e_s)),
                _longest_stage(record),
                " → ".join(filter(None, (record.prefill_worker_id, record.decode_worker_id))) or DASH,
            )
        )
        for record in timed[:NUM_SLOWEST]
    )
    head = ("request", "due at", "prompt tokens", "cached", "output tokens", "TTFT", "TPOT", "E2E", "longest stage before it", "workers")
    return Section("slowest", "Slowest first tokens", tables=(Table(head, rows, frozenset({*range(1, 8), 9})),)) if rows else None


def errors(records: Sequence[RequestRecord]) -> Section | None:
    counts = Counter((record.outcome.value, record.error or DASH) for record in records if record.outcome is not Outcome.COMPLETED)
    rows = tuple(Row((f"{count:,}", outcome, error)) for (outcome, error), count in counts.most_common(NUM_SLOWEST))
    return (
        Section("errors", "Requests that came to nothing", tables=(Table(("requests", "outcome", "error"), rows, frozenset({0})),))
        if rows
        else None
    )


def configuration(result: Result) -> Section:
    schedule, cluster = result.schedule, result.cluster
    per_token = f" + {result.objective.ttft_per_token_s * 1e3:g} ms × prompt tokens" if result.objective.ttft_per_token_s else ""
    facts: list[tuple[str, object]] = [
        ("command", " ".join(result.command)),
        ("objective", f"TTFT {result.objective.ttft_s * 1e3:g} ms{per_token}, TPOT {result.objective.tpot_s * 1e3:g} ms"),
        ("Baton", f"{result.baton}, commit {result.commit}" if result.commit else result.baton),
        ("machine", result.machine),
        ("created", result.created),
        ("schedule", schedule.source),
        ("schedule digest", schedule.digest),
        ("schedule size", f"{schedule.requests:,} requests in {schedule.duration_s:,.1f} s, seed {schedule.seed}"),
        ("target", cluster.target),
        ("model", cluster.model),
        ("prefill workers", cluster.prefill_workers),
        ("decode workers", cluster.decode_workers),
        ("KV blocks per worker", None if cluster.blocks_per_worker is None else f"{cluster.blocks_per_worker:,}"),
        ("tokens per KV block", cluster.block_size),
        ("bytes per KV block", None if cluster.block_bytes is None else size(cluster.block_bytes)),
        (
            "sum of stages",
            None if result.summary.residual_within is None else f"{percent(result.summary.residual_within)} within 1 % or 2 ms of E2E",
        ),
        *((key.replace("_", " "), value) for key, value in result.extra.items() if isinstance(value, str | int | float)),
    ]
    rows = tuple(Row((name, str(value))) for name, value in facts if value not in (None, ""))
    return Section("configuration", "How it was made", tables=(Table(("what", "value"), rows),))


def _about(record: RequestRecord) -> str:
    cached = "" if record.cached_tokens is None else f" ({record.cached_tokens:,} cached)"
    return f"{record.input_tokens:,} prompt tokens{cached}, {record.output_tokens:,} output tokens"


def _longest_stage(record: RequestRecord) -> str:
    found = ttft_stages(record)
    if not found:
        return DASH
    stage = max(found, key=lambda name: found[name])
    return f"{stage.replace('_', ' ')}, {milliseconds(found[stage] * 1e3)}"


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:,.2f} s"


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3
