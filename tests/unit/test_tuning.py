"""What tune says to people: the page, the table, the sentence in the recipe."""

from __future__ import annotations

import re
from typing import Any

import pytest

from pipeline.report import tuning


def candidate(name: str, cost: float, kld: float, **more: Any) -> dict[str, Any]:
    interval = {"value": kld, "low": kld * 0.9, "high": kld * 1.1}
    return {
        "name": name,
        "values": {"int8x2": []},
        "shards": 8,
        "finalist": True,
        "size": 1_000_000,
        "relative_size": 1 + cost / 2,
        "speed": {"1": 1.0, "128": 1 / (1 + cost)},
        "cost": cost,
        "positions": 2016,
        "kld": interval,
        "top1": {"value": 0.9, "low": 0.88, "high": 0.92},
        "perplexity_ratio": {"value": 1.0, "low": 0.99, "high": 1.01},
        **more,
    }


def told(*more: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": "a <model>",
        "recipe": "gemma3",
        "section": "int8",
        "date": "2026-11-24",
        "processor": "CPU",
        "threads": 2,
        "minutes": 25,
        "seconds": 600,
        "complete": True,
        "limits": {"size": 1.08, "speed": 0.5},
        "groups": [
            {"name": "mlp", "elements": 1000, "weights": 1e-3, "activations": 2e-3},
            {"name": "not measured", "elements": 10, "weights": None, "activations": None},
        ],
        "frontier": ["plain", "+ int8x2 mlp"],
        "chosen": "+ int8x2 mlp",
        "candidates": [candidate("plain", 0.0, 0.04), candidate("+ int8x2 mlp", 0.2, 0.01), *more],
    }


LATE = candidate("dropped", 0.3, 0.02, finalist=False, speed=None)
UNKNOWN = {"name": "never run", "finalist": False, "speed": None, "cost": 1.0, "relative_size": 1.0}


@pytest.mark.parametrize("more", [(), (LATE, UNKNOWN)])
def test_the_page_holds_every_measured_candidate_and_group(more: tuple[dict[str, Any], ...]) -> None:
    page = tuning.render(told(*more))
    assert "a &lt;model&gt;" in page and "<model>" not in page
    assert page.count('<circle class="dot"') == 2 and page.count('class="chosen"') == 2  # the dot and the row
    assert "4.00e-02" in page and "not measured" in page and "never run" not in page
    assert ("2.00e-02" in page) == bool(more)
    places = [(float(x), float(y)) for x, y in re.findall(r'<circle class="dot" cx="([\d.]+)" cy="([\d.]+)"', page)]
    assert places[0][0] < places[1][0] and places[0][1] < places[1][1], "dearer is right, better is down"


def test_one_candidate_at_no_cost_can_be_drawn() -> None:
    one = told()
    one["candidates"], one["frontier"], one["chosen"] = one["candidates"][:1], ["plain"], "plain"
    assert "<circle" in tuning.render(one)


def test_the_table_marks_the_chosen_one() -> None:
    rows = tuning.table(told(LATE, UNKNOWN))
    assert [row for row in rows if row.startswith("→")] == [row for row in rows if "+ int8x2 mlp" in row]
    assert sum("–" in row for row in rows if row.startswith("not measured")) == 1
    assert not any("never run" in row for row in rows)


def test_a_sentence_says_every_figure() -> None:
    said = tuning.sentence(candidate("x", 0.25, 0.0123))
    assert said == (
        "KLD 1.23e-02 (1.11e-02 to 1.35e-02), top-1 90.0% on 2,016 positions; 1.125 of plain int8's size; "
        "tokens/s 1.000 at S = 1, 0.800 at S = 128"
    )
    assert "tokens/s" not in tuning.sentence(LATE)
