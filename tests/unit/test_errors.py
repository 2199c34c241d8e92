"""Exit codes are a contract, and every error speaks to the person who must act."""

from __future__ import annotations

import pytest

from pipeline.core import errors
from pipeline.core.recipe import PROJECT

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


@pytest.mark.parametrize("code", [*CODES.values(), 7, -9, 99])
def test_a_code_of_another_process_has_its_class(code: int) -> None:
    assert errors.of_code(code) is {code: kind for kind, code in CODES.items()}.get(code, errors.PipelineError)


def test_1_is_never_meant_and_errors_become_exit_codes_in_one_place() -> None:
    mapped = {"core/errors.py", "core/stage.py", "core/rules.py"}  # rules are Make's, not a command
    for file in sorted((PROJECT / "pipeline").rglob("*.py")):
        text = file.read_text("utf-8")
        assert "raise PipelineError(" not in text, file
        assert (".exit_code" in text) is (file.relative_to(PROJECT / "pipeline").as_posix() in mapped), file


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
