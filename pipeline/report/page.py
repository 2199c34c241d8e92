"""What all pages are rendered with: templates beside this file, everything escaped, a name that is missing an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def environment(**filters: Callable[[float], str] | Callable[[str], str]) -> Environment:
    """Jinja's environment for this folder's templates, with `filters` by name."""
    jinja = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters.update(filters)
    return jinja
