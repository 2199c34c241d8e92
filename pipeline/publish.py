"""Stage publish: put together exactly what would be uploaded, or refuse with the reason. A dry run: nothing is sent.

Everything in `publish/` would go up, except the runner's own `manifest.json` and `run.json`. `report.json` and
`report.html` hold timings, and `SHA256SUMS` covers them, so these three differ from build to build and stand outside
the manifest; the rest, the card included, is the same bytes every time. `pipeline.sign` signs the finished folder.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from pipeline.core import facts, options
from pipeline.core.stage import Context, Outcome, Stage, main
from pipeline.models import terms as carried_on
from pipeline.release import card, folder, licence, preflight
from pipeline.release.papers import MEASURED, write_papers
from pipeline.release.subject import build_of, claim_of, products_of, subject_of


@dataclass(frozen=True, kw_only=True)
class Options(options.Options):
    """What somebody says of the licence."""

    licence_override: str = field(
        default="", metadata={"metavar": "TEXT", "help": "`identifier: reason`, against the checkpoint's card"}
    )


def work(context: Context) -> Outcome:
    """Fill `publish/`.

    Raises:
        PublishError: verify did not pass for these very bytes under this recipe, or the licence forbids publishing.
    """
    verify = context.upstream["verify"]
    judgement = preflight.judgement(context.root / "verify")
    products = products_of(context, judgement)
    preflight.refuse_other_recipe(verify, context.recipe.sha256)
    preflight.refuse_other_bytes(context.upstream, (product.source for product in products))
    checkpoint, target = context.root / "fetch" / "checkpoint", context.folder
    fetched = context.upstream["fetch"]
    source, subject = card.front_matter(checkpoint), subject_of(fetched)
    claim, build = claim_of(fetched, source, carried_on(subject.model_type)), build_of(context)
    override = context.chosen(Options).licence_override
    terms = licence.resolve(claim, override)

    checks = preflight.checks(judgement, {product.variant: product.file for product in products})
    for product in products:
        folder.place_model(context.root / product.source, target / product.file)
    folder.place_tokenizer(checkpoint, target)
    folder.place_reports(context.root / "verify", preflight.REPORTS, target)
    folder.place_manifests(context.root, context.upstream, target)
    carried = folder.place_licence_files(checkpoint, target)
    (target / "LICENSE").write_text(licence.licence_text(terms, carried), encoding="utf-8")
    (target / "NOTICE").write_text(licence.notice_text(terms, subject.model, build.changes), encoding="utf-8")
    by_script = {
        product.file: found["scripts"]
        for product in products
        if (found := judgement["bundles"].get(product.variant)) and found.get("scripts")
    }
    page = card.text(subject, terms, source, products, checks, build, by_script)
    (target / "README.md").write_text(page, encoding="utf-8")

    judged = {record.path: record.sha256 for record in verify.inputs}
    files = {product.file: judged[product.source] for product in products}
    write_papers(context, products, files, terms.identifier, override)
    folder.show(target, folder.seal(target, files))
    return Outcome(
        facts=facts.Publish(
            licence=terms.identifier,
            licence_override=override,
            base_models=subject.base_models,
            uploaded=False,
        )
    )


STAGE = Stage(
    name="publish",
    summary="Put together what would be uploaded: model files, card, licence, report, manifests, checksums (dry run).",
    work=work,
    options=Options,
    needs_of=lambda root, _options: preflight.judged_stages(root),
    measured=MEASURED,
)

if __name__ == "__main__":
    sys.exit(main(STAGE))
