"""The reports for people: an HTML page each from verify's and evaluate's `report.json`, and a table for a terminal.

`python -m pipeline.report.verification artifacts/<model>/verify/report.json` prints the table.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from jinja2 import Environment
from markupsafe import Markup

from pipeline.core import log
from pipeline.core.judgement import Estimate, Report, Summary, Variant
from pipeline.judge import tasks
from pipeline.judge.gates import REFERENCE
from pipeline.report import page, plots, senses

SCHEMA = 2
Row = TypeVar("Row")

_PRECISIONS = {
    "fp32": "float32",
    "fp16": "float16 weights",
    "int8-dynamic": "dynamic int8",
    "int8-static": "full integer int8",
    "int8-static16": "full integer, int8 weights, int16 activations",
    "int4": "4-bit weights",
}
_LOSS = (
    (1e-7, "no measurable loss"),
    (1e-4, "practically no loss"),
    (3e-3, "very small loss"),
    (1e-2, "small loss"),
    (5e-2, "some loss"),
    (math.inf, "clear loss"),
)
"""Mean KLD against Hugging Face up to which the words hold; 1e-2 and 5e-2 are the shipped recipe's int8 limits."""


_ANSWERS = 200
"""Prompts whose answers are on the page."""


def _environment() -> Environment:
    return page.environment(
        figure=figure,
        percent=percent,
        size=log.human_bytes,
        ms=milliseconds,
        change=change,
        loss=loss,
        precision=precision,
    )


def render(report: Report) -> str:
    """The page for verify's `report`, self-contained: no script, no external resource."""
    return (
        _environment()
        .get_template("report.html.jinja")
        .render(
            report=report,
            variants=variants(report),
            distributions=_drawing(plots.kld_distributions, _distributions(report)),
            quality=_drawing(plots.size_against_quality, _points(report)),
            judged=_judged(report),
            losses=_losses(report),
            towers=senses.towers(report),
            talks=senses.talks(report),
            resized=senses.resized(report),
            advice=advice(report),
            failed=[check for check in report["checks"] if not check["passed"]],
            required=required,
            reference_name=REFERENCE,
            figure=figure,
            percent=percent,
            ratio=ratio,
        )
    )


def render_task(report: Mapping[str, object]) -> str:
    """The page for evaluate's `report`, self-contained as well."""
    return (
        _environment()
        .get_template("tasks.html.jinja")
        .render(report=report, titles=tasks.TITLES, fewest=tasks.FEWEST, original=tasks.ORIGINAL, shown=_ANSWERS)
    )


def _drawing(draw: Callable[[Sequence[Row]], str], rows: Sequence[Row]) -> Markup:
    """A plot of `rows`; nothing without any."""
    return Markup(draw(rows) if rows else "")  # noqa: S704 - escaped where it is made


def variants(report: Report) -> dict[str, Variant]:
    """The files by name, in the order in which they were judged (JSON objects are sorted by key)."""
    return {name: report["variants"][name] for name in report["order"]}


def advice(report: Report) -> list[str]:
    """A sentence for each int8 file with static activations that is clearly worse than the one with dynamic ones.

    Clearly: the 95 % intervals of their KLD against fp32 do not touch.
    """
    kld = {
        entry["gate"]: (name, entry["against_fp32"]["kld"])
        for name, entry in variants(report).items()
        if entry["against_fp32"]
    }
    if "int8-dynamic" not in kld:
        return []
    other, best = kld["int8-dynamic"]
    return [
        f"{name} is the wrong choice for this model unless the device takes nothing but integers: its KLD is "
        f"{_interval(own)}, that of {other} {_interval(best)}."
        for gate, (name, own) in kld.items()
        if gate.startswith("int8-static") and _is_above(own, best)
    ]


def _is_above(estimate: Estimate, other: Estimate) -> bool:
    """Whether its whole interval is above that of `other`; no number is above none."""
    low, high = estimate["low"], other["high"]
    return None not in (*estimate.values(), *other.values()) and low is not None and high is not None and low > high


def _interval(estimate: Estimate) -> str:
    return f"{figure(estimate['value'])} ({figure(estimate['low'])} to {figure(estimate['high'])})"


def _judged(report: Report) -> list[tuple[str, str, Summary]]:
    """Every file with what it was held against and the figures of that: fp32 first, where there is one."""
    rows = []
    for name, variant in variants(report).items():
        pairs = (("fp32", variant["against_fp32"]), (REFERENCE, variant["against_reference"]))
        rows += [(name, against, figures) for against, figures in pairs if figures]
    return rows + [(name, REFERENCE, entry["against_reference"]) for name, entry in sorted(report["bundles"].items())]


def _losses(report: Report) -> list[dict[str, object]]:
    """Files that are not close enough to fp32, each with the plot of where it leaves that."""
    return [
        {**found, "name": name, "plot": Markup(plots.signal_to_noise(name, found["curve"]))}  # noqa: S704 - escaped there
        for name, found in sorted(report.get("losses", {}).items())
    ]


