"""What was measured, a table a file: `bench/*.json` as frozen dataclasses, and the Markdown that is made of them.

A row has values with their units, and says by which command, when and on what it was measured: the table's word for
all rows, or its own where it differs. So no date and no ratio is ever written by hand.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.core import manifest, toml
from pipeline.core.recipe import PROJECT

BENCH = PROJECT / "bench"
RAW = BENCH / "raw"
"""All that a benchmark saw, such as memory over time: too much for git, enough for the next run to go on from."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """How a column's values are written: the unit, and digits in `format`'s words (`.2f`)."""

    unit: str = ""
    digits: str = ""

    def text(self, value: float) -> str:
        """`value` with its unit, if it has one: `1.50 GiB`, `98.6%`."""
        space = "" if self.unit in ("", "%") else " "
        return f"{value:{self.digits}}{space}{self.unit}"


@dataclass(frozen=True, kw_only=True)
class Value:
    """A figure and, where it has one, its 95 % interval; in the unit of its column."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The day (`2026-11-29`), the command, the machine and the versions of what was measured with."""

    date: str
    command: str
    machine: str
    versions: str = ""
    source: str = ""

    def text(self) -> str:
        """All of it in a sentence."""
        versions = f"; {self.versions}" if self.versions else ""
        source = f" {self.source}" if self.source else ""
        return f"{self.command} on {self.date}, {self.machine}{versions}.{source}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of a table: values by column, and how it was measured where that is not the table's word."""

    name: str
    values: Mapping[str, Value]
    measured: Measured | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table, what it is of, and its place on the page. `ratios` are pairs of rows, the first over the second."""

    title: str
    about: str
    place: int
    columns: Mapping[str, Column]
    measured: Measured
    rows: tuple[Row, ...]
    ratios: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    picture: str = ""

    def __post_init__(self) -> None:
        names = [row.name for row in self.rows]
        unknown = {name for row in self.rows for name in row.values} - {*self.columns}
        unknown |= {name for pair in self.ratios for name in pair} - {*names}
        if unknown or len({*names}) < len(names):
            raise ValueError(f"table {self.title!r}: unknown {sorted(unknown)}, or two rows of one name")

    def row(self, name: str) -> Row:
        """The row of that name."""
        return next(row for row in self.rows if row.name == name)


def read(file: Path) -> Table:
    """The table in `file`.

    Raises:
        ValueError: it is no JSON, or has an unknown, missing or wrongly typed key.
    """
    table = toml.build(Table, json.loads(file.read_text(encoding="utf-8")), file.name)
    assert isinstance(table, Table)
    return table


def read_all(folder: Path = BENCH) -> dict[str, Table]:
    """Every table in `folder` by its file's name without `.json`, in their order on the page."""
    found = {file.stem: read(file) for file in sorted(folder.glob("*.json"))}
    return dict(sorted(found.items(), key=lambda pair: pair[1].place))


def write_all(found: Mapping[str, Table], folder: Path = BENCH) -> None:
    """Write tables as the files of these names, figures rounded as they will be shown."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in found.items():
        manifest.write_atomically(folder / f"{name}.json", dump(table))


def dump(table: Table) -> str:
    """The table as JSON, keys in the order of their meaning."""
    rows = [_plain(row) | {"values": _shown(row, table.columns)} for row in table.rows]
    return json.dumps(_plain(table) | {"rows": rows}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(of: Table | Row) -> dict[str, object]:
    """The fields that are set, as JSON has them."""

    def set_alone(pairs: Iterable[tuple[str, object]]) -> dict[str, object]:
        return {key: value for key, value in pairs if value not in (None, "", ())}

    return dataclasses.asdict(of, dict_factory=set_alone)


def _shown(row: Row, columns: Mapping[str, Column]) -> dict[str, dict[str, float]]:
    """The row's values with as many digits as are shown: more would change with every run, and say nothing."""
    return {
        name: {
            key: float(format(number, columns[name].digits))
            for key, number in dataclasses.asdict(value).items()
            if number is not None
        }
        for name, value in row.values.items()
    }


def joined(earlier: Table, new: Table) -> Table:
    """`new` with those rows of an `earlier` measurement in front that it has not, which say how they were measured."""
    names = {row.name for row in new.rows}
    kept = [row for row in earlier.rows if row.name not in names]
    told = [dataclasses.replace(row, measured=row.measured or earlier.measured) for row in kept]
    return dataclasses.replace(new, rows=(*told, *new.rows))


def markdown(table: Table) -> list[str]:
    """The table's lines: head, rows, ratios."""
    lines = [f"| | {' | '.join(table.columns)} |", "|---|" + "---|" * len(table.columns)]
    for row in table.rows:
        cells = [_cell(column, row.values.get(name)) for name, column in table.columns.items()]
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    for over, under in table.ratios:
        cells = [_ratio(table.row(over).values.get(name), table.row(under).values.get(name)) for name in table.columns]
        lines.append(f"| {over} / {under} | {' | '.join(cells)} |")
    return lines


def _cell(column: Column, value: Value | None) -> str:
    if value is None:
        return "–"
    if value.low is None or value.high is None:
        return column.text(value.value)
    return f"{column.text(value.value)} ({value.low:{column.digits}} to {value.high:{column.digits}})"


def _ratio(over: Value | None, under: Value | None) -> str:
    """Of figures that have no interval: with one, the two intervals beside each other say more."""
    if over is None or under is None or over.low is not None or not under.value:
        return ""
    return f"{over.value / under.value:.2f}"


def origins(table: Table) -> list[str]:
    """How the rows were measured: one sentence if all in the same way, else one for each way, with its rows."""
    ways: dict[Measured, list[str]] = {}
    for row in table.rows:
        ways.setdefault(row.measured or table.measured, []).append(row.name)
    if len(ways) == 1:
        return [f"Measured by {way.text()}" for way in ways]
    return [f"- {', '.join(names)}: measured by {way.text()}" for way, names in ways.items()]


def section(table: Table) -> list[str]:
    """All that the page says of the table."""
    lines = [f"## {table.title}", "", table.about, "", *markdown(table), "", *origins(table)]
    for note in table.notes:
        lines += ["", note]
    return lines + (["", f"![{table.title}](../bench/{table.picture})"] if table.picture else [])


def replaced(text: str, name: str, new: str, by: str = "tools.figures") -> str:
    """`text` with `new` between the markers of `name`, which say what writes it."""
    begin, end = f"<!-- {name}: written by `python -m {by}` -->\n", f"<!-- end of {name} -->"
    before, begun, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not begun or not ended or begin in after:
        raise ValueError(f"README.md has not one place for {name}")
    return f"{before}{begin}{new}\n{end}{after}"
