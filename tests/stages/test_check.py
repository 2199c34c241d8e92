"""check: whatever is changed in a published folder is found, also by someone who rewrites its papers; signatures."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from release_line import STAGES, Line, reseal

from pipeline import check, publish, sign
from pipeline.core.errors import IntegrityError, PublishError, UsageError
from pipeline.core.manifest import dump_json
from pipeline.core.recipe import PROJECT
from pipeline.release import audit, provenance, signing
from pipeline.release.signing import Trust

MEASURED = {"report.html", "report.json"}
SIGNED_CHANGES = int(os.environ.get("SIGNED_CHANGES", "12"))
"""Changes behind a signature that are drawn, each checked by a process of model-signing (`nox -s faults`: 100)."""
Edit = Callable[[Path], None]


MAKE_KEY = """
import sys
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
key = ec.generate_private_key(getattr(ec, sys.argv[1])())
open(sys.argv[2] + ".pem", "wb").write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
open(sys.argv[2] + ".pub", "wb").write(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
"""


@pytest.fixture(scope="session")
def signer() -> str:
    """The Python that has model-signing, in the environment that `make publish SIGN_KEY=…` makes."""
    subprocess.run(["make", ".venv-sign/.ready"], cwd=PROJECT, check=True)
    return str(PROJECT / ".venv-sign" / "bin" / "python")


@pytest.fixture(scope="session")
def keys(signer: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pairs of keys, `own` and `other`, and one that model-signing does not take."""
    folder = tmp_path_factory.mktemp("a place for keys")
    for name, curve in (("own", "SECP256R1"), ("other", "SECP256R1"), ("odd", "SECP256K1")):
        subprocess.run([signer, "-c", MAKE_KEY, curve, str(folder / name)], check=True)
    return folder


@pytest.fixture(scope="session")
def line(tmp_path_factory: pytest.TempPathFactory) -> Line:
    made = Line(tmp_path_factory.mktemp("line"))
    made.fetch()
    for name in STAGES:
        made.variant(name, name.encode() * 30)
    assert made.verify() == 0
    return made


@pytest.fixture(scope="session")
def signed(line: Line, keys: Path, signer: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that was signed with the own key, as it would be downloaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIGN_KEY", str(keys / "own.pem"))
        assert line.run(publish.STAGE) == 0
        assert sign.main([str(line.folder), "--by", "key", "--signer", signer]) == 0
    copy = tmp_path_factory.mktemp("downloaded") / "another name"
    shutil.copytree(
        line.folder, copy, ignore=lambda folder, _: ["run.json", "manifest.json"] if folder == str(line.folder) else []
    )
    return copy


def _file(folder: Path) -> Path:
    file = folder / "file"
    file.write_text("x", encoding="utf-8")
    return file


def files(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def changed_by(data: st.DataObject, folder: Path) -> str:
    """Change the folder somehow, and say how."""
    names = files(folder)
    kind = data.draw(
        st.sampled_from(["byte", "byte", "byte", "cut", "grow", "drop", "add", "swap", "rename", "retell"])
    )
    name = data.draw(st.sampled_from(names))
    file = folder / name
    whole = file.read_bytes()
    if kind == "byte":
        at, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(1, 255))
        file.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
    elif kind == "cut":
        file.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    elif kind == "grow":
        file.write_bytes(whole + data.draw(st.sampled_from([b"\0", b"\n", b" "])))
    elif kind == "drop":
        file.unlink()
    elif kind == "add":
        new = data.draw(
            st.sampled_from(["x", "more.tflite", ".gitattributes", "manifests/x.json", "checkpoint/x", "new/x"])
        )
        (folder / new).parent.mkdir(exist_ok=True)
        (folder / new).write_bytes(whole)
    elif kind == "rename":
        file.rename(file.with_name(f"{file.name}.x"))
    elif kind == "swap":
        other = folder / data.draw(
            st.sampled_from([other for other in names if (folder / other).read_bytes() != whole])
        )
        file.write_bytes(other.read_bytes())
        other.write_bytes(whole)
    else:
        retell(data, folder)
    return f"{kind} {name}"


def retell(data: st.DataObject, folder: Path) -> None:
    """Change one value of a report, written as the original is."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    row = data.draw(st.sampled_from(report["checks"]))
    key = data.draw(st.sampled_from(["value", "limit", "name", "detail", "against"]))
    row[key] = row[key] * 0.5 if isinstance(row[key], float) else f"{row[key]}!"
    (folder / "report.json").write_text(dump_json(report), encoding="utf-8")


def contents(folder: Path, without: Iterable[str] = ()) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files(folder) if name not in without}


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


def copied(folder: Path, scratch: Path) -> Path:
    return Path(shutil.copytree(folder, Path(tempfile.mkdtemp(dir=scratch)) / "copy"))


@settings(max_examples=300)
@given(st.data())
def test_any_change_is_found_without_a_key(signed: Path, scratch: Path, data: st.DataObject) -> None:
    folder = copied(signed, scratch)
    said = changed_by(data, folder)
    with pytest.raises(IntegrityError) as caught:
        audit.check(folder)
    assert caught.value.what, said


@settings(max_examples=200)
@given(st.data())
def test_a_rewritten_checksum_hides_only_what_was_measured(signed: Path, scratch: Path, data: st.DataObject) -> None:
    """Without a key: model files, tensors, manifests, card, licence and figures still hold each other."""
    folder = copied(signed, scratch)
    (folder / signing.NAME).unlink()
    reseal(folder)
    before = contents(folder, {"SHA256SUMS", "provenance.json"} | MEASURED)
    changed_by(data, folder)
    (folder / "SHA256SUMS").touch()
    reseal(folder)
    if contents(folder, {"SHA256SUMS", "provenance.json"} | MEASURED) != before:
        with pytest.raises(IntegrityError):
            audit.check(folder)


@settings(max_examples=SIGNED_CHANGES)
@given(st.data())
def test_a_signature_finds_every_change_behind_rewritten_papers(
    signed: Path, scratch: Path, keys: Path, signer: str, data: st.DataObject
) -> None:
    folder = copied(signed, scratch)
    before = contents(folder, {"SHA256SUMS", "model.sig"})
    changed_by(data, folder)
    (folder / "SHA256SUMS").touch()
    reseal(folder)
    if contents(folder, {"SHA256SUMS", "model.sig"}) == before and (folder / "model.sig").is_file():
        return  # an envelope can be written in other ways that mean the same
    with pytest.raises(IntegrityError):
        signing.verify(folder, Trust(public_key=str(keys / "own.pub")), signer)


def test_a_signed_folder_holds_under_any_name_and_says_so(
    signed: Path, keys: Path, signer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(signed), "--public-key", str(keys / "own.pub"), "--signer", signer]
    assert check.main(arguments) == 0
    assert "signature: holds" in capsys.readouterr().err
    assert check.main([str(signed)]) == 0
    assert "signature not checked: say whose" in capsys.readouterr().err
    assert check.main([str(signed), "--public-key", str(keys / "other.pub"), "--signer", signer]) == 4
    assert "the signature" in capsys.readouterr().err


def test_a_report_that_fits_all_papers_but_not_the_signature(
    signed: Path, keys: Path, signer: str, tmp_path: Path
) -> None:
    """What nothing but a signature can find: a forger who rewrites report, manifests, provenance and checksums."""
    folder = copied(signed, tmp_path)
    (folder / "report.html").write_text("<title>better</title>", encoding="utf-8")
    reseal(folder)
    audit.check(folder)
    with pytest.raises(IntegrityError, match="signature"):
        audit.check(folder, Trust(public_key=str(keys / "own.pub")), signer)


def test_without_a_signature_a_key_is_not_satisfied(
    signed: Path, keys: Path, signer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(signed, tmp_path)
    (folder / "model.sig").unlink()
    reseal(folder)
    assert check.main([str(folder)]) == 0
    assert "signature not checked: there is none" in capsys.readouterr().err
    assert check.main([str(folder), "--public-key", str(keys / "own.pub"), "--signer", signer]) == 4


def test_what_the_runner_leaves_is_not_part_of_it(signed: Path, keys: Path, signer: str, tmp_path: Path) -> None:
    folder = copied(signed, tmp_path)
    for name in signing.RUNNERS:
        (folder / name).write_text("{}", encoding="utf-8")
    audit.check(folder, Trust(public_key=str(keys / "own.pub")), signer)


def test_no_word_of_the_key_is_in_the_folder_or_the_manifest(line: Line, signed: Path, keys: Path) -> None:
    secret = (keys / "own.pem").read_text(encoding="utf-8").splitlines()[1]
    for file in line.root.rglob("*"):
        if file.is_file():
            data = file.read_bytes()
            assert str(keys).encode() not in data and b"own.pem" not in data and secret.encode() not in data, file


def test_signing_again_changes_nothing_and_another_key_signs_anew(
    signed: Path, keys: Path, signer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(signed, tmp_path)
    before = contents(folder)
    monkeypatch.setenv("SIGN_KEY", str(keys / "own.pem"))
    assert sign.main([str(folder), "--by", "key", "--signer", signer]) == 0
    assert contents(folder) == before
    monkeypatch.setenv("SIGN_KEY", str(keys / "other.pem"))
    assert sign.main([str(folder), "--by", "key", "--signer", signer]) == 0
    after = contents(folder)
    assert {name for name in before if before[name] != after[name]} == {"model.sig", "SHA256SUMS"}
    audit.check(folder, Trust(public_key=str(keys / "other.pub")), signer)


def test_what_a_killed_signing_left_is_signed_anew(
    signed: Path, keys: Path, signer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signature is listed last: one that is not listed is none."""
    folder = copied(signed, tmp_path)
    listed = (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines(keepends=True)
    unlisted = "".join(line for line in listed if "model.sig" not in line)
    (folder / "SHA256SUMS").write_text(unlisted, encoding="utf-8")
    monkeypatch.setenv("SIGN_KEY", str(keys / "own.pem"))
    signing.sign(folder, "key", signer)
    audit.check(folder, Trust(public_key=str(keys / "own.pub")), signer)


def test_a_folder_with_a_changed_file_is_not_signed(
    signed: Path, keys: Path, signer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(signed, tmp_path)
    (folder / "README.md").write_text("changed", encoding="utf-8")
    monkeypatch.setenv("SIGN_KEY", str(keys / "own.pem"))
    with pytest.raises(IntegrityError, match=r"README\.md"):
        signing.sign(folder, "key", signer)
    assert not (folder / signing.NAME).exists()


@pytest.mark.parametrize(
    ("key", "error"),
    [("", UsageError), ("not-there.pem", UsageError), ("odd.pem", PublishError), ("own.pub", PublishError)],
)
def test_a_key_that_can_not_sign_is_refused(
    keys: Path, signer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, error: type[Exception]
) -> None:
    monkeypatch.setenv("SIGN_KEY", str(keys / key) if key else "")
    provenance.write_sums(tmp_path, [_file(tmp_path)])
    with pytest.raises(error):
        signing.sign(tmp_path, "key", signer)
    assert not (tmp_path / "model.sig").exists()


def test_keyless_signing_without_an_identity_is_refused(
    signer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "")
    provenance.write_sums(tmp_path, [_file(tmp_path)])
    with pytest.raises(PublishError, match="could not be signed"):
        signing.sign(tmp_path, "keyless", signer)


def test_a_python_without_model_signing_is_a_matter_of_usage(signed: Path, keys: Path) -> None:
    with pytest.raises(UsageError, match="has no model-signing"):
        signing.verify(signed, Trust(public_key=str(keys / "own.pub")))


@pytest.mark.parametrize(
    "trust",
    [
        Trust(public_key="not there"),
        Trust(identity="somebody"),
        Trust(issuer="https://example.org"),
        Trust(public_key="a", identity="b", issuer="c"),
    ],
)
def test_half_a_signer_is_none(signed: Path, trust: Trust) -> None:
    with pytest.raises(UsageError):
        audit.check(signed, trust)


def forged(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text, encoding="utf-8")
    reseal(folder)


def test_papers_of_another_form_are_refused(signed: Path, tmp_path: Path) -> None:
    papers = ("report.json", "manifests/verify.json", "provenance.json", "tensors.json")
    texts = ("", "[]", "{}", "null", '{"checks": [1], "passed": true}', "[" * 100_000)
    folders = {}
    for name, text in product(papers, texts):
        folder = copied(signed, tmp_path)
        forged(folder, name, text)
        folders[f"{name} is {text[:40]!r}"] = str(folder)
    # In a process of its own: libraries that other tests load raise the recursion limit beyond what the stack holds.
    code = "import sys; from pipeline import check; print(*(check.main([folder]) for folder in sys.argv[1:]))"
    command = [sys.executable, "-c", code, *folders.values()]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    assert dict(zip(folders, done.stdout.split(), strict=True)) == dict.fromkeys(folders, "4")


@pytest.mark.parametrize("path", ["../outside", "/etc/hostname", "a/../../outside"])
def test_checksums_do_not_lead_outside_the_folder(signed: Path, tmp_path: Path, path: str) -> None:
    folder = copied(signed, tmp_path)
    with (folder / "SHA256SUMS").open("a", encoding="utf-8") as stream:
        stream.write(f"{'0' * 64}  {path}\n")
    with pytest.raises(IntegrityError, match="no checksum"):
        audit.check(folder)


def test_a_link_to_elsewhere_is_not_overlooked(signed: Path, tmp_path: Path) -> None:
    folder = copied(signed, tmp_path)
    os.symlink(tmp_path, folder / "more")
    with pytest.raises(IntegrityError, match="not listed"):
        audit.check(folder)
