"""The model card: front matter that the Hub reads, and a page for people, with the figures that were measured.

A card holds no timings, so that it is the same bytes in every build; speeds stand in the report beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load

from pipeline.core import log
from pipeline.core.errors import PublishError
from pipeline.core.facts import LeftOut
from pipeline.core.judgement import Estimate, Script
from pipeline.core.recipe import SECTION_LIMIT
from pipeline.release.licence import GEMMA, GEMMA_NOTICE, Licence

_TEMPLATE = Path(__file__).with_name("card.md")
_USAGE = {
    ".litertlm": Path(__file__).with_name("card_bundle.md"),
    ".tflite": Path(__file__).with_name("card_step.md"),
}
_MEDIA = Path(__file__).with_name("card_media.md")
_CARRIED = ("language",)
_RUNTIME = ("litert-lm-api", "ai-edge-litert")
# What the Hub asks before it hands out files. The owner of a repository switches the gate on; the words go along.
_GATE = {
    "extra_gated_heading": "These files are under the Gemma Terms of Use",
    "extra_gated_prompt": "They are derived from Gemma. To get them, you agree to the Gemma Terms of Use "
    "(https://ai.google.dev/gemma/terms) and to the Gemma Prohibited Use Policy "
    "(https://ai.google.dev/gemma/prohibited_use_policy).",
    "extra_gated_button_content": "I agree",
}


@dataclass(frozen=True, kw_only=True)
class Phone:
    """What a bundle asks of a phone: bytes of its largest section and of its cache, tokens of a conversation.

    `activation_type` is what it asks a GPU to compute in; empty where that is left to the app.
    """

    largest_section: int
    cache: int
    tokens: int
    activation_type: str


@dataclass(frozen=True, kw_only=True)
class Sense:
    """What a bundle sees or hears by: the tower, its bytes, and the NMSE of the worst of so many inputs' soft tokens.

    `asks` is what it takes, for people: `pictures of 768 x 768 pixels`.
    """

    tower: str
    size: int
    asks: str
    error: float | None
    inputs: int


@dataclass(frozen=True, kw_only=True)
class Product:
    """A published file.

    `variant` is what verify calls it, `source` where it lies below the model's folder, `file` its published name,
    `precision` what it is for people (`int8, dynamic`), `size` in bytes. `phone` is a bundle's, and so are `senses`.
    """

    variant: str
    source: str
    file: str
    precision: str
    size: int
    phone: Phone | None = None
    senses: tuple[Sense, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Check:
    """One judged figure, ready to be shown: of which file, what, against which reference (or none), by how much."""

    file: str
    what: str
    against: str
    value: str
    limit: str
    detail: str


_TEXT = "Text only: of a model that also sees or hears, the language part is converted and nothing else."
_SENSES = {
    "vision": "The bundles see: an engine that is opened with a `vision_backend` takes pictures as parts of a message. "
    "Their vision tower is in float32 beside a text model in float32, else in 8 bits. Give a picture in the size that "
    "the encoder takes: LiteRT-LM resizes by another method than transformers' processor.",
    "audio": "The bundles hear: an engine that is opened with an `audio_backend` takes sounds of up to 30 seconds as "
    "parts of a message, 16,000 samples a second. Their audio tower is in float32 beside a text model in float32, else "
    "in 8 bits. A sound takes as many places of a prompt as it is long, and is not filled up as transformers' "
    "processor does.",
}
_FOUR_BITS = (
    "The int4 files are for phones that the int8 ones are too large for: most weights have 4 bits, which loses more, "
    "as the figures below say, against limits of their own. Try your own task before you ship one."
)
_LACKS = {"vision": "They do not see.", "audio": "They do not hear."}


@dataclass(frozen=True, kw_only=True)
class Base:
    """What an adapter was merged into: Hub id or folder name, commit or content hash, and its card's licence."""

    model: str
    revision: str
    licence: str

    @property
    def on_hub(self) -> bool:
        """Whether it came from the Hub."""
        return "/" in self.model


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What was converted: Hub id or folder name, commit or content hash, the bases that its card names, and theirs.

    `base` of an adapter: what it was merged into, with its commit or content hash, and its licence. `left_out` are
    parts of the checkpoint beside the text model, `towers` those of them that are in the bundles.
    """

    model: str
    revision: str
    base_models: tuple[str, ...]
    lineage: tuple[str, ...]
    model_type: str
    base: Base | None = None
    left_out: tuple[LeftOut, ...] = ()
    towers: tuple[str, ...] = ()

    @property
    def on_hub(self) -> bool:
        """Whether it came from the Hub: ids have an owner, folder names have no slash."""
        return "/" in self.model

    @property
    def taken(self) -> str:
        """What TOWERS= has to say so that these files come out; nothing where there is none."""
        return ",".join(self.towers) or ("none" if self.left_out else "")

    @property
    def name(self) -> str:
        """The last part of the id."""
        return self.model.rsplit("/", 1)[-1]


@dataclass(frozen=True, kw_only=True)
class Build:
    """How the files were made: recipe, limits of the graphs, source commit or empty, versions, what was changed.

    `asked` is what RECIPE= has to say so that these files come out, nothing where the model's type alone finds the
    recipe; `context` what CONTEXT= has to, nothing where the recipe alone says how long their cache is. `gpu` are the
    stages that ran on one. `remarks` are what bundles do otherwise than the checkpoint says.
    """

    recipe: str
    recipe_sha256: str
    asked: str = ""
    context: str = ""
    gpu: tuple[str, ...] = ()
    max_batch: int
    max_sequence: int
    fixed: tuple[str, ...] = ()
    max_tokens: int
    commit: str
    tools: Mapping[str, str]
    changes: str
    remarks: tuple[str, ...] = ()


def front_matter(checkpoint: Path) -> dict[str, object]:
    """The front matter of the checkpoint's own README.md, empty where there is none.

    Raises:
        PublishError: it is not YAML.
    """
    file = checkpoint / "README.md"
    try:
        return (metadata_load(file) if file.is_file() else None) or {}
    except (ValueError, yaml.YAMLError) as error:
        raise PublishError(
            f"the front matter of {file} can't be read: {' '.join(str(error).split())}",
            cause="it is not YAML between two lines of `---`",
            remedy="correct it and start again from `make fetch`",
        ) from error


def text(
    subject: Subject,
    licence: Licence,
    source: Mapping[str, object],
    products: Sequence[Product],
    checks: Sequence[Check],
    build: Build,
    scripts: Mapping[str, Mapping[str, Script]],
) -> str:
    """The whole README.md; `source` is the front matter of the checkpoint's own card, `scripts` figures by file."""
    fields = {
        "model": subject.name,
        "origin": _origin(subject),
        "source": f"`{subject.model}`",
        "changes": build.changes,
        "terms": f"{GEMMA_NOTICE}." if licence.identifier == GEMMA else f"They stay under its licence, {licence.name}.",
        "files": _files(products),
        "phone": _phone(products, build.tools) + _senses(products),
        "checks": _checks(checks),
        "scripts": _scripts(scripts),
        "usage": "\n\n".join(_usage(products, build)),
        "revision": subject.revision,
        "recipe": build.recipe,
        "recipe_sha256": build.recipe_sha256,
        "commit": f", source commit `{build.commit}`," if build.commit else "",
        "tools": ", ".join(f"{tool} {version}" for tool, version in sorted(build.tools.items())),
        "command": _command(subject, build),
        "gpu": f", on a GPU of the same kind, which computed {' and '.join(build.gpu)}" if build.gpu else "",
        "parts": _parts(subject.towers),
        "left_out": _left_out(subject),
        "licence_name": licence.name,
        "licence_link": licence.link,
        "remark": f" {licence.remark}" if licence.remark else "",
    }
    page = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(fields)
    return f"---\n{_metadata(subject, licence, source)}\n---\n\n{page}"


