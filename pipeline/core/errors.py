"""Every way the pipeline can end badly: one class per exit code, each with a message for the person who must act.

The exit codes are a contract (see docs/files.md): scripts branch on them. 0 is success and 130 an interrupt; 1 is never
meant: it is an exception that nobody expected, with its traceback, and what Python itself gives.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar


class PipelineError(Exception):
    """A failure with a known reason; raised are its subclasses, each with its exit code.

    Args:
        what: what happened, one sentence.
        cause: the likely cause, one sentence, or empty.
        remedy: the next command or action, or empty.
        file: the file that is to blame. Whoever reads files of anybody's gives it in place of a remedy: what a stage
            made can be removed and made again (`stage.made_again`), what a person brought can't.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, cause: str = "", remedy: str = "", file: Path | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.cause = cause
        self.remedy = remedy
        self.file = file

    def lines(self) -> list[str]:
        """The message as lines of text, in the order a reader needs them."""
        parts = [f"error: {self.what}"]
        if self.cause:
            parts.append(f"  cause: {self.cause}")
        if self.remedy:
            parts.append(f"  do:    {self.remedy}")
        return parts


class UsageError(PipelineError):
    """A wrong argument or a recipe that does not parse."""

    exit_code = 2


class FetchError(PipelineError):
    """The checkpoint can't be had: no access, no such model, no network, or a model we do not support."""

    exit_code = 3


class TowerError(FetchError):
    """A tower, or what goes into it, is of a kind that can't be converted; without it the model can."""

    def __init__(self, what: str) -> None:
        super().__init__(what, remedy="say TOWERS=none to build the model without")


class IntegrityError(PipelineError):
    """Bytes are not what their header, index or manifest says."""

    exit_code = 4


class ExportError(PipelineError):
    """The graph could not be made, or the made file does not do what it must."""

    exit_code = 5


class QuantiseError(PipelineError):
    """Quantisation failed, or the file is not what its name says."""

    exit_code = 6


class TooFewBitsError(QuantiseError):
    """Too few of a model's weights can have 4 bits."""


class BundleError(PipelineError):
    """The on-device bundle could not be made."""

    exit_code = 7


class VerificationError(PipelineError):
    """A gate failed: the file is not as good as the recipe demands."""

    exit_code = 8


class PublishError(PipelineError):
    """Publishing was refused."""

    exit_code = 9


class ResourceError(PipelineError):
    """Too little disk or memory, or a folder that another run is working on: the same command may do later."""

    exit_code = 10


def of_code(exit_code: int) -> type[PipelineError]:
    """The class of an exit code, or the class for what nobody expected."""
    return {kind.exit_code: kind for kind in PipelineError.__subclasses__()}.get(exit_code, PipelineError)
