"""A check passes only if its value is there, is a number, and is within the limit."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.recipe import PROJECT, Gate
from pipeline.core.recipe import load as load_recipe
from pipeline.core.stage import DEFAULT_RECIPE
from pipeline.judge import gates, metrics
from pipeline.judge.gates import Measurement
from pipeline.judge.metrics import Estimate


def kld(value: float | None) -> Measurement:
    return Measurement(metric="kld", name="KLD", value=value, against="fp32")


@pytest.mark.parametrize(
    ("gate", "figure", "passed"),
    [
        (Gate(kld=0.01), kld(0.01), True),
        (Gate(kld=0.01), kld(0.010001), False),
        (Gate(top1=0.96), Measurement(metric="top1", name="top-1", value=0.96), True),
        (Gate(top1=0.96), Measurement(metric="top1", name="top-1", value=0.9599), False),
        (Gate(integer_share=0.9), Measurement(metric="integer_share", name="share", value=0.91), True),
        (Gate(integer_share=0.9), Measurement(metric="integer_share", name="share", value=0.89), False),
    ],
)
def test_limits_are_inclusive_and_one_sided(gate: Gate, figure: Measurement, passed: bool) -> None:
    (check,) = gates.judge("int8", gate, [figure])
    assert check.passed is passed


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_a_value_that_is_no_number_does_not_pass(value: float | None) -> None:
    (check,) = gates.judge("int8", Gate(kld=0.01), [kld(value)])
    assert not check.passed and check.value is None
    assert "not known" in check.sentence()


def estimated(metric: str, value: float, low: float, high: float, positions: int = 2048) -> Measurement:
    return Measurement.estimated(metric, metric, Estimate(value, low, high), positions)


@pytest.mark.parametrize(
    ("figure", "status"),
    [
        (estimated("kld", 0.008, 0.007, 0.01), "pass"),
        (estimated("kld", 0.009, 0.007, 0.0101), "inconclusive"),
        (estimated("kld", 0.011, 0.0099, 0.013), "inconclusive"),
        (estimated("kld", 0.02, 0.011, 0.03), "fail"),
        (estimated("top1", 0.97, 0.96, 0.98), "pass"),
        (estimated("top1", 0.97, 0.955, 0.98), "inconclusive"),
        (estimated("top1", 0.94, 0.93, 0.95), "fail"),
        (estimated("perplexity_ratio_min", 1.0, 0.993, 1.1), "pass"),
        (estimated("perplexity_ratio_min", 1.0, 0.9929, 1.1), "inconclusive"),
        (estimated("perplexity_ratio_min", 0.99, 0.98, 0.992), "fail"),
        (estimated("perplexity_ratio_max", 1.0, 0.9, 1.007), "pass"),
        (estimated("perplexity_ratio_max", 1.0, 0.9, 1.0071), "inconclusive"),
        (estimated("perplexity_ratio_max", 1.01, 1.008, 1.02), "fail"),
        (Measurement(metric="perplexity_ratio_max", name="ratio", value=None), "not measured"),
        (estimated("kld", 0.0, 0.0, 0.0, gates.FEWEST), "pass"),
        (estimated("kld", 0.0, 0.0, 0.0, gates.FEWEST - 1), "inconclusive"),
        (estimated("kld", 0.9, 0.9, 0.9, gates.FEWEST - 1), "inconclusive"),
        (estimated("kld", math.nan, math.nan, math.nan), "fail"),
        (estimated("kld", math.inf, math.nan, math.nan), "fail"),
        (kld(None), "not measured"),
        (kld(0.5), "fail"),
    ],
)
def test_a_check_ends_in_one_of_four_ways(figure: Measurement, status: str) -> None:
    limits = {"kld": 0.01, "top1": 0.96, "perplexity_ratio_min": 0.993, "perplexity_ratio_max": 1.007}
    (check,) = gates.judge("int8", Gate(**{figure.metric: limits[figure.metric]}), [figure])
    assert check.status == status and check.passed == (status == "pass")
    assert check.facts()["status"] == status and check.facts()["passed"] is check.passed


@given(st.floats(0, 1), st.floats(0, 0.1), st.floats(0, 0.1), st.floats(0, 1))
def test_only_an_interval_that_keeps_the_limit_passes(value: float, down: float, up: float, limit: float) -> None:
    figure = estimated("kld", value, value - down, value + up)
    (check,) = gates.judge("int8", Gate(kld=limit), [figure])
    assert check.passed == (value + up <= limit)
    assert (check.status == "fail") == (value - down > limit)


@given(st.floats(0.9, 1.1), st.floats(0, 0.05), st.floats(0, 0.05))
def test_a_perplexity_is_bounded_on_both_sides(value: float, down: float, up: float) -> None:
    between = Gate(perplexity_ratio_min=0.98, perplexity_ratio_max=1.02)
    figures = [
        estimated(f"perplexity_ratio_{side}", value, value - down, value + up, positions=64) for side in ("min", "max")
    ]
    checks = gates.judge("int8", between, figures)
    assert [check.direction for check in checks] == [">=", "<="]
    assert all(check.passed for check in checks) == (value - down >= 0.98 and value + up <= 1.02)


def test_closeness_is_judged_by_divergence_agreement_and_perplexity() -> None:
    random = np.random.default_rng(1)
    reference = random.normal(size=(640, 30))
    scores = metrics.compare(reference, reference + 0.1 * random.normal(size=(640, 30)), np.arange(640) % 30)
    summary = metrics.summarise(scores, np.arange(640) // 16)
    figures = gates.quality("on text", summary, against="fp32", detail="640 positions")
    limits = Gate(kld=1.0, top1=0.5, perplexity_ratio_min=0.9, perplexity_ratio_max=1.1)
    checks = gates.judge("int8", limits, figures)
    assert [check.name.removesuffix(" on text") for check in checks] == [
        "KLD",
        "top-1 agreement",
        "perplexity ratio",
        "perplexity ratio",
    ]
    ratio = np.exp(scores.nll.mean() - scores.reference_nll.mean())
    for check in checks[2:]:
        assert check.passed and check.value == pytest.approx(ratio)
        assert check.low is not None and check.high is not None and check.low < ratio < check.high
        assert f"95 % interval {check.low:.4f} to {check.high:.4f}" in check.detail


def test_an_undecided_check_says_why() -> None:
    (check,) = gates.judge("int8", Gate(kld=0.01), [estimated("kld", 0.009, 0.007, 0.0101)])
    assert check.sentence() == (
        "int8: kld is 0.009 (95 % interval 0.007 to 0.0101: too few positions to tell), the limit is <= 0.01"
    )


def test_a_limit_without_a_figure_does_not_pass() -> None:
    checks = gates.judge("int8", Gate(kld=0.01, integer_share=0.9), [kld(0.001)])
    assert [(check.name, check.passed) for check in checks] == [("KLD", True), ("integer_share", False)]


@pytest.mark.parametrize("gate", [None, Gate()])
def test_a_variant_without_limits_does_not_pass(gate: Gate | None) -> None:
    (check,) = gates.judge("int8", gate, [kld(0.0)])
    assert not check.passed and "missing from the recipe" in check.sentence()


def test_every_figure_of_a_metric_is_judged() -> None:
    checks = gates.judge("fp32", Gate(kld=0.01), [kld(0.001), kld(0.5)])
    assert [check.passed for check in checks] == [True, False]


def test_a_sentence_says_value_limit_and_reference() -> None:
    (check,) = gates.judge("int8", Gate(kld=0.01), [kld(0.5)])
    assert check.sentence() == "int8: KLD is 0.5, the limit is <= 0.01 (against fp32)"


def test_a_violation_fails_whatever_the_recipe_says() -> None:
    assert gates.must_hold("int8", "shapes", 0, 3).passed
    assert gates.must_hold("int8", "shapes", 1, 3).status == "fail"


def test_what_holds_in_no_case_is_inconclusive() -> None:
    check = gates.must_hold("int8", "shapes", 0, 0)
    assert check.status == "inconclusive" and not check.passed
    assert check.sentence() == "int8: shapes is 0 (of no case: nothing was tried), the limit is <= 0"


@given(st.floats(allow_nan=True), st.floats(0, 1))
def test_nothing_beyond_the_limit_passes(value: float, limit: float) -> None:
    (low,) = gates.judge("v", Gate(kld=limit), [kld(value)])
    (high,) = gates.judge("v", Gate(top1=limit), [Measurement(metric="top1", name="top-1", value=value)])
    assert low.passed == (math.isfinite(value) and value <= limit)
    assert high.passed == (math.isfinite(value) and value >= limit)


def test_the_shipped_recipe_has_limits_for_every_variant() -> None:
    recipe = load_recipe(PROJECT / DEFAULT_RECIPE)
    named = [gates.gate_name(name, None) for name in ("fp32", "fp16")]
    named += [gates.gate_name("int8", scheme) for scheme in ("dynamic", "static", "static16")]
    assert named == ["fp32", "fp16", "int8-dynamic", "int8-static", "int8-static16"]
    assert all(recipe.gates[name].kld and recipe.gates[name].top1 for name in named)


def test_an_int8_folder_that_does_not_say_its_scheme_has_no_limits() -> None:
    recipe = load_recipe(PROJECT / DEFAULT_RECIPE)
    assert recipe.gates.get(gates.gate_name("int8", None)) is None
