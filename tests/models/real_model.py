"""A real model through `make`, and what verify says of it."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.recipe import PROJECT


@dataclass(frozen=True)
class Build:
    """The model's folder below ARTIFACTS, and the exit code of `make`."""

    root: Path
    code: int

    @classmethod
    def make(cls, target: str, checkpoint: str, recipe: str, artifacts: Path, seed: int) -> Build:
        """Run `make TARGET` on a checkpoint folder."""
        settings = [f"MODEL_ID={checkpoint}", f"RECIPE={recipe}", "GRAPHS=bundle", "DEVICE=cpu"]
        pinned = [f"PYTHONHASHSEED={seed}", "SOURCE_DATE_EPOCH=1764000000"]  # else the last commit's, which may change
        command = ["make", target, *settings, *pinned, f"ARTIFACTS={artifacts}"]
        return cls(root=artifacts / Path(checkpoint).name, code=subprocess.call(command, cwd=PROJECT))

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file of a stage."""
        content: dict[str, Any] = json.loads((self.root / name).read_text(encoding="utf-8"))
        return content

    def bundle(self, precision: str) -> dict[str, Any]:
        """What verify says of a bundle."""
        found: dict[str, Any] = self.read("verify/report.json")["bundles"][f"bundle-{precision}"]
        return found

    def check_fp32(self) -> None:
        """The bundle's decoder is the reference, whole and through the cache."""
        found = self.bundle("fp32")
        for scores in (found["against_reference"], found["against_cached"]):
            assert scores["nmse_max"] <= 1e-6 and scores["top1"]["value"] == 1

    def check_runtime(self) -> None:
        """LiteRT-LM reads, renders and says what transformers does."""
        found = self.bundle("fp32")
        assert found["token_ids"]["total"] >= 1000 and found["token_ids"]["wrong"] == 0
        assert found["prompts"]["total"] >= 10 and found["prompts"]["wrong"] == 0
        assert found["greedy"]["same"] + found["greedy"]["ties"] == len(found["greedy"]["rows"]) == 16