def figure(value: float | None) -> str:
    """A number for people: four significant digits, small ones as `1.2 × 10⁻⁵`; a dash for None."""
    if value is None:
        return "–"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}"
    mantissa, power = f"{value:.1e}".split("e")
    return f"{mantissa} × 10{str(int(power)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def percent(value: float | None) -> str:
    """A share as a percentage with two decimals; never rounded up to 100 %."""
    if value is None:
        return "–"
    return f"{min(value, 1.0 if value >= 1 else 0.9999):.2%}".replace("%", "\u00a0%")


def ratio(value: float | None) -> str:
    """A ratio of perplexities."""
    return "–" if value is None else f"× {value:.4f}"


def change(value: float | None) -> str:
    """A ratio of perplexities as what it changes, e.g. `+0.10 %`."""
    return "unknown" if value is None else f"{round((value - 1) * 100, 2) + 0.0:+.2f}\u00a0%"


def milliseconds(seconds: float | None) -> str:
    """Seconds as milliseconds with three significant digits."""
    if seconds is None:
        return "–"
    value = seconds * 1000
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def loss(kld: float | None) -> str:
    """The mean KLD against the reference in words."""
    return "unknown" if kld is None else next(words for limit, words in _LOSS if kld <= limit)


def precision(gate: str) -> str:
    """What the kind of file `gate` is called."""
    return _PRECISIONS.get(gate, gate)


def _distributions(report: Report) -> list[plots.Distribution]:
    """Each file against what its limit is against: fp32 against Hugging Face, the others against fp32."""
    rows = []
    for name, variant in variants(report).items():
        figures = variant["against_fp32"] or variant["against_reference"]
        rows.append(
            plots.Distribution(
                name=name,
                against="fp32" if variant["against_fp32"] else REFERENCE,
                counts=variant["kld_histogram"],
                mean=figures["kld"]["value"] or 0.0,
                limit=variant["limits"].get("kld"),
            )
        )
    return rows


def _points(report: Report) -> list[plots.Point]:
    points = []
    for name, variant in variants(report).items():
        kld = variant["against_reference"]["kld"]
        value, low, high = kld["value"], kld["low"], kld["high"]
        if value is not None and low is not None and high is not None:
            points.append(plots.Point(name=name, size=variant["size"], kld=value, low=low, high=high))
    return points


def table(report: Report) -> list[str]:
    """The step graphs and the bundles compared, as aligned lines of text."""
    steps = _steps(report) if report["variants"] else []
    return steps + (_bundles(report) if report["bundles"] else [])


def required(report: Report, name: str) -> bool:
    """Whether the build stands or falls with a file."""
    return all(check["variant"] != name for check in report["alternative_checks"])


def _verdict(report: Report, name: str, *, fit: bool) -> str:
    return "passed" if fit else "FAILED" if required(report, name) else "not fit to publish"


def _bundles(report: Report) -> list[str]:
    rows = [["bundle", "size", "worst NMSE/HF", "KLD/HF", "top-1/HF", "ids", "prompts", "texts", "verdict"]]
    for name, bundle in sorted(report["bundles"].items()):
        ids, prompts, greedy, scores = (
            bundle["token_ids"],
            bundle["prompts"],
            bundle["greedy"],
            bundle["against_reference"],
        )
        rows.append(
            [
                name,
                log.human_bytes(bundle["size"]),
                figure(scores["nmse_max"]),
                figure(scores["kld"]["value"]),
                percent(scores["top1"]["value"]),
                f"{ids['total'] - ids['wrong']}/{ids['total']}",
                f"{prompts['total'] - prompts['wrong']}/{prompts['total']}" if prompts else "–",
                f"{greedy['same']}/{len(greedy['rows'])}",
                _verdict(report, name, fit=bundle["fit"]),
            ]
        )
    return log.align(rows)


def _steps(report: Report) -> list[str]:
    head = ["file", "size", "ratio", "load ms", *(f"S={sequence} ms" for sequence in report["sequences"])]
    head += ["KLD/fp32", "top-1/fp32", "KLD/HF", "top-1/HF", "perplexity", "integer", "verdict"]
    rows = [head]
    for name, variant in variants(report).items():
        speed, ours = report["speed"][name]["xnnpack"], variant["against_fp32"]
        theirs = variant["against_reference"]
        rows.append(
            [
                f"{name} ({precision(variant['gate'])})",
                log.human_bytes(variant["size"]),
                figure(variant["size_ratio"]),
                milliseconds(speed["load"]),
                *(milliseconds(speed["latency"][str(sequence)]) for sequence in report["sequences"]),
                figure(ours["kld"]["value"]) if ours else "–",
                percent(ours["top1"]["value"]) if ours else "–",
                figure(theirs["kld"]["value"]),
                percent(theirs["top1"]["value"]),
                figure(theirs["perplexity"]),
                percent(variant["integer_share"]),
                _verdict(report, name, fit=variant["fit"]),
            ]
        )
    return log.align(rows)


def main(arguments: Sequence[str]) -> int:
    """Print the table of the report whose path is the one argument."""
    if len(arguments) != 1 or not Path(arguments[0]).is_file():
        log.line("usage: python -m pipeline.report.verification artifacts/<model>/verify/report.json")
        return 2
    for row in table(json.loads(Path(arguments[0]).read_text(encoding="utf-8"))):
        log.line(row)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
