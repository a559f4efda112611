"""The report of one result: from whether to believe it, over what it says, to how it was made."""

from collections.abc import Sequence

from loadtest.records import Outcome, RequestRecord
from loadtest.report import latency_sections, run_sections
from loadtest.report.page import Banner, Page, Tile
from loadtest.report.text import milliseconds, percent, percentiles, rate, three_digits
from loadtest.result import Result


def run_page(result: Result, records: Sequence[RequestRecord], others: Sequence[Result] = ()) -> Page:
    """`others` are further runs of the same cluster at other rates."""
    page = Page(title=result.name, subtitle=_subtitle(result))
    page.banners.append(_verdict(result))
    page.tiles += tiles(result)
    completed = [record for record in records if record.outcome is Outcome.COMPLETED]
    reason = "the file of the requests holds none" if result.records else "the result came without its requests"
    if not completed and records:
        reason = "no request completed"
    for name, section in (("TTFT", latency_sections.ttft(result, completed)), ("TPOT", latency_sections.tpot(result, completed))):
        page.add(section, otherwise=(f"{name} distribution", reason if not completed else "no request tells it"))
    page.add(latency_sections.over_time(result, records), otherwise=("Over time", reason))
    page.add(run_sections.faults(result))
    page.add(run_sections.stages(completed), otherwise=("Stages", "the server told no stages" if completed else reason))
    page.add(run_sections.broke(result), otherwise=("What broke the objective", "every request kept it"))
    page.add(run_sections.caches(result), otherwise=("Cache hits", "the server told no cached tokens"))
    page.add(run_sections.kv(result), otherwise=("KV moved", "the expected number of bytes is not known"))
    page.add(run_sections.tenants(result), otherwise=("Tenants", "the requests name none"))
    page.add(run_sections.by_rate([result, *others]), otherwise=("Attainment against rate", "there is one rate only"))
    page.add(run_sections.timelines(completed), otherwise=("One request", "the server told no stages" if completed else reason))
    page.add(run_sections.slowest(completed), otherwise=("Slowest requests", reason))
    page.add(run_sections.errors(records))
    page.add(run_sections.configuration(result))
    return page


def tiles(result: Result) -> list[Tile]:
    """The headline figures."""
    summary, ceilings = result.summary, result.ceilings
    limits = (
        ""
        if ceilings is None
        else (f"infinite {percent(ceilings.infinite)}, one pool {percent(ceilings.one_pool)}, in turn {percent(ceilings.round_robin)}")
    )
    found = [
        Tile(
            "attainment",
            percent(summary.attainment),
            f"{summary.good:,} of {summary.offered:,}; 95 %: {percent(summary.attainment_low)} to {percent(summary.attainment_high)}",
        ),
        Tile("goodput", rate(summary.goodput), "within the objective, per second of the schedule"),
        Tile("offered → achieved", f"{rate(summary.offered_rate)} → {rate(summary.achieved_rate)}", f"{summary.completed:,} completed"),
        Tile("TTFT p50 / p90 / p99, ms", percentiles(summary.ttft_ms), f"objective {objective_text(result)[0]}"),
        Tile("TPOT p50 / p90 / p99, ms", percentiles(summary.tpot_ms), f"objective {objective_text(result)[1]}"),
        Tile("E2E p50 / p90 / p99, ms", percentiles(summary.e2e_ms), f"ITL {percentiles(summary.itl_ms)}"),
    ]
    if summary.reuse is not None:
        found.append(Tile("prompt tokens reused", percent(summary.reuse), limits))
    if summary.tokens_per_worker_s is not None:
        found.append(
            Tile("output tokens per worker", f"{three_digits(summary.tokens_per_worker_s)} /s", f"{summary.output_tokens:,} in all")
        )
    not_good = f"{summary.refused:,} refused, {summary.failed:,} failed, {summary.offered - summary.sent:,} unsent"
    found.append(Tile("came to nothing", f"{summary.offered - summary.completed:,}", not_good))
    if summary.lag_ms is not None:
        found.append(Tile("send lag p99", milliseconds(summary.lag_ms.p99), "how late requests left; counts in every latency"))
    return found


def objective_text(result: Result) -> tuple[str, str]:
    """TTFT's and TPOT's."""
    objective = result.objective
    grows = f" + {three_digits(objective.ttft_per_token_s * 1e3)} ms a prompt token" if objective.ttft_per_token_s else ""
    return milliseconds(objective.ttft_s * 1e3) + grows, milliseconds(objective.tpot_s * 1e3)


def _subtitle(result: Result) -> str:
    kinds = {"run": "run against a cluster", "sim": "simulation", "imported": "imported from another tool"}
    source = f"; {result.schedule.source}" if result.schedule.source else ""
    return f"{kinds.get(result.kind, result.kind)}, {result.created}{source}"


def _verdict(result: Result) -> Banner:
    if result.verdict.valid:
        return Banner(good=True, title="Valid.", text="Every request left in time, and the checks of its records found nothing.")
    return Banner(good=False, title="Invalid: do not quote these figures.", points=result.verdict.problems)
