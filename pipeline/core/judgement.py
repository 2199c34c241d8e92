"""What verify's `judgement.json` and `report.json` hold, as far as it is read again: by pages, publish and check.

A number that could not be had, or is not finite, is null.
"""

from __future__ import annotations

from typing import Literal, NotRequired, TypedDict


class Check(TypedDict):
    """A limit beside a value, as `judge.gates.Check`."""

    variant: str
    name: str
    value: float | None
    limit: float | None
    direction: Literal["<=", ">="]
    against: str
    detail: str
    passed: bool


class Estimate(TypedDict):
    """A value with its 95 % interval."""

    value: float | None
    low: float | None
    high: float | None


class Summary(TypedDict):
    """Figures of a file on text, as `judge.metrics.Summary`."""

    kld: Estimate
    top1: Estimate
    nmse_max: float | None
    perplexity: float | None


class File(TypedDict):
    """A judged file."""

    file: str
    sha256: str
    size: int
    fit: bool
    against_reference: Summary


class Variant(File):
    """A step graph. `against_fp32` is null of the fp32 file itself."""

    gate: str
    limits: dict[str, float]
    alternative: bool
    size_ratio: float | None
    integer_share: float | None
    against_fp32: Summary | None
    kld_histogram: list[int]


class Tally(TypedDict):
    """How often something was as it should be."""

    total: int
    wrong: int


class Greedy(TypedDict):
    """Greedy texts, and how many of them are the reference's."""

    same: int
    rows: list[object]


class Script(TypedDict):
    """A bundle's figures on text in one script; `kld_ratio` over Latin's, null of that itself."""

    positions: int
    kld: Estimate
    top1: Estimate
    kld_ratio: Estimate | None


class Phone(TypedDict):
    """What a bundle asks of a phone: bytes of the cache, tokens of a conversation, bytes of its models' `sections`.

    `activation_type` is what it asks a GPU to compute in; empty where that is left to the app.
    """

    cache: int
    tokens: int
    sections: list[int]
    activation_type: str


class Said(TypedDict):
    """LiteRT-LM's text about the `media` (kind and name) of a message and a question, beside the reference's."""

    tower: str
    media: list[tuple[str, str]]
    question: str
    expected: str
    text: str
    same: bool
    tie: bool


class Senses(TypedDict):
    """Of a bundle that sees or hears.

    By tower and precision (`vision-int8`) and by input the normalised mean square error of its soft tokens, and what
    the fp32 bundle said; `resized` is that error of a picture that LiteRT-LM resizes itself, null where that was not
    read.
    """

    resized: float | None
    errors: dict[str, dict[str, float | None]]
    said: list[Said]


class Bundle(File):
    """A bundle; `prompts` is null of a model without a chat template. `scripts` are by name, none of fp32."""

    senses: NotRequired[Senses]

    phone: NotRequired[Phone]

    scripts: dict[str, Script]
    token_ids: Tally
    prompts: Tally | None
    greedy: Greedy


class Loss(TypedDict):
    """Where a file leaves the fp32 one: decibels of each operator, by layer, and that in words."""

    says: str
    curve: list[tuple[str, float]]


class Judgement(TypedDict):
    """`judgement.json`; `order` names the step graphs as they were judged, `fixed` their fixed shapes.

    `alternative_checks` are those of files that need not pass.
    """

    passed: bool
    checks: list[Check]
    alternative_checks: list[Check]
    order: list[str]
    variants: dict[str, Variant]
    bundles: dict[str, Bundle]
    losses: NotRequired[dict[str, Loss]]
    fixed: NotRequired[list[str]]


class Timing(TypedDict):
    """Seconds to load a step graph, and of a step by sequence length."""

    load: float
    latency: dict[str, float]


class Report(Judgement):
    """`report.json`: the judgement, and how long the step graphs took, by kind of kernels."""

    sequences: list[int]
    speed: dict[str, dict[str, Timing]]
