"""The papers for machines: tensors, bill of materials, and the statement that lists all others."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.core import host
from pipeline.core.facts import Fetch, Ladder, Precision
from pipeline.core.manifest import dump_json
from pipeline.core.recipe import PROJECT
from pipeline.core.stage import Context
from pipeline.release import folder, preflight, provenance, sbom
from pipeline.release.card import Product
from pipeline.release.subject import base_of, subject_of

MEASURED = (*preflight.REPORTS, provenance.NAME)
"""Files that hold timings, or cover such: they differ from build to build."""


def write_papers(
    context: Context, products: Sequence[Product], files: Mapping[str, str], terms: str, override: str
) -> None:
    """Tensors, bill of materials and, last, the statement that lists them; `files` maps model files to their sha256.

    `terms` is the licence's identifier, `override` what somebody said against the checkpoint's card.
    """
    target, names = context.folder, {product.source: product.file for product in products}
    tensors = provenance.tensors(context.root / "verify" / provenance.TENSORS, names)
    (target / provenance.TENSORS).write_text(dump_json(tensors), encoding="utf-8")
    (target / sbom.NAME).write_text(_bill(context, files, terms), encoding="utf-8")
    papers = folder.papers(target, files, MEASURED)
    said = provenance.statement(files, context.upstream, _parameters(context, override), _locks(), papers)
    (target / provenance.STATEMENT).write_text(dump_json(said), encoding="utf-8")


def _bill(context: Context, files: Mapping[str, str], terms: str) -> str:
    """The bill of materials: the checkpoint, the files, and the lock of the torch that verify saw."""
    fetched, tools = context.upstream["fetch"], context.upstream["verify"].tools
    held = {record.path.removeprefix("fetch/checkpoint/"): record.sha256 for record in fetched.outputs}
    base = sbom.Model(name=fetched.model, version=fetched.revision, files=held, licence=fetched.told(Fetch).licence)
    made = sbom.Model(name=context.root.name, version=context.recipe.sha256, files=files, licence=terms)
    lock = _lock_of(tools.get("torch", "+cpu"))
    return sbom.text(base, made, sbom.packages(lock) if lock.is_file() else [])


def _lock_of(torch: str) -> Path:
    """The lock that has this version of torch, of this host."""
    built = "cpu" if torch.endswith("+cpu") else "cuda" if host.LINUX else "macos"
    return PROJECT / "locks" / f"{built}.txt"


def _parameters(context: Context, override: str) -> dict[str, str]:
    fetched = context.upstream["fetch"]
    told = fetched.told(Fetch)
    return {
        "MODEL_ID": fetched.model,
        "REVISION": fetched.revision,
        **({"TEMPLATE": f"sha256:{told.template}"} if told.template else {}),
        **({"BASE": f"{base.model}@{base.revision}"} if (base := base_of(told)) else {}),
        "RECIPE": context.recipe.name,
        "GRAPHS": context.graphs,
        **({"TOWERS": taken} if (taken := subject_of(fetched).taken) else {}),
        **({"RUNG": climbed.rung} if (climbed := _climbed(context)) else {}),
        **({"LICENCE_OVERRIDE": override} if override else {}),
    }


def _climbed(context: Context) -> Ladder | None:
    """How int8 was made, where it chose for itself."""
    return context.upstream["int8"].told(Precision).climbed if "int8" in context.upstream else None


def _locks() -> dict[str, str]:
    """The locks that environments and image are made from."""
    names = [f"locks/{name}.txt" for name in ("cpu", "cuda", "macos")]
    return {name: hashlib.sha256((PROJECT / name).read_bytes()).hexdigest() for name in names}
