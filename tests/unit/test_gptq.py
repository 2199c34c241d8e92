"""GPTQ: against a plain computation by the paper's equations, and what it gains; Hessians by name and group."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.core.errors import QuantiseError
from pipeline.quantize import blockwise, gptq, hessians
from pipeline.quantize import rows as quantize
from pipeline.quantize.hadamard import rotate_both
from pipeline.tflite.graph import Origin
from pipeline.tflite.lazy import Blocks, unpack

Floats = NDArray[np.float32]
RANDOM = np.random.default_rng(7)


def hessian(columns: int, seed: int = 0, spread: float = 1.0) -> NDArray[np.float64]:
    """H of random inputs whose channels differ in size and depend on each other."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((4 * columns, columns)) @ random.standard_normal((columns, columns))
    x *= np.exp(spread * random.standard_normal(columns))
    return np.asarray(x.T @ x)


def matrix(rows: int, columns: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def scale_of(values: Floats, high: int = 127) -> Floats:
    return (np.abs(values).max(axis=1, keepdims=True) / high).astype(np.float32)


def error(made: NDArray[np.int8], scale: Floats, values: Floats, h: NDArray[np.float64]) -> float:
    off = made * np.repeat(scale.astype(np.float64), values.shape[1] // scale.shape[1], axis=1) - values
    return float(np.einsum("ij,jk,ik->", off, h, off))


def nearest(values: Floats, scale: Floats, high: int = 127) -> NDArray[np.int8]:
    return np.clip(np.rint(values / scale), -high, high).astype(np.int8)


def plainly(values: Floats, scale: Floats, h: NDArray[np.float64], high: int) -> NDArray[np.int8]:
    """Optimal brain quantisation of one column after the other: equation 2, the inverse updated by equation 3."""
    h = h + np.eye(len(h)) * gptq.DAMPING * np.diag(h).mean()
    order = np.argsort(-np.diag(h), kind="stable")
    rest, inverse, made = values.astype(np.float64), np.linalg.inv(h), np.zeros(values.shape, np.int8)
    for q in order:
        made[:, q] = np.clip(np.rint(rest[:, q] / scale[:, 0]), -high, high)
        off = (rest[:, q] - made[:, q] * scale[:, 0].astype(np.float64)) / inverse[q, q]
        rest -= off[:, None] * inverse[q]
        inverse = inverse - np.outer(inverse[:, q], inverse[q]) / inverse[q, q]
        inverse[q, q] = 1.0  # it is done; its row and column are zeros
    return made


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.integers(1, 80), st.integers(1, 9), st.sampled_from([7, 127]))
def test_it_is_what_the_equations_say(seed: int, columns: int, rows: int, high: int) -> None:
    h, values = hessian(columns, seed), matrix(rows, columns, seed)
    scale = scale_of(values, high)
    made = gptq.round_rows(values, scale, [gptq.Factor.of(h)], -high, high)
    assert (made != plainly(values, scale, h, high)).mean() <= 0.001  # a value between two integers may fall either way


@pytest.mark.parametrize("high", [7, 127])
def test_results_are_closer_than_with_the_nearest_integers(high: int) -> None:
    h, values = hessian(96), matrix(200, 96)
    scale = scale_of(values, high)
    made = gptq.round_rows(values, scale, [gptq.Factor.of(h)], -high, high)
    assert error(made, scale, values, h) < 0.5 * error(nearest(values, scale, high), scale, values, h)


def test_inputs_that_do_not_depend_on_each_other_give_the_nearest_integers() -> None:
    h, values = np.diag(np.arange(1.0, 41.0)), matrix(30, 40)
    scale = scale_of(values)
    assert np.array_equal(gptq.round_rows(values, scale, [gptq.Factor.of(h)], -127, 127), nearest(values, scale))


def test_a_channel_that_is_always_zero_and_an_input_that_never_came_are_no_harm() -> None:
    h, values = hessian(20), matrix(8, 20)
    h[3] = h[:, 3] = 0
    scale = scale_of(values)
    for one in (h, np.zeros((20, 20))):
        made = gptq.round_rows(values, scale, [gptq.Factor.of(one)], -127, 127)
        assert np.abs(made * scale - values)[:, 3].max() <= 0.5001 * scale.max()


def test_a_channel_that_is_always_zero_counts_as_the_mean() -> None:
    hessian = np.diag([4.0, 0.0, 2.0])
    mean = np.diag([4.0, 2.0, 2.0])  # the mean of all three
    found, expected = gptq.Factor.of(hessian, 0.0), gptq.Factor.of(mean, 0.0)
    np.testing.assert_array_equal(found.order, expected.order)
    np.testing.assert_allclose(found.upper, expected.upper)


def test_spans_are_rounded_each_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "_TOGETHER", 24 * 1000)
    parts = [hessian(24, 1), hessian(24, 2)]
    values = matrix(1100, 48)  # in two lots of rows
    scale = scale_of(values)
    made = gptq.round_rows(values, scale, [gptq.Factor.of(part) for part in parts], -127, 127)
    for place, part in enumerate(parts):
        columns = slice(24 * place, 24 * place + 24)
        own = gptq.round_rows(np.ascontiguousarray(values[:, columns]), scale, [gptq.Factor.of(part)], -127, 127)
        assert np.array_equal(made[:, columns], own)


