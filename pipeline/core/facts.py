"""What each stage's manifest says under `facts`: a dataclass a stage, which it writes and later stages read.

A fact with a default is left out of the manifest where it has that; every other one is always there. Shares are of 1,
sizes in bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.core.recipe import Graphs, Scheme


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A part of a checkpoint that is not converted, by its name there, and how many tensors it has."""

    part: str
    tensors: int


@dataclass(frozen=True, kw_only=True)
class Taken:
    """A tower that is converted, by its name in TOWERS=, and how many parameters it has."""

    tower: str
    parameters: int


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint by its configuration and headers; `parameters` are those of the text model, `shards` its files.

    `tied`: its output head is the token embedding, not one more matrix. `left_out` are the parts beside the text model
    that are not converted, `towers` those that are.
    """

    model_type: str
    parameters: int
    dtype: str
    shards: int
    tied: bool = True
    left_out: tuple[LeftOut, ...] = ()
    towers: tuple[Taken, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Ancestor:
    """A model that a checkpoint was made from, near or far, and what its card says; not `known`: nobody may look."""

    model: str
    known: bool
    licence: str
    base_models: tuple[str, ...]
    from_scratch: bool


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a checkpoint's own card says, empty where it says nothing, and what those of its ancestors do."""

    licence: str
    base_models: tuple[str, ...]
    lineage: tuple[Ancestor, ...]


@dataclass(frozen=True, kw_only=True)
class Merged:
    """An adapter's base, its commit or the hash of its contents, and how many of its tensors the adapter changed."""

    base: str
    base_revision: str
    changed: int


@dataclass(frozen=True, kw_only=True)
class Fetch(Checkpoint, Card):
    """Stage fetch; `adapter` of one that was merged, `template` the sha256 of one that took its own's place."""

    adapter: Merged | None = None
    template: str = ""


@dataclass(frozen=True, kw_only=True)
class Golden:
    """Stage golden: the reference's tokens and text, and how far it is from itself (`self_floor`, for the report).

    `sliding_window`, `conversation` and `texts` are of what goes through the cache, and there if a bundle is wanted.
    """

    bos: int
    pad: int
    stop: tuple[int, ...]
    final_logit_softcapping: float | None
    dtype: str
    attention: str
    device: str
    weights: str
    verification: str
    verification_sha256: str
    documents: int
    windows: int
    window: int
    shape_cases: int
    self_floor: Mapping[str, Mapping[str, object]]
    sliding_window: int | None = None
    conversation: int | None = None
    texts: int | None = None


