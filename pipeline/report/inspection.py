"""What is in a file, and where it leaves another, for a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import NotRequired, TypedDict

from pipeline.core import log

_NUMBER = re.compile(r"_\d+$")


class Port(TypedDict):
    """An input or output; −1 in `shape` is chosen at run time."""

    name: str
    type: str
    shape: Sequence[int]


class Signature(TypedDict):
    """A signature: operators by kind, products by arithmetic."""

    name: str
    inputs: Sequence[Port]
    outputs: Sequence[Port]
    operators: Mapping[str, int]
    products: Mapping[str, int]


class Constant(TypedDict):
    """A stored tensor."""

    name: str
    type: str
    shape: Sequence[int]
    size: int
    bits: float


class Model(TypedDict):
    """A model; `weights`: type → elements, bytes, bits each."""

    name: str
    size: int
    bits_per_weight: float
    weights: Mapping[str, tuple[int, int, float]]
    signatures: Sequence[Signature]
    constants: Sequence[Constant]
    metadata: Sequence[str]


class Section(TypedDict):
    """A section of a bundle."""

    kind: str
    model_type: str
    offset: int
    size: int


class Against(TypedDict):
    """Where the file leaves another."""

    file: str
    text: str
    tokens: int
    says: str
    table: Sequence[Sequence[str]]


class Told(TypedDict):
    """What inspect found of a file."""

    file: str
    size: int
    sections: Sequence[Section]
    metadata: Mapping[str, object]
    models: Sequence[Model]
    against: NotRequired[Against]


def text(description: Told) -> Iterator[str]:
    """What inspect found, `told` as it is in JSON, line by line."""
    yield f"{description['file']}: {log.human_bytes(description['size'])}"
    if description["sections"]:
        yield ""
        yield from log.align(
            [("section", "model", "offset", "size")]
            + [
                (each["kind"], each["model_type"], str(each["offset"]), log.human_bytes(each["size"]))
                for each in description["sections"]
            ]
        )
    if description["metadata"]:
        yield ""
        yield from log.align(
            [("metadata", ""), *((key, _short(value)) for key, value in description["metadata"].items())]
        )
    for model in description["models"]:
        yield ""
        yield from _model(model)
    if "against" in description:
        yield ""
        yield from _against(description["against"])


def _model(model: Model) -> Iterator[str]:
    yield f"model {model['name']}: {log.human_bytes(model['size'])}, {model['bits_per_weight']:.2f} bits per weight"
    rows = [["weights", "elements", "bytes", "bits each"]]
    for kind, (elements, size, bits) in model["weights"].items():
        rows.append([kind.lower(), f"{elements:,}", log.human_bytes(size), f"{bits:.2f}"])
    yield from log.align(rows)
    for signature in model["signatures"]:
        yield ""
        yield from _signature(signature)
    yield ""
    rows = [["biggest constants", "type", "shape", "size", "bits each"]]
    for each in model["constants"]:
        shape = " × ".join(map(str, each["shape"]))
        own = log.human_bytes(each["size"])
        rows.append([each["name"][-70:], each["type"].lower(), shape, own, f"{each['bits']:.2f}"])
    yield from log.align(rows)
    if model["metadata"]:
        yield f"metadata: {', '.join(model['metadata'])}"


def _signature(signature: Signature) -> Iterator[str]:
    counted = ", ".join(f"{count} {kind}" for kind, count in signature["products"].items())
    operators = signature["operators"]
    yield f"signature {signature['name'] or '(none)'}: {sum(operators.values())} operators; products: {counted}"
    yield "  " + ", ".join(f"{kind.lower()} {count}" for kind, count in operators.items())
    told = [*_ports("inputs", signature["inputs"]), *_ports("outputs", signature["outputs"])]
    yield from log.align(told) if told else ()


def _ports(way: str, ports: Sequence[Port]) -> Iterator[tuple[str, ...]]:
    """A row per input or output; those of all layers, such as a cache, are one."""

    def kind(port: Port) -> tuple[str, ...]:
        shape = ", ".join("any" if size < 0 else str(size) for size in port["shape"])
        return _NUMBER.sub("_#", port["name"]), port["type"].lower(), f"[{shape}]"

    for (name, *rest), alike in groupby(ports, key=kind):
        count = len(list(alike))
        yield (f"  {way[:-1]}", name, *rest, f"× {count}" if count > 1 else "")


def _against(found: Against) -> Iterator[str]:
    yield f"against {found['file']}, signal to noise on {found['tokens']} tokens ({found['text']}):"
    yield from log.align(found["table"])
    yield found["says"]


def _short(value: object) -> str:
    words = " ".join(str(value).split())
    return words if len(words) <= 100 else f"{words[:97]}…"