def _metadata(subject: Subject, licence: Licence, source: Mapping[str, object]) -> str:
    """Front matter. What came from a folder is no model of the Hub: its own bases are named, as a fine-tune of them."""
    bases = [subject.model] if subject.on_hub else [name for name in subject.base_models if name != _here(subject)]
    relation = "quantized" if subject.on_hub else "finetune"
    carried: dict[str, Any] = {key: source[key] for key in _CARRIED if key in source} | _gate(licence, source)
    card = ModelCardData(
        license=licence.identifier,
        license_link=licence.link,
        base_model=bases or None,
        base_model_relation=relation if bases else None,
        library_name="litert",
        pipeline_tag="text-generation",
        tags=["litert", "litert-lm", "tflite", subject.model_type, "float16", "int8"],
        **carried,
    )
    return str(card.to_yaml())


def _gate(licence: Licence, source: Mapping[str, object]) -> dict[str, object]:
    """The questions that the original asks before it is downloaded, or for Gemma those that its terms suggest."""
    asked = {key: value for key, value in source.items() if key.startswith("extra_gated_")}
    return asked or (dict(_GATE) if licence.identifier == GEMMA else {})


def _here(subject: Subject) -> str:
    """The base of an adapter that is a folder, whose name says nothing on the Hub."""
    return subject.base.model if subject.base and not subject.base.on_hub else ""


