"""Stage publish: put together exactly what would be uploaded, or refuse with the reason. A dry run: nothing is sent.

Everything in `publish/` would go up, except the runner's own `manifest.json` and `run.json`. `report.json` and
`report.html` hold timings, and `SHA256SUMS` covers them, so these three differ from build to build and stand outside
the manifest; the rest, the card included, is the same bytes every time. `pipeline.sign` signs the finished folder.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, cast

from pipeline.core.graph import model_name
from pipeline.core.manifest import Manifest, dump_json
from pipeline.core.recipe import PROJECT, Recipe
from pipeline.core.stage import Context, Outcome, Stage, main
from pipeline.release import card, folder, licence, preflight, provenance, sbom
from pipeline.release.card import Build, Product, Subject
from pipeline.release.licence import Ancestor, Claim

PRECISIONS = {"fp32": "float32", "fp16": "float16", "int8": "int8", "int4": "int4"}
STEP = "step.tflite"


def work(context: Context) -> Outcome:
    """Fill `publish/`.

    Raises:
        PublishError: verify did not pass for these very bytes under this recipe, or the licence forbids publishing.
    """
    verify = context.upstream["verify"]
    judgement = preflight.judgement(context.root / "verify")
    products = _products(context)
    preflight.refuse_other_recipe(verify, context.recipe.sha256)
    preflight.refuse_other_bytes(context.upstream, (product.source for product in products))
    checkpoint, target = context.root / "fetch" / "checkpoint", context.folder
    source, subject = card.front_matter(checkpoint), _subject(context.upstream["fetch"])
    claim, build = _claim(context.upstream["fetch"], source), _build(context)
    terms = licence.resolve(claim, context.arguments.licence_override)

    checks = preflight.checks(judgement, {product.variant: product.file for product in products})
    for product in products:
        folder.place_model(context.root / product.source, target / product.file)
    folder.place_tokenizer(checkpoint, target)
    folder.place_reports(context.root / "verify", preflight.REPORTS, target)
    folder.place_manifests(context.root, context.upstream, target)
    carried = folder.place_licence_files(checkpoint, target)
    (target / "LICENSE").write_text(licence.licence_text(terms, carried), encoding="utf-8")
    (target / "NOTICE").write_text(licence.notice_text(terms, subject.model, build.changes), encoding="utf-8")
    page = card.text(subject, terms, source, products, checks, build)
    (target / "README.md").write_text(page, encoding="utf-8")

    judged = {record.path: record.sha256 for record in verify.inputs}
    files = {product.file: judged[product.source] for product in products}
    _write_papers(context, products, files, terms.identifier)
    folder.show(target, folder.seal(target, files))
    return Outcome(
        facts={
            "licence": terms.identifier,
            "licence_override": context.arguments.licence_override,
            "base_models": list(subject.base_models),
            "uploaded": False,
        }
    )


def _write_papers(context: Context, products: Sequence[Product], files: Mapping[str, str], terms: str) -> None:
    """Tensors, bill of materials and, last, the statement that lists them; `files` maps model files to their sha256."""
    target, names = context.folder, {product.source: product.file for product in products}
    tensors = provenance.tensors(context.root / "verify" / provenance.TENSORS, names)
    (target / provenance.TENSORS).write_text(dump_json(tensors), encoding="utf-8")
    (target / sbom.NAME).write_text(_bill(context, files, terms), encoding="utf-8")
    papers = folder.papers(target, files, STAGE.measured)
    said = provenance.statement(files, context.upstream, _parameters(context), _locks(), papers)
    (target / provenance.STATEMENT).write_text(dump_json(said), encoding="utf-8")


def _bill(context: Context, files: Mapping[str, str], terms: str) -> str:
    """The bill of materials: the checkpoint, the files, and the lock of the torch that verify saw."""
    fetched, tools = context.upstream["fetch"], context.upstream["verify"].tools
    held = {record.path.removeprefix("fetch/checkpoint/"): record.sha256 for record in fetched.outputs}
    base = sbom.Model(name=fetched.model, version=fetched.revision, files=held, licence=str(fetched.facts["licence"]))
    made = sbom.Model(name=context.root.name, version=context.recipe.sha256, files=files, licence=terms)
    lock = PROJECT / "locks" / ("cpu.txt" if tools.get("torch", "+cpu").endswith("+cpu") else "cuda.txt")
    return sbom.text(base, made, sbom.packages(lock) if lock.is_file() else [])


def _parameters(context: Context) -> dict[str, Any]:
    fetched = context.upstream["fetch"]
    return {
        "MODEL_ID": fetched.model,
        "REVISION": fetched.revision,
        "RECIPE": context.recipe.name,
        "GRAPHS": context.graphs,
        **({"LICENCE_OVERRIDE": override} if (override := context.arguments.licence_override) else {}),
    }


def _locks() -> dict[str, str]:
    """The locks that environments and image are made from."""
    files = sorted((PROJECT / "locks").glob("c*.txt"))
    return {f"locks/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _products(context: Context) -> list[Product]:
    """Bundles of the recipe's precisions, and step graphs in three and in int4 if the recipe names it, as wanted."""
    found: list[Product] = []
    if context.graphs != "step":
        found += [_bundle(context, precision) for precision in context.recipe.bundle.precisions]
    if context.graphs != "bundle":
        named = [name for name in PRECISIONS if name != "int4" or name in context.recipe.bundle.precisions]
        found += [_step(context, precision) for precision in named]
    return found


