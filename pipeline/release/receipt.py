"""The receipt of an upload: which bytes are at which commit of which repository."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

from pipeline.core import manifest
from pipeline.release import preflight
from pipeline.release.upload import Target


def said(target: Target, commit: str) -> dict[str, object]:
    """The receipt without its date."""
    sums = {name: record.sha256 for name, record in target.files.items()}
    kind = {} if target.kind == "model" else {"kind": target.kind}
    return {"repository": target.repo, **kind, "commit": commit, "tag": target.tag, "files": sums}


def write(target: Target, commit: str) -> None:
    """Write the receipt, dated, into the folder that went up."""
    dated = {**said(target, commit), "date": datetime.now(UTC).isoformat(timespec="seconds")}
    manifest.write_atomically(target.folder / preflight.RECEIPT, manifest.dump_json(dated))


def read(folder: Path) -> dict[str, object]:
    """The receipt in `folder` without its date, or nothing if there is none that can be read."""
    try:
        found: dict[str, object] = json.loads((folder / preflight.RECEIPT).read_text(encoding="utf-8"))
        del found["date"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found
