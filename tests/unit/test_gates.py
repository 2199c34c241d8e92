"""A check passes only if its value is there, is a number, and is within the limit."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.recipe import PROJECT, Gate
from pipeline.core.recipe import load as load_recipe
from pipeline.core.stage import DEFAULT_RECIPE
from pipeline.judge import gates
from pipeline.judge.gates import Figure


def kld(value: float | None) -> Figure:
    return Figure(metric="kld", name="KLD", value=value, against="fp32")


@pytest.mark.parametrize(
    ("gate", "figure", "passed"),
    [
        (Gate(kld=0.01), kld(0.01), True),
        (Gate(kld=0.01), kld(0.010001), False),
        (Gate(top1=0.96), Figure(metric="top1", name="top-1", value=0.96), True),
        (Gate(top1=0.96), Figure(metric="top1", name="top-1", value=0.9599), False),
        (Gate(integer_share=0.9), Figure(metric="integer_share", name="share", value=0.91), True),
        (Gate(integer_share=0.9), Figure(metric="integer_share", name="share", value=0.89), False),
    ],
)
def test_limits_are_inclusive_and_one_sided(gate: Gate, figure: Figure, passed: bool) -> None:
    (check,) = gates.judge("int8", gate, [figure])
    assert check.passed is passed


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_a_value_that_is_no_number_does_not_pass(value: float | None) -> None:
    (check,) = gates.judge("int8", Gate(kld=0.01), [kld(value)])
    assert not check.passed and check.value is None
    assert "not known" in check.sentence()


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
    assert gates.must_hold("int8", "shapes", 0).passed
    assert not gates.must_hold("int8", "shapes", 1).passed


@given(st.floats(allow_nan=True), st.floats(0, 1))
def test_nothing_beyond_the_limit_passes(value: float, limit: float) -> None:
    (low,) = gates.judge("v", Gate(kld=limit), [kld(value)])
    (high,) = gates.judge("v", Gate(top1=limit), [Figure(metric="top1", name="top-1", value=value)])
    assert low.passed == (math.isfinite(value) and value <= limit)
    assert high.passed == (math.isfinite(value) and value >= limit)


def test_the_shipped_recipe_has_limits_for_every_variant() -> None:
    recipe = load_recipe(PROJECT / DEFAULT_RECIPE)
    named = [gates.gate_name(name, {}) for name in ("fp32", "fp16")]
    named += [gates.gate_name("int8", {"scheme": scheme}) for scheme in ("dynamic", "static")]
    assert named == ["fp32", "fp16", "int8-dynamic", "int8-static"]
    assert all(recipe.gates[name].kld and recipe.gates[name].top1 for name in named)


def test_an_int8_folder_that_does_not_say_its_scheme_has_no_limits() -> None:
    recipe = load_recipe(PROJECT / DEFAULT_RECIPE)
    assert recipe.gates.get(gates.gate_name("int8", {})) is None
