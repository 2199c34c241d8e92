"""Stage space: put together exactly what a static Space of the Hub would hold, or refuse with the reason.

The page's own bytes, and the papers that `publish` made of the same files: report, manifests, licence, checksums. So
`pipeline.upload` clears the folder as it clears `publish/`, and a Space gets the same receipt. Nothing is sent here.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import yaml

from pipeline.core import manifest
from pipeline.core.errors import PublishError
from pipeline.core.facts import Publish
from pipeline.core.manifest import Manifest
from pipeline.core.stage import Context, Outcome, Stage, main
from pipeline.release import card, folder, preflight
from pipeline.release.papers import MEASURED

_JUDGED = f"verify/{preflight.JUDGEMENT}"
_PAPERS = ("LICENSE", "NOTICE", *preflight.REPORTS)
_TERMS = ("license", "license_name", "license_link")


def work(context: Context) -> Outcome:
    """Fill `space/`.

    Raises:
        PublishError: page and publish folder were not made of the same judged files.
    """
    page, publish, target = context.upstream["page"], context.root / "publish", context.folder
    _refuse_others(context.upstream)
    for record in page.outputs:
        place = target / record.path.removeprefix("page/")
        place.parent.mkdir(parents=True, exist_ok=True)
        folder.place_model(context.root / record.path, place)
    for name in _PAPERS:
        shutil.copyfile(publish / name, target / name)
    shutil.copytree(publish / "manifests", target / "manifests")
    shutil.copyfile(context.root / "page" / manifest.NAME, target / "manifests" / "page.json")
    _add_terms(target / "README.md", card.front_matter(publish))
    sources = {record.path: record.sha256 for record in page.inputs}
    models = {f"model/{file.name}": sources[f"int8/{file.name}"] for file in (target / "model").glob("*.tflite")}
    folder.show(target, folder.seal(target, models))
    return Outcome(facts=context.upstream["publish"].told(Publish))


def _refuse_others(made: Mapping[str, Manifest]) -> None:
    verdicts = {name: [each for each in made[name].inputs if each.path == _JUDGED] for name in ("page", "publish")}
    if not verdicts["page"] or verdicts["page"] != verdicts["publish"]:
        raise PublishError(
            "the page and the publish folder were made of other verdicts",
            cause="`verify` ran again between them",
            remedy="run `make page publish` again",
        )


def _add_terms(readme: Path, said: Mapping[str, object]) -> None:
    """Name the licence where the Hub looks for it; `said` is the front matter of the files' own card."""
    text, terms = readme.read_text(encoding="utf-8"), {name: said[name] for name in _TERMS if name in said}
    readme.unlink()  # the page's own, by a link
    readme.write_text(text.replace("---\n", f"---\n{yaml.safe_dump(terms)}", 1), encoding="utf-8")


STAGE = Stage(
    name="space",
    summary="Put together a static Space: the page, with the papers of the files that it runs (dry run).",
    work=work,
    measured=MEASURED,
)

if __name__ == "__main__":
    sys.exit(main(STAGE))
