"""Stage page: a static folder that runs the judged int8 bundle in a browser: the page, its libraries, the very files.

Decoder and embedders are the bytes that verify judged, the tokenizer is the bundle's. `python -m pipeline.serve` shows
the folder on this machine.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline.bundling import web
from pipeline.bundling.contents import read
from pipeline.bundling.metadata import Described, of_checkpoint, tokenizer_json
from pipeline.core import facts, log
from pipeline.core.manifest import FileRecord, dump_json
from pipeline.core.recipe import Recipe
from pipeline.core.stage import Context, Outcome, Stage, main
from pipeline.judge import recorded
from pipeline.release import folder, preflight
from pipeline.runtime.sections import Sections

PRECISION = "int8"
_KLD = 0.01
"""Nats, where the recipe has no limit of its own."""


def work(context: Context) -> Outcome:
    """Fill `page/`.

    Raises:
        PublishError: verify did not pass for these very bytes under this recipe.
        UsageError: the page's libraries or Node.js are missing.
        BundleError: the page would give the model other prompts than transformers.
    """
    versions, target, root = web.require_libraries(), context.folder, context.root
    judgement = preflight.judgement(root / "verify")
    described = of_checkpoint(root / "fetch" / "checkpoint", context.recipe.bundle)
    sources = {name: f"{PRECISION}/{name}.tflite" for name in described.metadata.sections}
    preflight.refuse_other_recipe(context.upstream["verify"], context.recipe.sha256)
    preflight.refuse_other_bytes(context.upstream, (*sources.values(), f"bundle/{PRECISION}.litertlm"))

    web.place_page(target)
    folder.place_reports(root / "verify", ("report.html",), target)
    (target / "model").mkdir()
    placed = {
        name: folder.place_model(root / path, target / "model" / Path(path).name) for name, path in sources.items()
    }
    placed["tokenizer"] = target / "model" / "tokenizer.json"
    placed["tokenizer"].write_text(tokenizer_json(described.tokenizer, described.vocabulary), encoding="utf-8")
    placed["recorded"] = target / "model" / "recorded.json"
    placed["recorded"].write_text(dump_json(_recorded(root / PRECISION, described, target)), encoding="utf-8")
    judged = web.Judged(
        name=root.name,
        model=context.upstream["fetch"].model,
        revision=context.upstream["fetch"].revision,
        checks=sum(check["variant"] == f"bundle-{PRECISION}" for check in judgement["checks"]),
        kld=_limit(context.recipe),
    )
    records = {name: FileRecord.of(file, target) for name, file in placed.items()}
    page = web.describe(described, judged, records, _cache_bytes(placed["decoder"]))
    (target / "page.json").write_text(dump_json(page), encoding="utf-8")
    web.list_files(target)
    terms = folder.place_licence_files(root / "fetch" / "checkpoint", target)
    (target / "README.md").write_text(web.space_card(root.name, terms), encoding="utf-8")
    log.step(f"{web.prove(target, described)} conversations have the same prompts in the page's libraries")
    return Outcome(facts=facts.Page(libraries=versions))


def _recorded(sections: Path, described: Described, place: Path) -> recorded.Recorded:
    """What the interpreter says at a few places of the conversations that the template is proven on.

    XNNPACK's weights take room below `place` meanwhile.
    """
    with TemporaryDirectory(dir=place) as scratch:
        opened = Sections(sections, weights=Path(scratch) / "weights")
        return recorded.record(opened, web.token_ids(described, recorded.needed(opened)))


def _limit(recipe: Recipe) -> float:
    gate = recipe.gates.get(f"bundle-{PRECISION}")
    return gate.kld if gate and gate.kld else _KLD


def _cache_bytes(decoder: Path) -> int:
    """Bytes of the KV cache, float32, as the decoder's inputs say."""
    signatures = {signature.name: signature for signature in read(decoder).models[0].signatures}
    held = [port.shape for port in signatures["decode"].inputs if port.name.startswith("kv_cache_")]
    return 4 * sum(map(math.prod, held))


STAGE = Stage(
    name="page",
    summary="Make a static page that runs the judged int8 bundle in a browser.",
    work=work,
    needs_of=lambda root, _options: preflight.judged_stages(root),
    measured=("report.html",),
)

if __name__ == "__main__":
    sys.exit(main(STAGE))
