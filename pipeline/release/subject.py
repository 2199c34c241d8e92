"""What is published: the model files, the checkpoint that they come from and its terms, and how they were built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from pipeline.core import log
from pipeline.core.facts import Bundle, Fetch, Precision, Sees, Verify
from pipeline.core.graph import tower_precision
from pipeline.core.judgement import Judgement
from pipeline.core.manifest import Manifest
from pipeline.core.recipe import STEP, asked_for
from pipeline.core.stage import Context
from pipeline.release import licence
from pipeline.release.card import Base, Build, Phone, Product, Sense, Subject
from pipeline.release.licence import Claim

PRECISIONS = {"fp32": "float32", "fp16": "float16", "int8": "int8", "int4": "int4"}


def products_of(context: Context, judgement: Judgement) -> list[Product]:
    """What was judged and is good enough.

    Bundles of the recipe's precisions, and step graphs in three and in int4 if the recipe names it, as wanted.
    """
    found: list[Product] = []
    if context.graphs != "step":
        found += [_bundle(context, precision, judgement) for precision in context.bundled]
    if context.graphs != "bundle":
        named = [name for name in PRECISIONS if name != "int4" or name in context.recipe.bundle.precisions]
        found += [_step(context, precision) for precision in named]
    missed = _missed(context)
    for product in found:
        if product.variant in missed:
            log.warn(f"{product.variant} misses a limit, and is not published: see the report")
    return [product for product in found if product.variant not in missed]


def _missed(context: Context) -> set[str]:
    """The optional bundles that are not good enough."""
    names = {f"bundle-{precision}" for precision in context.recipe.bundle.optional}
    return names & {*context.upstream["verify"].told(Verify).not_fit} if names else set()


def _has_int4(context: Context) -> bool:
    return "int4" in context.bundled and "bundle-int4" not in _missed(context)


def _bundle(context: Context, precision: str, judgement: Judgement) -> Product:
    activations = ", dynamic" if precision in ("int8", "int4") else ""
    product = _product(
        context,
        variant=f"bundle-{precision}",
        source=f"bundle/{precision}.litertlm",
        precision=f"{PRECISIONS[precision]}{activations}, bundle for LiteRT-LM",
    )
    held = context.upstream["bundle"].part(precision, Bundle)
    if not held.sections:
        return product
    phone = Phone(
        largest_section=max(section.size for section in held.sections),
        cache=held.cache_bytes,
        tokens=held.max_tokens,
        activation_type="".join(section.activation_type for section in held.sections),
    )
    return replace(product, phone=phone, senses=tuple(_senses(held, precision, judgement)))


def _senses(held: Bundle, precision: str, judgement: Judgement) -> Iterator[Sense]:
    """What a bundle sees and hears by; the towers of several bundles may be judged with the first of them."""
    known = [bundle["senses"]["errors"] for bundle in judgement["bundles"].values() if "senses" in bundle]
    errors = {name: found for one in known for name, found in one.items()}
    asks = {
        "vision": _pictures(held.sees) if held.sees else "",
        "audio": f"sounds of up to 30 s, {held.hears.rate} samples a second" if held.hears else "",
    }
    for tower, taken in asks.items():
        if taken:
            found = [*errors.get(f"{tower}-{tower_precision(precision)}", {}).values()]
            size = sum(section.size for section in held.sections if tower in section.model_type)
            whole = [error for error in found if error is not None]
            worst = max(whole) if whole and len(whole) == len(found) else None
            yield Sense(tower=tower, size=size, asks=taken, error=worst, inputs=len(found))


def _pictures(sees: Sees) -> str:
    if sees.patches:
        return f"pictures of any proportions, of up to {sees.patches.tokens * sees.patches.side**2} pixels"
    return f"pictures of {sees.size} x {sees.size} pixels"


def _step(context: Context, precision: str) -> Product:
    activations = context.recipe.activations(precision)
    return _product(
        context,
        variant=precision,
        source=f"{precision}/{STEP}",
        precision=", ".join(filter(None, (PRECISIONS[precision], activations, "step graph"))),
    )


def _product(context: Context, variant: str, source: str, precision: str) -> Product:
    file = context.root / source
    return Product(
        variant=variant,
        source=source,
        file=f"{context.root.name}_{variant.removeprefix('bundle-')}{file.suffix}",
        precision=precision,
        size=file.stat().st_size,
    )


def subject_of(fetched: Manifest) -> Subject:
    """The checkpoint, as fetch found it."""
    found = fetched.told(Fetch)
    return Subject(
        model=fetched.model,
        revision=fetched.revision,
        base_models=found.base_models,
        lineage=tuple(one.model for one in found.lineage),
        model_type=found.model_type,
        base=base_of(found),
        left_out=found.left_out,
        towers=tuple(tower.tower for tower in found.towers),
    )


def base_of(found: Fetch) -> Base | None:
    """What an adapter was merged into; None for a whole model."""
    merged, licences = found.adapter, {one.model: one.licence for one in found.lineage}
    if not merged:
        return None
    return Base(model=merged.base, revision=merged.base_revision, licence=licences.get(merged.base, ""))


def claim_of(fetched: Manifest, source: Mapping[str, object], terms: str) -> Claim:
    """What the checkpoint says of its terms; `source` is what its own card begins with, `terms` those of its family."""
    found = fetched.told(Fetch)
    return Claim(
        model=fetched.model,
        model_type=found.model_type,
        terms=terms,
        licence=found.licence,
        base_models=found.base_models,
        tags=licence.texts(source.get("tags")),
        lineage=found.lineage,
    )


def of_gpu(context: Context) -> Iterator[str]:
    """The stages that ran on a GPU, as those tell that read what they made."""
    if context.upstream["verify"].told(Verify).device != "cpu":
        yield "golden"
    rounded = [context.upstream[name] for name in ("int8", "int4") if name in context.upstream]
    if any(made.told(Precision).device != "cpu" for made in rounded):
        yield "moments"


def build_of(context: Context) -> Build:
    """How the files were made: recipe, commit and tools, and the changes in words."""
    judged, recipe = context.upstream["verify"], context.recipe
    bundles = context.upstream.get("bundle")
    held = [bundles.part(name, Bundle).remarks for name in context.bundled] if bundles else []
    return Build(
        recipe=recipe.name,
        recipe_sha256=recipe.sha256,
        asked=asked_for(recipe, context.upstream["fetch"].told(Fetch).model_type),
        context=recipe.context,
        gpu=tuple(of_gpu(context)),
        max_batch=recipe.step.max_batch,
        max_sequence=recipe.step.max_sequence,
        fixed=recipe.step.fixed,
        max_tokens=recipe.bundle.max_tokens,
        commit=judged.source.commit + (" with local changes" if judged.source.commit and judged.source.dirty else ""),
        tools=judged.tools,
        changes="the text model was rebuilt as graphs of LiteRT operators, and its weights were stored as float32, as "
        f"float16, and as int8 (one symmetric scale per output channel, {recipe.activations('int8')} activations)"
        + (", and as int4 (a scale per 32 weights; some with 8 bits)." if _has_int4(context) else "."),
        remarks=tuple(dict.fromkeys(remark for remarks in held for remark in remarks)),
    )