@pytest.mark.parametrize(("columns", "width"), [(640, 640), (2048, 2048), (8192, 2048), (6912, 1728), (16384, 2048)])
def test_a_wide_matrix_has_spans_of_a_bounded_width(columns: int, width: int) -> None:
    assert hessians.span(columns) == width


# --- Hessians in files


def stored(folder: Path, **named: NDArray[np.float64]) -> gptq.Hessians:
    for name, h in named.items():
        np.save(folder / f"{name}.npy", h.astype(np.float32)[None] if h.ndim == 2 else h.astype(np.float32))
    (folder / hessians.INDEX).write_text(json.dumps({f"{name}.weight": f"{name}.npy" for name in named}))
    return gptq.Hessians(folder)


def test_a_weight_without_a_hessian_is_rounded_to_the_nearest(tmp_path: Path) -> None:
    rounding = stored(tmp_path, q=hessian(8)).rounding()
    assert rounding(Origin("k.weight"), 8) is None and quantize.to_nearest(Origin("q.weight"), 8) is None


def test_ranges_of_rows_have_the_hessian_of_all_and_groups_of_columns_their_own(tmp_path: Path) -> None:
    h = hessian(12)
    rounding = stored(tmp_path, q=h).rounding()
    for part, columns in (
        (Origin("q.weight"), slice(0, 12)),
        (Origin("q.weight", row=5), slice(0, 12)),
        (Origin("q.weight", column=8), slice(8, 12)),
    ):
        made = rounding(part, columns.stop - columns.start)
        assert made is not None
        wanted = gptq.Factor.of(h.astype(np.float32)[columns, columns])
        assert np.array_equal(made.factors()[0].upper, wanted.upper) and np.array_equal(
            made.factors()[0].order, wanted.order
        )


def test_columns_of_several_spans_are_cut_where_the_spans_are(tmp_path: Path) -> None:
    parts = np.stack([hessian(8, 1), hessian(8, 2)])
    made = stored(tmp_path, q=parts).rounding()(
        Origin("q.weight", column=12), 12
    )  # columns 12 to 24, of 16: four are left
    assert made is not None and [len(one.order) for one in made.factors()] == [4]