def _origin(subject: Subject) -> str:
    made_from = f" (made from {', '.join(subject.lineage or subject.base_models)})" if subject.base_models else ""
    kind = "checkpoint"
    if subject.base:
        kind, terms = "LoRA adapter", subject.base.licence or "not named by its card"
        made_from = f", a LoRA adapter that was merged into {_pinned(subject.base)} (licence: {terms})"
    if subject.on_hub:
        return f"{_pinned(subject)}{made_from}"
    return f"The {kind} `{subject.model}`{made_from}"


def _pinned(model: Subject | Base) -> str:
    """A model of the Hub with its page and commit, or a folder's name with the hash of its contents."""
    if not model.on_hub:
        return f"`{model.model}` (contents `{model.revision[:12]}`)"
    return f"[{model.model}](https://huggingface.co/{model.model}) at commit `{model.revision}`"


def _parts(towers: Sequence[str]) -> str:
    """What the bundles take beside text."""
    return " ".join(_SENSES[tower] if tower in towers else _LACKS[tower] for tower in _SENSES) if towers else _TEXT


def _left_out(subject: Subject) -> str:
    """What of the checkpoint is not in these files, if anything."""
    said = ", ".join(f"`{each.part}` ({each.tensors} tensors)" for each in subject.left_out)
    advice = "" if subject.towers else " Import the files as a text model."
    return f" Left out here: {said}.{advice}" if said else ""


def _files(products: Sequence[Product]) -> str:
    """The table of files."""
    rows = [(f"`{item.file}`", item.precision, log.human_bytes(item.size)) for item in products]
    said = f"\n\n{_FOUR_BITS}" if any(map(_is_int4, products)) else ""
    return _table(("file", "what", "size"), rows) + said


def _is_int4(product: Product) -> bool:
    return product.precision.startswith("int4")


def _phone(products: Sequence[Product], tools: Mapping[str, str]) -> str:
    """What each bundle asks of a phone; nothing without one."""
    bundles = [(item, item.phone) for item in products if item.phone]
    if not bundles:
        return ""
    rows = [
        (
            f"`{item.file}`",
            f"{log.human_bytes(item.size + phone.cache)}, {log.human_bytes(phone.cache)} of them cache",
            log.human_bytes(phone.largest_section) + ("" if phone.largest_section <= SECTION_LIMIT else " (*)"),
            str(phone.tokens),
            {"": "what the app says, else float16"}.get(phone.activation_type, phone.activation_type),
        )
        for item, phone in bundles
    ]
    large = any(phone.largest_section > SECTION_LIMIT for _, phone in bundles)
    entitled = "\n\n(*) An app on an iPhone needs an entitlement for more than 2 GiB at once." if large else ""
    table = _table(
        ("file", "memory, at least", "largest section", "tokens of a conversation", "a GPU computes in"), rows
    )
    runtime = ", ".join(f"{name} {tools[name]}" for name in _RUNTIME if name in tools)
    return (
        f"## What a phone needs\n\n{table}{entitled}\n\nWeights are mapped from the file. All files were judged on the "
        f"processor (XNNPACK){f', with {runtime}' if runtime else ''}; on no GPU and no NPU.\n\n"
    )


def _senses(products: Sequence[Product]) -> str:
    """What each bundle sees and hears by; nothing where none does."""
    rows = [
        (
            f"`{item.file}`",
            f"{sense.tower}: {sense.asks}",
            log.human_bytes(sense.size),
            "not known" if sense.error is None else f"{sense.error:.2g} ({_decibels(sense.error)})",
            str(sense.inputs),
        )
        for item in products
        for sense in item.senses
    ]
    if not rows:
        return ""
    head = ("file", "takes", "size of the tower", "soft tokens: worst NMSE (SNR)", "inputs")
    return (
        f"## What the bundles see and hear\n\n{_table(head, rows)}\n\nSoft tokens are the vectors that stand in a "
        "prompt for a picture or a sound; those of Hugging Face transformers in float32 are the reference.\n\n"
    )


def _decibels(error: float) -> str:
    return f"{-10 * math.log10(error):.1f} dB" if error else "no error"


def _usage(products: Sequence[Product], build: Build) -> Iterator[str]:
    """How to run each kind of file that there is, shown on the smallest of it that loses little."""
    for kind, template in _USAGE.items():
        files = [item for item in products if item.file.endswith(kind)]
        if files:
            example = min(files, key=lambda item: (_is_int4(item), item.size))
            yield (
                Template(template.read_text(encoding="utf-8"))
                .substitute(
                    example=example.file,
                    media=_media(example),
                    max_batch=build.max_batch,
                    max_sequence=build.max_sequence,
                    fixed=_fixed(build.fixed),
                    max_tokens=build.max_tokens,
                    remarks="".join(f"\n- {remark}" for remark in build.remarks),
                )
                .strip()
            )


