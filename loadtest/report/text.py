"""Numbers as people read them, with their units; None is a dash."""

from loadtest.metrics import Distribution

DASH = "—"


def milliseconds(value: float | None) -> str:
    """Three significant digits, seconds from ten of them on."""
    if value is None:
        return DASH
    if abs(value) >= 10_000:
        return f"{value / 1e3:,.1f} s"
    return f"{three_digits(value)} ms"


def percentiles(values: Distribution | None) -> str:
    """Median, 90th and 99th percentile in ms."""
    return DASH if values is None else f"{three_digits(values.p50)} / {three_digits(values.p90)} / {three_digits(values.p99)}"


def three_digits(value: float | None) -> str:
    """Thousands in groups; no more decimals than three significant digits need."""
    if value is None:
        return DASH
    if value == 0:
        return "0"
    size = abs(value)
    return f"{value:,.{0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3}f}"


def percent(share: float | None) -> str:
    """One decimal; two close to all and nothing, where a tenth is a lot."""
    if share is None:
        return DASH
    return f"{share:.{2 if 0 < share < 0.01 or 0.99 < share < 1 else 1}%}".replace("%", " %")


def rate(per_s: float | None) -> str:
    return DASH if per_s is None else f"{three_digits(per_s)} /s"


def size(num_bytes: float | None) -> str:
    """In binary units."""
    if num_bytes is None:
        return DASH
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:,.0f} B" if unit == "B" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.1f} TiB"