@dataclass(frozen=True, kw_only=True)
class Files:
    """Stages graph and fp32: the files and their sizes."""

    graphs: Graphs
    sizes: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Stage moments: tokens of calibration text, files of sums, and of the reference its soft-cap and its device.

    `largest_activation` is what it had on some of the text.
    """

    tokens: int
    files: int
    largest_activation: float
    final_logit_softcapping: float | None
    device: str


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What was found in a quantised file (quantize/readback.py); shares of weights by type, of products by arithmetic.

    `weights_as_stored` counts matrices with the checkpoint's own 4-bit integers and scales, `float_operators` what is
    not integer, `float_products` has the largest such products by name.
    """

    size: int
    scheme: Scheme | None = None
    weights_float16_share: float | None = None
    weights_int8_share: float | None = None
    weights_int4_share: float | None = None
    weights_as_stored: int | None = None
    bits_per_weight: float | None = None
    integer_share: float | None = None
    multiply_adds: int | None = None
    float_operators: Mapping[str, int] | None = None
    float_products: Mapping[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Rung:
    """A rung of int8's ladder on calibration text, against Hugging Face in fp32; None where logits are not finite.

    `kept`: whether it keeps the recipe's limits. `kld` in nats, with the ends of its 95 % interval.
    """

    rung: str
    kept: bool
    positions: int
    kld: float | None
    kld_low: float | None
    kld_high: float | None
    top1: float | None
    perplexity_ratio: float | None

    @property
    def figures(self) -> str:
        """The KLD in words."""
        if self.kld is None:
            return "its logits are not finite"
        return f"KLD {self.kld:.2g} ({self.kld_low:.2g} to {self.kld_high:.2g}) on {self.positions} positions"


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """The rung that int8 files were made by, and all that were judged, against the smallest `limit` of the KLD.

    `judged` is empty where the rung was given: the earlier build's manifest has the evidence.
    """

    rung: str
    limit: float | None = None
    judged: tuple[Rung, ...] = ()

    @property
    def shortfall(self) -> str:
        """Where no rung keeps the recipe's limits: how far the closest one is, and what would help; else empty."""
        if not self.judged or any(rung.kept for rung in self.judged):
            return ""
        best = next(rung for rung in self.judged if rung.rung == self.rung)
        times = best.kld / self.limit if best.kld and self.limit else 0.0
        far = f", {times:.1f} times the limit of {self.limit:g}" if times > 1 else ""
        return (
            f"no rung of the ladder keeps the recipe's limits, {self.rung} comes closest: {best.figures}{far}; "
            "`gptq = true`, `groups` or `keep_float` in the recipe brings int8 closer, and `make tune` measures which"
        )


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Stages fp16, int8 and int4; the calibration is a static scheme's, the ladder int8's.

    `largest_activation` is what the reference had on some calibration text, where the ladder reads any. `left_out` says
    why there are no files of an optional precision, `device` what computed the moments that they were rounded by.
    """

    graphs: Graphs
    left_out: str = ""
    device: str = "cpu"
    scheme: Scheme | None = None
    calibration_samples: int | None = None
    calibration_tokens: int | None = None
    step: Contents | None = None
    decoder: Contents | None = None
    climbed: Ladder | None = None
    largest_activation: float | None = None


@dataclass(frozen=True, kw_only=True)
class Tower:
    """Stage towers, by tower and precision (`vision-int8`): sizes of its sections by name, elements and bytes.

    `stored` are elements of matrices and kernels of the checkpoint, `weight_bytes` what they take, scales included.
    """

    precision: str
    sizes: Mapping[str, int]
    stored: int
    weight_bytes: int


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section of a bundle: `kind` as litert-lm-peek names it, `offset` and `size` in bytes.

    `activation_type` is what a GPU is to compute in, empty where it is left to the runtime, which takes fp16.
    """

    kind: str
    model_type: str
    offset: int
    size: int
    activation_type: str = ""


@dataclass(frozen=True, kw_only=True)
class Hears:
    """How a bundle hears: samples a second, samples of a frame, and from one frame to the next."""

    rate: int
    frame: int
    hop: int


@dataclass(frozen=True, kw_only=True)
class Patches:
    """Pictures that keep their proportions, in patches of `size` x `size` pixels.

    `pool` x `pool` of them become a soft token, of which a picture has `tokens` at most.
    """

    size: int
    pool: int
    tokens: int

    @property
    def side(self) -> int:
        """Pixels a side of what becomes one soft token."""
        return self.size * self.pool

    @property
    def count(self) -> int:
        """The most patches of a picture."""
        return self.tokens * self.pool**2

    @property
    def longest(self) -> int:
        """The most of them one behind the other."""
        return self.tokens * self.pool


@dataclass(frozen=True, kw_only=True)
class Sees:
    """How a bundle sees: pictures of `size` x `size` pixels, of whose soft tokens each sees the `whole` picture.

    Or, where these are told, pictures of their own proportions in `patches`; `size` is 0 then.
    """

    size: int
    whole: bool = False
    patches: Patches | None = None


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """Stage bundle, by precision. `stored`: elements of matrices and tables, `weight_bytes`: what they take.

    Those of the text model: of its towers, if it `hears` or `sees`, stage towers tells.
    `cache_bytes` is what the cache takes while the bundle runs.
    """

    sections: tuple[Section, ...]
    model_type: str
    start_token: int | None
    stop_tokens: tuple[int, ...]
    max_tokens: int
    chat_template: bool
    top_k: int
    stored: int
    weight_bytes: int
    cache_bytes: int = 0
    remarks: tuple[str, ...] = ()
    hears: Hears | None = None
    sees: Sees | None = None


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Stage verify: the number of checks, the judged files that may and may not be published, golden's `device`."""

    passed: bool
    checks: int
    fit: tuple[str, ...]
    not_fit: tuple[str, ...]
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Publish:
    """Stage publish: the terms of what would be uploaded."""

    licence: str
    licence_override: str
    base_models: tuple[str, ...]
    uploaded: bool


@dataclass(frozen=True, kw_only=True)
class Page:
    """Stage page: the versions of the libraries that came with it, by npm package."""

    libraries: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Stage evaluate: the task."""

    prompts: int
    tokens: int
    task_sha256: str
