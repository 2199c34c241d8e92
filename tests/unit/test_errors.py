"""Exit codes are a contract, and every error speaks to the person who must act."""

from __future__ import annotations

import pytest

from pipeline.core import errors

CODES = {
    errors.PipelineError: 1,
    errors.UsageError: 2,
    errors.FetchError: 3,
    errors.IntegrityError: 4,
    errors.ExportError: 5,
    errors.QuantiseError: 6,
    errors.BundleError: 7,
    errors.VerificationError: 8,
    errors.PublishError: 9,
    errors.ResourceError: 10,
}


def test_exit_codes_are_the_documented_ones() -> None:
    assert {kind: kind.exit_code for kind in CODES} == CODES


def test_no_error_class_is_left_out_of_the_contract() -> None:
    assert set(errors.PipelineError.__subclasses__()) | {errors.PipelineError} == set(CODES)


@pytest.mark.parametrize(
    ("cause", "remedy", "expected"),
    [
        ("", "", ["error: it broke"]),
        ("rust", "", ["error: it broke", "  cause: rust"]),
        ("", "oil it", ["error: it broke", "  do:    oil it"]),
        ("rust", "oil it", ["error: it broke", "  cause: rust", "  do:    oil it"]),
    ],
)
def test_lines_say_what_then_cause_then_remedy(cause: str, remedy: str, expected: list[str]) -> None:
    error = errors.ExportError("it broke", cause=cause, remedy=remedy)
    assert error.lines() == expected
    assert str(error) == "it broke"
