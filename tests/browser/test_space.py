"""The shipped model's page as a Space: `make publish SPACE=` over HTTP, to a Hub on this machine.

`nox -s browser` runs this and says in SPACE where to leave what the Space then holds, for Chromium; elsewhere it is
skipped, as it is where something is not committed, of which publish makes nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import hub_server
import pytest
from hub_server import HubServer

from pipeline.core.recipe import PROJECT
from pipeline.core.stage import source
from pipeline.release import preflight

SPACE = os.environ.get("SPACE", "")
ROOT = PROJECT / "artifacts" / "tiny-gemma3n"
NAME, TOKEN = "org/page", "hf_CanaryThatNobodyMaySee"
KEPT = {".gitattributes": b"*.tflite filter=lfs\n"}
pytestmark = pytest.mark.skipif(not SPACE, reason="needs the page that `nox -s browser` makes")


def test_what_goes_up_is_what_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(SPACE, ignore_errors=True)
    now = source()
    if now.dirty or not now.commit:
        pytest.skip("something is not committed")
    monkeypatch.setattr(hub_server, "PART", 1 << 20)
    (ROOT / "space" / "receipt.json").unlink(missing_ok=True)
    with HubServer() as hub:
        hub.tokens[TOKEN] = hub.writers[TOKEN] = {f"spaces/{NAME}"}
        hub.add(f"spaces/{NAME}", {**KEPT, "style.css": b"of the Hub"})
        environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN}
        command = ["make", "publish", f"SPACE={NAME}", "CONFIRM=yes"]
        done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert TOKEN not in done.stdout + done.stderr
        there = hub.repos[f"spaces/{NAME}"]
    receipt = json.loads((ROOT / "space" / "receipt.json").read_text(encoding="utf-8"))
    assert receipt["kind"] == "space" and receipt["commit"] == there.refs["main"] == there.tags[receipt["tag"]]
    held = there.commits[there.refs["main"]]
    made = {path.relative_to(ROOT / "space").as_posix(): path for path in (ROOT / "space").rglob("*") if path.is_file()}
    assert held.keys() == {*KEPT, *made} - preflight.NOT_UPLOADED
    assert {"index.html", "model/decoder.tflite", "wasm/litert_wasm_internal.wasm", "SHA256SUMS"} <= held.keys()
    for name, data in held.items():
        assert isinstance(data, bytes)
        assert name in KEPT or data == made[name].read_bytes(), name
        file = Path(SPACE) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
