"""What must not be in an image is found in whatever layer it is; a clean image passes."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tools import image_scan

CLEAN = {"config": {"User": "65534:65534", "Env": ["PATH=/usr/bin"]}, "history": [{"created_by": "RUN true"}]}
FILES = {"usr/bin/python3": b"\x7fELF -----BEGIN PRIVATE KEY-----\x00 hf_ ghp_", "etc/passwd": b"root:x:0:0"}
KEY = b"-----BEGIN EC PRIVATE KEY-----\n" + b"A" * 64 + b"\n"
SECRET = "the word that the build was told"


def tar(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as made:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            made.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def saved(folder: Path, *layers: dict[str, bytes], config: dict[str, Any] | None = None) -> Path:
    """An image as `docker save` writes it."""
    names = [f"{number}/layer.tar" for number in range(len(layers))]
    parts = {name: tar(files) for name, files in zip(names, layers, strict=True)}
    parts["config.json"] = json.dumps(config or CLEAN).encode()
    parts["manifest.json"] = json.dumps([{"Config": "config.json", "Layers": names}]).encode()
    file = folder / "image.tar"
    file.write_bytes(tar(parts))
    return file


def test_a_clean_image_passes(tmp_path: Path) -> None:
    assert image_scan.faults(saved(tmp_path, FILES, {"app/main.py": b"pass"}), SECRET) == []


def test_what_packages_publish_is_known_by_its_place_and_kind_alone(tmp_path: Path) -> None:
    place = "./opt/venv/lib/python3.11/site-packages/transformers/testing_utils.py"
    token = b'"hf_' + b"a1" * 17 + b'"'
    assert image_scan.faults(saved(tmp_path, {place: token})) == []
    assert len(image_scan.faults(saved(tmp_path, {place: token + KEY}))) == 1
    assert len(image_scan.faults(saved(tmp_path, {place.replace("utils", "tools"): token}))) == 1


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("root/key.pem", KEY, "a private key"),
        ("root/key.pem", KEY.replace(b"-\nA", b"-\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES\n\nA"), "a private key"),
        ("tmp/log", b"token=hf_" + b"a1" * 17 + b"\n", "a Hugging Face token"),
        ("tmp/log", b"https://ghp_" + b"b2" * 18 + b"@host", "a GitHub token"),
        ("tmp/log", b"AKIA" + b"Z9" * 8, "an AWS key"),
        ("etc/ssl/ca.crt", b"# " + SECRET.encode(), "the build's secret"),
        ("big", b"\0" * (image_scan._BLOCK - 20) + KEY, "a private key"),
        ("root/.netrc", b"", "credentials"),
        ("home/me/.docker/config.json", b"{}", "credentials"),
        ("usr/bin/x86_64-linux-gnu-gcc-12", b"", "a compiler"),
        ("opt/cuda/bin/nvcc", b"", "a compiler"),
    ],
)
def test_what_must_not_be_there_is_found(tmp_path: Path, name: str, content: bytes, fault: str, hidden: bool) -> None:
    layers = [FILES, {name: content}, *([{f"{name}.wh": b""}] if hidden else [])]
    (found,) = image_scan.faults(saved(tmp_path, *layers), SECRET)
    assert found.startswith(name) and fault in found


@pytest.mark.parametrize("user", ["", "0", "root", "0:0", "nobody"])
def test_root_and_a_name_that_may_be_root_are_refused(tmp_path: Path, user: str) -> None:
    (found,) = image_scan.faults(saved(tmp_path, FILES, config={"config": {"User": user}}))
    assert "runs as user" in found


@pytest.mark.parametrize(("entry", "count"), [(["/app/tools/entry.sh"], 0), (["/bin/sh", "/app/tools/entry.sh"], 1)])
def test_only_the_entry_point_that_puts_root_off_may_begin_as_root(
    tmp_path: Path, entry: list[str], count: int
) -> None:
    assert len(image_scan.faults(saved(tmp_path, FILES, config={"config": {"Entrypoint": entry}}))) == count


def test_configuration_and_history_are_looked_at(tmp_path: Path) -> None:
    config = {"config": {**CLEAN["config"], "Env": ["HF_TOKEN=x"]}, "history": [{"created_by": f"RUN echo {SECRET}"}]}
    found = image_scan.faults(saved(tmp_path, FILES, config=config), SECRET)
    assert found == ["its environment sets HF_TOKEN", "its configuration holds the build's secret"]


def test_an_image_without_layers_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no layers"):
        image_scan.faults(saved(tmp_path))