def test_what_columns_were_multiplied_with_is_taken_off_the_hessian(tmp_path: Path) -> None:
    h, values, factors = hessian(16), matrix(40, 16), np.exp2(np.arange(16) % 5 - 2).astype(np.float32)
    made = stored(tmp_path, q=h).rounding({"q.weight": factors})(Origin("q.weight"), 16)
    assert made is not None
    equalized = values * factors
    scale = scale_of(equalized)
    rounded = gptq.round_rows(equalized, scale, made.factors(), -127, 127)
    off = (rounded * scale - equalized) / factors
    plain = (nearest(equalized, scale) * scale - equalized) / factors
    assert np.einsum("ij,jk,ik->", off, h, off) < 0.6 * np.einsum("ij,jk,ik->", plain, h, plain)


def test_a_table_that_is_looked_up_too_is_rounded_between_its_two_uses(tmp_path: Path) -> None:
    h, values = hessian(64), matrix(300, 64)
    scale, given = scale_of(values, 7), stored(tmp_path, q=h)
    errors = []
    for share in (0.0, 0.1, 1.0, 1000.0):
        made = given.rounding(lookups={"q.weight": share, "k.weight": 3.0})(Origin("q.weight"), 64)
        assert made is not None
        rounded = made(values, scale, -7, 7)
        errors.append((error(rounded, scale, values, h), error(rounded, scale, values, np.eye(64))))
    logits, rows = (list(found) for found in zip(*errors, strict=True))
    assert sorted(set(logits)) == logits and sorted(set(rows), reverse=True) == rows
    assert rows[-1] == pytest.approx(error(nearest(values, scale, 7), scale, values, np.eye(64)), rel=1e-3)


def test_errors_that_are_looked_up_count_by_the_channels_of_the_model(tmp_path: Path) -> None:
    """Equalized columns are divided again when a row is looked up, and rotated ones turned back."""
    h, factors = hessian(32), np.exp2(np.arange(32) % 5 - 2).astype(np.float32)
    rounding = stored(tmp_path, q=h).rounding({"q.weight": factors}, {"q.weight": 16}, {"q.weight": 0.5})
    made, short = rounding(Origin("q.weight"), 32), h.astype(np.float32).astype(np.float64)
    both = (short + 0.5 * np.diag(short).mean() * np.eye(32)) / factors / factors[:, None]
    assert made is not None
    np.testing.assert_allclose(made.factors()[0].upper, gptq.Factor.of(rotate_both(both, 16)).upper, rtol=1e-9)


def test_int8_rows_and_4_bit_blocks_are_rounded_by_it(tmp_path: Path) -> None:
    h, values = hessian(64), matrix(50, 64)
    factors = stored(tmp_path, q=h).rounding()(Origin("q.weight"), 64)
    assert factors is not None
    whole, scales = quantize.quantise_rows(Blocks.of(values), factors)
    narrow, blocks = blockwise.quantise_blocks(Blocks.of(values), factors)
    for made, plain, scale in (
        (whole.rows(0, 50), quantize.quantise_rows(Blocks.of(values))[0].rows(0, 50), scales.scale[:, None]),
        (
            unpack(narrow.rows(0, 50)).reshape(50, 64),
            blockwise.round_blocks(values, blocks.scale),
            blocks.scale.astype(np.float32),
        ),
    ):
        assert error(made, scale, values, h) < 0.7 * error(plain, scale, values, h)


@pytest.mark.parametrize("value", [3.0, np.nan])
def test_a_hessian_that_is_none_ends_quantisation_with_its_file(tmp_path: Path, value: float) -> None:
    """A model that gives no finite numbers on the calibration text is no defect of the project (exit code 1)."""
    np.save(tmp_path / "q.npy", np.array([[[1.0, value], [value, 1.0]]]))
    (tmp_path / hessians.INDEX).write_text(json.dumps({"q.weight": "q.npy"}))
    rounding = gptq.Hessians(tmp_path).rounding()(Origin("q.weight"), 2)
    assert rounding
    with pytest.raises(QuantiseError, match=r"q\.npy can't be factored"):
        rounding.factors()