_WAYS = {
    "vision": ("image", "photo.png", "Picture", "ImageFile", "imageFile"),
    "audio": ("audio", "clip.wav", "Sound", "AudioFile", "audioFile"),
}
"""By tower: the kind of medium as LiteRT-LM calls it, a file, what it is, and its names in Kotlin and Swift."""


def _media(product: Product) -> str:
    """How to show a bundle pictures and play it sounds; nothing for one that neither sees nor hears."""
    senses = [(sense, *_WAYS[sense.tower]) for sense in product.senses]
    if not senses:
        return ""
    kinds = [kind for _, kind, *_ in senses]
    fields = {
        "example": product.file,
        "asks": "; ".join(f"{what.lower()}s: {sense.asks}" for sense, _, _, what, *_ in senses),
        "backends": ", ".join(f"{sense.tower}_backend=litert_lm.Backend.CPU()" for sense, *_ in senses),
        "parts": "\n".join(f'    {{"type": "{kind}", "path": "{file}"}},' for _, kind, file, *_ in senses),
        "question": f"What {'do you see' if kinds[0] == 'image' else 'do you hear'}?",
        "kotlin_backends": "\n".join(f"    {sense.tower}Backend = Backend.CPU()," for sense, *_ in senses),
        "kotlin_parts": "\n".join(f'    Content.{name}("{file}"),' for _, _, file, _, name, _ in senses),
        "swift_backends": "\n".join(f"  {sense.tower}Backend: .cpu()," for sense, *_ in senses),
        "swift_parts": "\n".join(f'  .{name}("{file}"),' for _, _, file, _, _, name in senses),
    }
    return "\n\n" + Template(_MEDIA.read_text(encoding="utf-8")).substitute(fields).strip()


def _fixed(shapes: Sequence[str]) -> str:
    """What the signatures of fixed shape are for; nothing where there are none."""
    names = " and ".join(f"`serving_{shape}`" for shape in shapes)
    if not names:
        return ""
    return (
        f"\n\nBeside it {names}, of the batch and length in the name, for runtimes that choose no shape at run time, "
        "such as LiteRT.js: pad shorter texts, and smaller batches with a row that has tokens."
    )


def _checks(checks: Sequence[Check]) -> str:
    """A heading and a table for each file, in the order in which files were judged."""
    rows: dict[str, list[tuple[str, ...]]] = {}
    for item in checks:
        rows.setdefault(item.file, []).append((item.what, item.against, item.value, item.limit, item.detail))
    head = ("check", "against", "value", "limit", "detail")
    return "\n\n".join(f"### `{file}`\n\n{_table(head, found)}" for file, found in rows.items())


_FEWEST = 64
"""Positions below which a script is not shown."""


def _scripts(found: Mapping[str, Mapping[str, Script]]) -> str:
    """What each file loses in each script; nothing where no script has enough text."""
    rows = [
        (f"`{file}`", name, str(each["positions"]), _interval(each["kld"]), _interval(each["kld_ratio"]))
        for file, scripts in found.items()
        for name, each in scripts.items()
        if each["positions"] >= _FEWEST
    ]
    head = ("file", "script of the text", "positions", "KLD", "over Latin's")
    return f"### By script\n\n{_table(head, rows)}\n\n" if rows else ""


def _interval(estimate: Estimate | None) -> str:
    """A value with its interval; a dash where there is none."""
    if not estimate or estimate["value"] is None or estimate["low"] is None or estimate["high"] is None:
        return "–"
    return f"{estimate['value']:.2g} ({estimate['low']:.2g} to {estimate['high']:.2g})"


def _command(subject: Subject, build: Build) -> str:
    base = ""
    if subject.base:
        said = (
            f"{subject.base.model}@{subject.base.revision}" if subject.base.on_hub else "path/to/" + subject.base.model
        )
        base = f" BASE={said}"
    more = f" RECIPE={build.asked}" if build.asked else ""
    more += f" TOWERS={subject.taken}" if subject.taken else ""
    more += f" CONTEXT={build.context}" if build.context else ""
    more += " DEVICE=cuda" if build.gpu else ""
    if subject.on_hub:
        return f"make publish MODEL_ID={subject.model} REVISION={subject.revision}{base}{more}"
    return f"make publish MODEL_ID=path/to/{subject.model}{base}{more}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines)
