"""One self-contained HTML page out of sections of text, plots and tables; it loads nothing from anywhere.

Knows nothing of load tests.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import plotly.io
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from loadtest.files import BadInput


@dataclass(frozen=True, slots=True)
class Banner:
    """What has to be read before anything else."""

    good: bool
    title: str
    text: str = ""
    points: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Tile:
    """One headline figure."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Plot:
    """A plotly figure, with a unique anchor."""

    anchor: str
    figure: Any
    title: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """mark: `better`, `worse` or nothing."""

    cells: tuple[str, ...]
    mark: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """numbers: the columns of numbers, which stand on the right."""

    head: tuple[str, ...]
    rows: tuple[Row, ...]
    numbers: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Section:
    """wide: each plot has a row for itself."""

    anchor: str
    title: str
    text: str = ""
    plots: tuple[Plot, ...] = ()
    tables: tuple[Table, ...] = ()
    wide: bool = False


@dataclass(slots=True)
class Page:
    """left_out: sections that would be empty, and why."""

    title: str
    subtitle: str
    banners: list[Banner] = field(default_factory=list)
    tiles: list[Tile] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)

    def add(self, section: Section | None, *, otherwise: tuple[str, str] | None = None) -> None:
        """Adds a section; when there is none, says that and why: `otherwise` is its title and the reason."""
        if section is not None:
            self.sections.append(section)
        elif otherwise is not None:
            self.left_out.append(otherwise)


def render(page: Page) -> str:
    """The page as HTML. Plots are drawn by plotly's script, which it carries once."""
    environment = Environment(
        loader=PackageLoader("loadtest.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    plots = [plot for section in page.sections for plot in section.plots]
    figures = "{" + ",\n".join(f'"{plot.anchor}": {plotly.io.to_json(plot.figure)}' for plot in plots) + "}"
    return environment.get_template("page.jinja").render(
        title=page.title,
        subtitle=page.subtitle,
        banners=page.banners,
        tiles=page.tiles,
        sections=page.sections,
        left_out=page.left_out,
        # Names in a result file are anybody's; to_json() writes "<" as an escape, so that none of them ends the script element.
        figures=Markup(figures) if plots else "",
        plotly_js=Markup(get_plotlyjs()),
    )


def write_page(page: Page, path: Path | None) -> None:
    """Nowhere for None. Raises BadInput when the file cannot be written."""
    if path is None:
        return
    try:
        path.write_text(render(page), encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
