"""The stages before publish, stood in for by small ones that run through the real runner: what they leave is real.

Only the model files are a few bytes, which publish does not open.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipeline import publish
from pipeline.core import manifest, stage
from pipeline.core.errors import VerificationError
from pipeline.core.facts import Bundle, Ladder, Precision, Verify
from pipeline.core.recipe import PROJECT
from pipeline.core.stage import Context, Outcome, Stage
from pipeline.release import provenance

CARD = """---
license: {licence}
language: [en, zgh]
tags: {tags}
---
# A model
"""
STEPS = ("fp32", "fp16", "int8", "int8-static")
BUNDLES = ("fp32", "int8")
STAGES = (*STEPS, "bundle")


def judgement(passed: bool = True) -> dict[str, Any]:
    """What verify leaves, with one failed check if not `passed`."""
    checks = [
        {
            "variant": variant,
            "name": "KLD on the corpus",
            "value": 0.5 if variant == "int8" and not passed else 0.00123456,
            "limit": 0.01,
            "direction": "<=",
            "passed": passed or variant != "int8",
            "against": "Hugging Face" if variant == "fp32" else "fp32",
            "detail": "2048 positions",
        }
        for variant in (*(f"bundle-{name}" for name in BUNDLES), *STEPS)
    ]
    alternative = {**checks.pop(), "passed": False}  # judged and not good enough: no reason to hold back the others
    return {"passed": passed, "checks": checks, "alternative_checks": [alternative]}


def tensors(file: Path) -> list[dict[str, Any]]:
    """Three tensors of equal size in a file that has nothing else."""
    data, rows = file.read_bytes(), []
    for number in range(3):
        start, stop = (len(data) * place // 3 for place in (number, number + 1))
        place = {"offset": start, "size": stop - start, "sha256": hashlib.sha256(data[start:stop]).hexdigest()}
        rows.append({"name": f"w{number}", "section": "", "shape": [stop - start], "type": "INT8", **place})
    return rows


CHAIN: list[manifest.Fact] = [
    {"model": "a/b", "known": True, "licence": "apache-2.0", "base_models": ["c/d"], "from_scratch": False},
    {"model": "c/d", "known": True, "licence": "gemma", "base_models": [], "from_scratch": False},
]
"""A fine-tune's base that claims another licence than its own base."""


HELD = Bundle(
    sections=(), model_type="gemma3n", start_token=2, stop_tokens=(1,), max_tokens=4096, chat_template=True, top_k=1,
    stored=1, weight_bytes=1, remarks=("LiteRT-LM samples without min_p = 0.1.",),
)  # fmt: skip
"""What the bundle stage says of a bundle."""


def clean(patch: pytest.MonkeyPatch) -> None:
    """No git here: as in the container, the environment says what the sources are."""
    patch.setenv("GIT_DIR", "/dev/null")
    patch.setenv("SOURCE_COMMIT", "c" * 40)
    patch.delenv("SOURCE_DIRTY", raising=False)


@dataclass
class Line:
    """The stages before publish in an artefact folder of their own; attributes change what they leave."""

    artifacts: Path
    model: str = "tiny-gemma3n"
    licence: str = "cc0-1.0"
    base_models: list[str] = field(default_factory=list)
    lineage: list[manifest.Fact] = field(default_factory=list)
    adapter: dict[str, manifest.Fact] = field(default_factory=dict)
    tags: list[str] = field(default_factory=lambda: ["trained-from-scratch"])
    licence_files: tuple[str, ...] = ("LICENSE",)
    passed: bool = True
    recipe: Path = field(init=False)

    def __post_init__(self) -> None:
        """The shipped recipe but for its int4 bundle, which test_int4 is about."""
        text, self.recipe = (
            (PROJECT / stage.DEFAULT_RECIPE).read_text(encoding="utf-8"),
            self.artifacts / ".recipe.toml",
        )
        self.artifacts.mkdir(parents=True, exist_ok=True)
        self.recipe.write_text(text.replace('optional = ["int4"]', "optional = []"), encoding="utf-8")

    @property
    def root(self) -> Path:
        return self.artifacts / self.model.replace("/", "--")

    @property
    def folder(self) -> Path:
        return self.root / "publish"

    def run(self, made: Stage, *options: str) -> int:
        where = ["--model-id", self.model, "--artifacts", str(self.artifacts), "--recipe", str(self.recipe)]
        return stage.main(made, [*where, *options])

    def fetch(self) -> None:
        def work(context: Context) -> Outcome:
            checkpoint = context.folder / "checkpoint"
            checkpoint.mkdir()
            for name in ("config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json"):
                (checkpoint / name).write_text(name, encoding="utf-8")
            for name in self.licence_files:
                (checkpoint / name).write_text("the owner's words", encoding="utf-8")
            card = CARD.format(licence=self.licence, tags=json.dumps(self.tags))
            (checkpoint / "README.md").write_text(card, encoding="utf-8")
            facts: dict[str, manifest.Fact] = {
                "licence": self.licence,
                "base_models": [*self.base_models],
                "lineage": [*self.lineage],
                "model_type": "gemma3n_text",
                "parameters": 1,
                "dtype": "bfloat16",
                "shards": 1,
                **({"adapter": self.adapter} if self.adapter else {}),
            }
            return Outcome(model=self.model, revision="a" * 40, facts=facts)

        assert self.run(Stage(name="fetch", summary="", work=work)) == 0

    def variant(self, name: str, data: bytes, *sections: str) -> None:
        def work(context: Context) -> Outcome:
            made = [f"{section}.tflite" for section in ("step", *sections)]
            for file in [f"{kind}.litertlm" for kind in BUNDLES] if name == "bundle" else made:
                (context.folder / file).write_bytes(data + file.encode())
            if name in ("int8", "int4"):
                climbed = Ladder(rung="rotate") if name == "int8" else None
                return Outcome(facts=Precision(graphs="all", climbed=climbed))
            return Outcome(facts=dict.fromkeys(BUNDLES, HELD) if name == "bundle" else {})

        assert self.run(Stage(name=name, summary="", work=work, needs_of=lambda *_: ("fetch",))) == 0

    def verify(self, variants: tuple[str, ...] = STAGES, write: Callable[[Context], None] | None = None) -> int:
        def work(context: Context) -> Outcome:
            made = [record for each in context.upstream.values() for record in each.outputs]
            digests = {record.path: {"sha256": record.sha256} for record in made}
            found = judgement(self.passed) | {"variants": digests, "bundles": {}}
            timed = {"speed": {}, "sequences": [1], "machine": {"cores": 2}, "date": "2026-11-24"}
            listed = {record.path: tensors(self.root / record.path) for record in made}
            papers = {"judgement": found, "report": found | timed, "tensors": listed}
            for name, paper in papers.items():
                (context.folder / f"{name}.json").write_text(manifest.dump_json(paper), encoding="utf-8")
            (context.folder / "report.html").write_text("<title>report</title>", encoding="utf-8")
            if write:
                write(context)
            if not self.passed:
                raise VerificationError("a gate failed")
            return Outcome(facts=Verify(passed=True, checks=1, fit=tuple(variants), not_fit=()))

        measured = ("report.json", "report.html")
        needs = ("fetch", *variants)
        return self.run(Stage(name="verify", summary="", work=work, needs_of=lambda *_: needs, measured=measured))

    def publish(self) -> int:
        return self.run(publish.STAGE)


def reseal(folder: Path) -> None:
    """What a forger would do who knows of SHA256SUMS."""
    (folder / "SHA256SUMS").unlink()
    provenance.write_sums(folder, [file for file in folder.rglob("*") if file.is_file()])