def _bundle(context: Context, precision: str) -> Product:
    scheme = ", dynamic" if precision in ("int8", "int4") else ""
    return _product(
        context,
        variant=f"bundle-{precision}",
        source=f"bundle/{precision}.litertlm",
        precision=f"{PRECISIONS[precision]}{scheme}, bundle for LiteRT-LM",
    )


def _step(context: Context, precision: str) -> Product:
    scheme = {"int8": f", {context.recipe.int8.scheme}", "int4": ", dynamic"}.get(precision, "")
    return _product(
        context,
        variant=precision,
        source=f"{precision}/{STEP}",
        precision=f"{PRECISIONS[precision]}{scheme}, step graph",
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


def _subject(fetched: Manifest) -> Subject:
    return Subject(
        model=fetched.model,
        revision=fetched.revision,
        base_models=licence.texts(fetched.facts["base_models"]),
        lineage=tuple(one.model for one in _lineage(fetched)),
        model_type=str(fetched.facts["model_type"]),
    )


def _lineage(fetched: Manifest) -> tuple[Ancestor, ...]:
    rows = cast("list[dict[str, Any]]", fetched.facts["lineage"])
    return tuple(Ancestor(**{**row, "base_models": licence.texts(row["base_models"])}) for row in rows)


def _claim(fetched: Manifest, source: Mapping[str, Any]) -> Claim:
    return Claim(
        model=fetched.model,
        model_type=str(fetched.facts["model_type"]),
        licence=str(fetched.facts["licence"]),
        base_models=licence.texts(fetched.facts["base_models"]),
        tags=licence.texts(source.get("tags")),
        lineage=_lineage(fetched),
    )


def _build(context: Context) -> Build:
    made, recipe = context.upstream["verify"], context.recipe
    return Build(
        recipe=recipe.name,
        recipe_sha256=recipe.sha256,
        max_batch=recipe.step.max_batch,
        max_sequence=recipe.step.max_sequence,
        max_tokens=recipe.bundle.max_tokens,
        commit=made.source.commit + (" with local changes" if made.source.commit and made.source.dirty else ""),
        tools=made.tools,
        changes="the text model was rebuilt as graphs of LiteRT operators, and its weights were stored as float32, as "
        f"float16, and as int8 (one symmetric scale per output channel, {recipe.int8.scheme} activations)"
        + (", and as int4 (a scale per 32 weights; some with 8 bits)." if "int4" in recipe.bundle.precisions else "."),
    )


def _needs(arguments: argparse.Namespace, _recipe: Recipe) -> tuple[str, ...]:
    """Fetch, the stages that verify read, and verify.

    Raises:
        PublishError: verify is not finished, or failed.
    """
    verify = preflight.verified(arguments.artifacts / model_name(arguments.model_id))
    stages = {record.path.split("/", 1)[0] for record in verify.inputs}
    return ("fetch", *sorted(stages - {"fetch"}), "verify")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--licence-override", default="", metavar="TEXT", help="`identifier: reason`, against the checkpoint's card"
    )


STAGE = Stage(
    name="publish",
    summary="Put together what would be uploaded: model files, card, licence, report, manifests, checksums (dry run).",
    work=work,
    add_arguments=_add_arguments,
    needs_of=_needs,
    measured=(*preflight.REPORTS, provenance.NAME),
)

if __name__ == "__main__":
    sys.exit(main(STAGE))
