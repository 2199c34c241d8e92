"""Which machine of the Hub's jobs is large enough for a model: memory and disk by the plan, then the price."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from huggingface_hub import JobHardwareInfo

from pipeline.core import log
from pipeline.core.errors import ResourceError
from pipeline.core.graph import behind
from pipeline.planning.model import Model
from pipeline.planning.needs import NEEDS

_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12}
_SPARE = 1.25
"""Of memory and disk: the plan is right to a factor, and the image lies on the disk as well."""


class Asked(NamedTuple):
    """What a plan asks of a machine: bytes of memory and of disk, seconds on two cores."""

    memory: float
    disk: float
    seconds: float


def asked(model: Model) -> Asked:
    """What all stages up to `publish` ask for."""
    needs = [NEEDS[name](model) for name in behind(["publish"], model.choice)]
    disk = sum(need.size for need in needs) + max(need.scratch for need in needs)
    return Asked(max(need.memory for need in needs), disk, sum(need.seconds for need in needs))


def _bytes(text: str) -> float:
    """Bytes of a size as the Hub writes it, e.g. `16 GB`; none where it says something else."""
    found = re.fullmatch(r"([\d.]+) ?(MB|GB|TB)", text)
    return float(found[1]) * _UNITS[found[2]] if found else 0.0


def said(machine: JobHardwareInfo) -> str:
    """One line about a machine and its price."""
    disk, price = machine.ephemeral_storage, f"${machine.unit_cost_usd:g} a {machine.unit_label}"
    return f"{machine.pretty_name}: {machine.cpu}, {machine.ram}, {disk} of disk, {price}"


def cheapest(offered: Sequence[JobHardwareInfo], want: Asked, *, gpu: bool) -> JobHardwareInfo:
    """The cheapest machine that holds what is asked for, with a GPU if that is.

    Raises:
        ResourceError: none does.
    """
    fit = [
        machine
        for machine in offered
        if _bytes(machine.ram) >= _SPARE * want.memory and _bytes(machine.ephemeral_storage) >= _SPARE * want.disk
        if machine.accelerator or not gpu
    ]
    if not fit:
        raise ResourceError(
            f"no machine of the Hub has {log.human_bytes(int(_SPARE * want.memory))} of memory and "
            f"{log.human_bytes(int(_SPARE * want.disk))} of disk{' with a GPU' if gpu else ''}",
            remedy="build less (GRAPHS=bundle), or on a machine of your own: docker run IMAGE publish",
        )
    return min(fit, key=lambda machine: (machine.unit_cost_usd, machine.name))
