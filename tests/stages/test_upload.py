"""upload: the real client of the Hub against a server on this machine, and everything that can go wrong between them.

Whatever happens, the repository holds its old files or all the new ones, nothing local is lost, and a run after it ends
well. `UPLOAD_SCHEDULES=200` (`nox -s faults`) tries that many random schedules of faults.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hub_server import PART, Fault, HubServer, Repo
from release_line import STAGES, Line, clean

from pipeline import check
from pipeline import upload as script
from pipeline.core import log
from pipeline.core.recipe import PROJECT
from pipeline.release import hub, upload

NAME = "org/model"
TOKEN = "hf_CanaryThatNobodyMaySee"
PARTIAL = "tiny-gemma3n_fp32.tflite"
"""The file that is large enough to go in parts."""
KEPT = {".gitattributes": b"*.tflite filter=lfs\n"}
OLD = {**KEPT, "README.md": b"---\nlicense: mit\n---\n", "old.tflite": b"an older model", "LICENSE": b"other words"}
LONGEST = 600.0
"""Seconds after which an upload is taken to hang, however busy the machine is."""
SCHEDULES = int(os.environ.get("UPLOAD_SCHEDULES", "24"))


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A publish folder as the stage leaves it, made by a clean commit; not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        clean(patch)
        line = Line(tmp_path_factory.mktemp("line"))
        line.fetch()
        for name in STAGES:
            line.variant(name, name.encode() * (4 * PART // 5 if name == "fp32" else 30))
        assert (line.verify(), line.publish()) == (0, 0)
    return line.folder


@dataclass
class World:
    """A folder to publish and a Hub to publish it to; calling it is `make publish HF_REPO=…` after the stage."""

    folder: Path
    server: HubServer
    capture: pytest.CaptureFixture[str]
    text: str = ""

    def __call__(self, *options: str, repo: str = NAME) -> int:
        self.capture.readouterr()
        code = script.main([str(self.folder), "--repository", repo, *options])
        out, self.text = self.capture.readouterr()
        assert out == "" and TOKEN not in self.text and "Traceback" not in self.text
        return code

    def confirmed(self, *options: str) -> int:
        return self("--confirm", *options)

    @property
    def repo(self) -> Repo:
        return self.server.repos[NAME]

    @property
    def files(self) -> dict[str, bytes]:
        """What goes up, by path."""
        found = (file for file in self.folder.rglob("*") if file.is_file())
        made = {file.relative_to(self.folder).as_posix(): file.read_bytes() for file in found}
        return {name: data for name, data in made.items() if name not in ("manifest.json", "run.json", "receipt.json")}

    @property
    def receipt(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "receipt.json").read_text(encoding="utf-8"))
        return found

    def refused(self, *phrases: str, code: int = 9, options: tuple[str, ...] = ("--confirm",)) -> None:
        """Nothing is sent, and a sentence says why and what to do."""
        commits = dict(self.repo.commits)
        assert self(*options) == code
        assert "error: " in self.text and "\n  do:    " in self.text
        for phrase in phrases:
            assert phrase in self.text
        assert self.repo.commits == commits and not (self.folder / "receipt.json").exists()

    def sound(self, files: dict[str, bytes]) -> None:
        """Each commit holds the old files or all the new ones, a tag the new ones, and the folder what it held."""
        new = {**KEPT, **files}
        states = list(self.repo.commits.values())
        assert states[0] == OLD and states[1:] in ([], [new])
        assert all(self.repo.commits[commit] == new for commit in self.repo.tags.values())
        assert self.files == files
        if (self.folder / "receipt.json").exists():
            assert self.repo.commits[self.receipt["commit"]] == new and self.repo.tags

    def published(self) -> None:
        """Everything is there, in one commit, and the receipt says so."""
        self.sound(self.files)
        receipt = self.receipt
        assert self.repo.refs["main"] == receipt["commit"] == self.repo.tags[receipt["tag"]]
        assert len(self.repo.commits) == 2 and receipt["files"].keys() == self.files.keys()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were made, or would have been."""
    made: list[float] = []
    monkeypatch.setattr(time, "sleep", made.append)
    return made


@pytest.fixture
def world(
    ready: Path,
    server: HubServer,
    pauses: list[float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[World]:
    clean(monkeypatch)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    server.tokens[TOKEN] = server.writers[TOKEN] = {NAME}
    server.add(NAME, dict(OLD))
    shutil.copytree(ready, tmp_path / "publish")
    yield World(tmp_path / "publish", server, capsys)


def test_a_dry_run_shows_the_difference_and_sends_nothing(world: World) -> None:
    before = sorted(world.folder.rglob("*"))
    assert world() == 0
    for row in (r"\+ .* tiny-gemma3n_int8.tflite", "~ .* README.md", "- .* old.tflite"):
        assert re.search(f"^  {row}$", world.text, flags=re.MULTILINE)
    assert ".gitattributes" not in world.text
    parent = world.repo.refs["main"]
    assert f"parent commit {parent}" in world.text and f"CONFIRM=yes PARENT={parent}" in world.text
    assert "22 added, 2 changed, 1 removed, 0 unchanged" in world.text
    assert {request.method for request in world.server.requests} == {"GET"}
    assert len(world.repo.commits) == 1 and sorted(world.folder.rglob("*")) == before


def test_a_dry_run_needs_no_token_and_no_clean_sources(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("SOURCE_DIRTY", " M Makefile")
    assert world() == 0


def test_confirmed_it_is_one_commit_on_the_parent_read_back_tagged_and_receipted(world: World) -> None:
    parent = world.repo.refs["main"]
    assert world.confirmed("--parent", parent) == 0
    world.published()
    receipt = world.receipt
    assert receipt["repository"] == NAME and re.fullmatch(r"a{12}-[0-9a-f]{8}", receipt["tag"])
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", receipt["date"])
    assert world.server.count("POST", "/commit/main") == 1
    assert world.server.count("PUT", "/upload/.*/[0-9]$") == 4, "a large file goes in parts"
    for name, data in world.files.items():
        assert world.server.sent(name) >= len(data), "read back"
    assert world() == 0
    assert "0 added, 0 changed, 0 removed, 24 unchanged" in world.text and "holds these files already" in world.text


def test_a_second_run_does_nothing_and_a_lost_receipt_is_written_anew(world: World) -> None:
    assert world.confirmed() == 0
    receipt = (world.folder / "receipt.json").read_bytes()
    world.server.requests.clear()
    assert world.confirmed() == 0
    assert "nothing to do" in world.text
    assert [request.method for request in world.server.requests] == ["GET"] * 3
    assert (world.folder / "receipt.json").read_bytes() == receipt
    (world.folder / "receipt.json").write_text("not a receipt")
    assert world.confirmed() == 0
    world.published()


def test_the_name_of_the_tag_can_be_chosen(world: World) -> None:
    assert world.confirmed("--tag", "v1.0") == 0
    assert world.repo.tags == {"v1.0": world.repo.refs["main"]}
    for name in ("-v", "a b", "a..b", "v1.lock", "v/1"):
        assert world.confirmed(f"--tag={name}") == 2
    assert world(repo="model") == 2


def test_progress_is_shown(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_LINE_SECONDS", 0.0)
    assert world.confirmed() == 0
    assert re.search(r"^  upload: .* of .*B \(\d+%\), .*B/s", world.text, flags=re.MULTILINE)
    assert re.search(r"^  reading back: .* left$", world.text, flags=re.MULTILINE)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "edit", "said"),
    [
        ("SHA256SUMS", None, "is not ready to be published"),
        ("report.json", None, "report.json is missing"),
        ("report.html", None, "report.html is missing"),
        ("report.json", lambda data: data.replace(b'"passed": true', b'"passed": false', 1), "verification failed"),
        ("report.json", lambda data: data.rstrip()[:-1], "can't be read"),
        ("tiny-gemma3n_int8.tflite", lambda data: data + b".", "is not the file that SHA256SUMS lists"),
        ("tiny-gemma3n_int8.tflite", None, "is not the file that SHA256SUMS lists"),
        ("more.txt", lambda data: b"more", "is not the file that SHA256SUMS lists"),
        ("manifests/verify.json", None, "can't be read"),
        ("LICENSE", None, "does not say under which licence"),
        ("NOTICE", lambda data: b"", "does not say under which licence"),
        ("README.md", lambda data: data.replace(b"license: ", b"licence: "), "does not say under which licence"),
    ],
)
def test_refused_for_what_is_in_the_folder(
    world: World, name: str, edit: Callable[[bytes], bytes] | None, said: str
) -> None:
    file = world.folder / name
    if edit:
        file.write_bytes(edit(file.read_bytes() if file.exists() else b""))
    else:
        file.unlink()
    world.refused(said)
    assert world.server.requests == []


def test_refused_when_a_model_is_not_the_judged_one_although_the_sums_say_so(world: World) -> None:
    model, sums = world.folder / "tiny-gemma3n_int8.tflite", world.folder / "SHA256SUMS"
    model.write_bytes(b"another")
    digest = subprocess.run(["sha256sum", model], capture_output=True, text=True, check=True).stdout[:64]
    text = re.sub(rf"^.*  {model.name}$", f"{digest}  {model.name}", sums.read_text(), flags=re.MULTILINE)
    sums.write_text(text)
    world.refused("tiny-gemma3n_int8.tflite is not a file that was verified")


def test_refused_when_the_sources_are_not_a_commit(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DIRTY", "?? new.py")
    world.refused("the project's files differ from its commit", "git status")
    monkeypatch.delenv("SOURCE_DIRTY")
    monkeypatch.delenv("SOURCE_COMMIT")
    world.refused("the project's commit is not known")


def test_refused_when_a_stage_ran_with_changed_sources(tmp_path: Path, world: World) -> None:
    line = Line(tmp_path / "dirty")
    line.fetch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DIRTY", " M pipeline/int8.py")
        for name in STAGES:
            line.variant(name, name.encode())
    assert (line.verify(), line.publish()) == (0, 0)
    world.folder = line.folder
    world.refused("the project's files differ from its commit")
    assert world() == 0


def test_refused_when_the_repository_moved_on_since_the_dry_run(world: World) -> None:
    parent = world.repo.refs["main"]
    world.server.add(NAME, {**OLD, "README.md": b"by hand"})
    world.refused("has moved on", parent, options=("--confirm", "--parent", parent))


def test_refused_when_the_repository_moves_on_while_files_are_sent(world: World) -> None:
    other = {**OLD, "README.md": b"by hand"}
    world.server.faults.append(Fault("/commit/main", "POST", run=lambda: world.server.add(NAME, other)))
    assert world.confirmed() == 9
    assert "has moved on" in world.text and "make publish HF_REPO=org/model" in world.text
    assert list(world.repo.commits.values()) == [OLD, other] and not world.repo.tags
    assert world.confirmed() == 0
    assert list(world.repo.commits.values())[2:] == [{**KEPT, **world.files}]


def test_refused_when_the_tag_names_other_files(world: World) -> None:
    world.repo.tags["v1"] = world.repo.refs["main"]
    world.refused("has a tag v1 already", "TAG=", options=("--confirm", "--tag", "v1"))
    world.refused("has a tag v1 already", options=("--tag", "v1"))


def test_refused_when_the_tag_is_made_meanwhile(world: World) -> None:
    other = world.repo.refs["main"]
    world.server.faults.append(Fault("/tag/", "POST", run=lambda: world.repo.tags.update(v1=other)))
    assert world.confirmed("--tag", "v1") == 9
    assert "has a tag v1 already" in world.text and not (world.folder / "receipt.json").exists()
    assert world.confirmed("--tag", "v2") == 0
    assert len(world.repo.commits) == 2


def test_a_tag_made_meanwhile_at_the_same_commit_is_right(world: World) -> None:
    world.server.faults.append(Fault("/tag/", "POST", run=lambda: world.repo.tags.update(v1=world.repo.refs["main"])))
    assert world.confirmed("--tag", "v1") == 0
    world.published()


def test_what_was_published_before_stays_when_the_branch_goes_on(world: World) -> None:
    assert world.confirmed() == 0
    world.server.add(NAME, {**KEPT, **world.files, "README.md": b"by hand"})
    (world.folder / "receipt.json").unlink()
    assert world.confirmed() == 0
    assert "its main branch has moved on" in world.text and len(world.repo.commits) == 3


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("", ("there is no token to publish with", "set HF_TOKEN")),
        ("hf_UnknownToken", ("the Hub refuses the token", "/settings/tokens")),
        ("hf_ReadOnlyToken", ("the token may not write to org/model",)),
        ("hf_Broken\x01Token", ("the Hub refuses the token",)),
        ("hf_Brökentoken", ("HF_TOKEN holds characters that no token has",)),
    ],
)
def test_refused_by_the_token(world: World, monkeypatch: pytest.MonkeyPatch, token: str, said: tuple[str, ...]) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    world.server.tokens["hf_ReadOnlyToken"] = {NAME}
    world.refused(*said)
    assert not token or token not in world.text and "oken" not in world.text.replace("token", "").replace("_TOKEN", "")


def test_refused_without_a_repository(world: World) -> None:
    assert world.confirmed("--repository", "org/other") == 9
    assert "there is no model org/other" in world.text and "hf repos create org/other" in world.text


def test_refused_when_the_card_is_not_to_the_hubs_taste(world: World) -> None:
    said = json.dumps({"errors": [{"message": f'"license" must be one of; not {TOKEN}'}], "warnings": []})
    world.server.faults.append(Fault("/api/validate-yaml", status=400, body=said.encode()))
    world.refused("the Hub does not take the files", '"license" must be one of')


def test_refused_when_a_file_changes_while_it_is_sent(world: World) -> None:
    model = world.folder / "tiny-gemma3n_int8.tflite"
    fault = Fault(f"/api/models/{NAME}$", "GET", run=lambda: model.write_bytes(b"other"))
    world.server.faults.append(fault)
    world.refused("was changed while it was published", code=4)


@pytest.mark.parametrize(("left", "code"), [("", 9), ("shorter", 9), (None, 9)])
def test_a_file_that_changes_on_its_way_to_storage_is_not_taken(world: World, left: str | None, code: int) -> None:
    model = world.folder / PARTIAL
    whole = model.read_bytes()
    change = model.unlink if left is None else (lambda: model.write_text(left or ""))
    world.server.faults.append(Fault("/objects/batch", run=change))
    assert world.confirmed() == code and "\n  do:    " in world.text
    assert len(world.repo.commits) == 1
    model.write_bytes(whole)
    assert world.confirmed() == 0
    world.published()


def test_large_files_of_the_same_content_may_be_sent_at_once(tmp_path: Path, world: World) -> None:
    line = Line(tmp_path / "same")
    line.fetch()
    for name in STAGES:
        line.variant(name, b"the same" * PART)
    assert (line.verify(), line.publish()) == (0, 0)
    world.folder = line.folder
    assert world.confirmed() == 0
    world.published()


def test_files_that_the_repository_ignores_are_missed(world: World) -> None:
    body = {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": True} for name in world.files]}
    world.server.faults.append(Fault("/preupload/", status=200, body=json.dumps(body).encode()))
    assert world.confirmed() == 4
    assert ".gitignore" in world.text and not world.repo.tags


# --- faults -----------------------------------------------------------------------------------------------------------

POINTS = {
    "refs": ("GET", "/refs$"),
    "look": ("GET", "/api/models/org/model(/revision/.*)?$"),
    "card": ("POST", "/validate-yaml"),
    "preupload": ("POST", "/preupload/"),
    "batch": ("POST", "/objects/batch"),
    "send": ("PUT", "/upload/[^/]+/[^/]+/[0-9a-f]+$"),
    "send a part": ("PUT", "/upload/.*/[0-9]$"),
    "complete": ("POST", "/upload/.*/complete"),
    "verify": ("POST", "/objects/verify"),
    "commit": ("POST", "/commit/main"),
    "tag": ("POST", "/tag/"),
    "read": ("GET", "/resolve/"),
    "read storage": ("GET", "/storage/"),
}
PASSING: dict[str, dict[str, Any]] = {
    "429": {"status": 429, "headers": {"Retry-After": "7"}, "body": b'{"error": "too many requests"}'},
    "500": {"status": 500, "body": b"<html>"},
    "503": {"status": 503},
    "504": {"status": 504},
    "cut": {"cut": 20},
    "reset": {"cut": 5, "reset": True},
    "unanswered": {"unanswered": True},
    "slow": {"slow": 0.05},
}
LASTING: dict[str, dict[str, Any]] = {
    "401": {"status": 401, "echo": True},
    "403": {"status": 403, "echo": True},
    "409": {"status": 409, "echo": True},
    "412": {"status": 412, "echo": True},
    "400": {"status": 400, "echo": True},
}
# A request is made and judged in one place whatever it is, and a failure is told there whatever asked: each point and
# each kind occurs, those together that mean something of their own (an answer that is lost after the work was done, a
# refusal that says the branch moved on, storage, which the client tries again by itself). The random schedules below
# combine the rest.
WAITED_FOR = [
    ("refs", "429"),
    ("look", "cut"),
    ("look", "slow"),
    ("card", "500"),
    ("preupload", "reset"),
    ("batch", "503"),
    ("batch", "429"),
    ("send", "504"),
    ("send", "unanswered"),
    ("send a part", "reset"),
    ("send a part", "503"),
    ("complete", "unanswered"),
    ("verify", "slow"),
    ("verify", "cut"),
    ("commit", "unanswered"),
    ("commit", "429"),
    ("tag", "unanswered"),
    ("tag", "504"),
    ("read", "500"),
    ("read", "reset"),
    ("read storage", "cut"),
    ("read storage", "429"),
]
REFUSED = [
    ("refs", "401", "the Hub refuses the token"),
    ("look", "403", "the token may not read org/model"),
    ("card", "409", "answers with status 409"),
    ("preupload", "400", "answers with status 400"),
    ("batch", "412", "answers with status 412"),
    ("send", "403", ": not with"),  # storage's own words
    ("send a part", "401", ": not with"),  # storage's own words
    ("complete", "400", "answers with status 400"),
    ("verify", "409", "answers with status 409"),
    ("commit", "403", "the token may not write to org/model"),
    ("commit", "409", "org/model has moved on"),
    ("commit", "412", "org/model has moved on"),
    ("tag", "401", "the Hub refuses the token"),
    ("tag", "409", "answers with status 409"),
    ("read", "403", "the token may not read org/model"),
    ("read storage", "412", "answers with status 412"),
]
ENDLESS = [
    ("refs", "503", 9),
    ("look", "cut", 9),
    ("card", "503", 9),
    ("preupload", "cut", 9),
    ("batch", "503", 9),
    ("send", "cut", 9),
    ("send a part", "503", 9),
    ("complete", "cut", 9),
    ("verify", "503", 0),  # storage is asked what it holds once more
    ("commit", "503", 9),
    ("commit", "cut", 9),
    ("tag", "cut", 9),
    ("read", "503", 9),
    ("read", "cut", 0),  # as long as each try brings more of an answer a cut is no failure
    ("read storage", "cut", 0),
    ("read storage", "503", 9),
]


def test_every_point_and_kind_of_fault_is_tried() -> None:
    assert {point for point, _ in WAITED_FOR} == {point for point, _, _ in REFUSED} == POINTS.keys()
    assert {kind for _, kind in WAITED_FOR} == PASSING.keys() and {kind for _, kind, _ in REFUSED} == LASTING.keys()
    assert {point for point, _, _ in ENDLESS} == POINTS.keys()


@pytest.mark.parametrize(("point", "kind"), WAITED_FOR)
def test_what_passes_is_waited_for(world: World, pauses: list[float], point: str, kind: str) -> None:
    method, path = POINTS[point]
    files = world.files
    world.server.faults.append(Fault(path, method, times=2, **PASSING[kind]))
    assert world.confirmed() == 0
    world.sound(files)
    world.published()
    assert world.server.faults[0].times < 2
    assert kind != "429" or any(pause >= 7 for pause in pauses), "as long as the server asks"


@pytest.mark.parametrize(("point", "kind", "said"), REFUSED)
def test_what_is_refused_ends_the_run_and_the_next_one_goes_on(world: World, point: str, kind: str, said: str) -> None:
    method, path = POINTS[point]
    files = world.files
    world.server.faults.append(Fault(path, method, **LASTING[kind]))
    code = world.confirmed()
    assert code == 9 and said in world.text and "\n  do:    " in world.text
    world.sound(files)
    assert world.confirmed() == 0
    world.published()


@pytest.mark.parametrize(("point", "kind", "code"), ENDLESS)
def test_what_does_not_pass_ends_the_run_and_the_next_one_goes_on(
    world: World, point: str, kind: str, code: int
) -> None:
    method, path = POINTS[point]
    files = world.files
    what = {"cut": 1000} if kind == "cut" and point.startswith("read") else PASSING[kind]  # it reads on, cut by cut
    world.server.faults.append(Fault(path, method, times=10**6, **what))
    assert world.confirmed() == code
    world.sound(files)
    world.server.faults.clear()
    assert world.confirmed() == 0
    world.published()


@pytest.mark.parametrize("point", ["send", "send a part", "batch", "commit", "look"])
def test_a_server_that_says_nothing_is_given_up(world: World, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    method, path = POINTS[point]
    files = world.files
    monkeypatch.setattr(hub, "_ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(upload, "TIMEOUT", httpx2.Timeout(0.5))
    world.server.faults.append(Fault(path, method, slow=1.5))
    assert world.confirmed() == 0
    world.sound(files)
    world.published()


def test_a_file_that_comes_back_damaged_is_read_again(world: World) -> None:
    world.server.faults.append(Fault("/storage/.*int8.tflite", swap=True))
    assert world.confirmed() == 0
    assert "came back with other bytes" in world.text
    world.published()


def test_damage_that_stays_is_an_error_and_nothing_is_tagged(world: World) -> None:
    files = world.files
    world.server.faults.append(Fault("/resolve/.*/NOTICE", swap=True, times=2))
    assert world.confirmed() == 4
    assert "NOTICE in org/model at commit" in world.text and not world.repo.tags
    world.sound(files)
    assert world.confirmed() == 0
    world.published()
    assert world.server.count("POST", "/commit/main") == 1, "the commit was right: it is only compared anew"


def test_what_has_arrived_is_not_sent_again(world: World) -> None:
    send = POINTS["send"]
    world.server.faults.append(Fault(send[1], send[0], status=403, skip=2))
    assert world.confirmed() == 9
    assert "X-Amz-Signature" not in world.text and "s1gned" not in world.text
    arrived = {f"/upload/{NAME}/{oid}" for oid in world.repo.objects}
    world.server.requests.clear()
    assert world.confirmed() == 0
    sent = {request.path for request in world.server.requests if request.method == "PUT"}
    assert len(arrived) > 2 and not arrived & sent
    world.published()


IMPATIENT = """import sys
from pipeline import upload
from pipeline.release import hub
hub.WAITS = (0.01,) * len(hub.WAITS)
sys.exit(upload.main(sys.argv[1:]))"""
"""The command with as many tries as ever, one right after the other: 31 seconds less where none goes well."""


def start(world: World, *code: str) -> subprocess.Popen[str]:
    """A confirmed upload as a process of its own; `code` calls it where it is not the command itself."""
    how = ["-c", *code] if code else ["-m", "pipeline.upload"]
    command = [sys.executable, *how, str(world.folder), "--repository", NAME, "--confirm"]
    return subprocess.Popen(command, cwd=PROJECT, stderr=subprocess.PIPE, text=True, env=dict(os.environ))


@pytest.mark.parametrize(
    ("point", "sent"),
    [
        *((point, signal.SIGKILL) for point in ("send", "send a part", "commit", "tag", "read")),
        ("send", signal.SIGTERM),
        ("send a part", signal.SIGINT),
        ("commit", signal.SIGTERM),
        ("read", signal.SIGINT),
    ],
)
def test_a_killed_upload_goes_on(world: World, point: str, sent: signal.Signals) -> None:
    method, path = POINTS[point]
    files = world.files
    running: list[subprocess.Popen[str]] = []
    world.server.faults.append(Fault(path, method, run=lambda: running[0].send_signal(sent), slow=0.2))
    running.append(start(world))
    said = running[0].communicate(timeout=LONGEST)[1]
    assert running[0].returncode == (130 if sent != signal.SIGKILL else -9), said
    world.sound(files)
    assert world.confirmed() == 0
    world.published()


# --- secrets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", [None, "look", "send", "commit", "read storage"])
def test_the_token_is_written_nowhere(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str | None
) -> None:
    """Not to a file, not to the output, not into a request to storage or an argument of a process.

    The run without a fault makes every request there is; the Hub's and storage's refusals quote the token.
    """
    for name in ("HOME", "HF_HOME", "TMPDIR", "XDG_CACHE_HOME"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("HF_DEBUG", "1")
    if point:
        method, path = POINTS[point]
        world.server.faults.append(Fault(path, method, status=403, echo=True))
    running = start(world)
    said = running.communicate(timeout=LONGEST)[1]
    assert running.returncode == (9 if point else 0), said
    assert TOKEN not in said and "s1gned" not in said
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or TOKEN.encode() not in file.read_bytes(), file
    assert not any(request.token for request in world.server.requests if request.host == "localhost")
    assert all(TOKEN.encode() not in data for files in world.repo.commits.values() for data in files.values())


@pytest.mark.parametrize("way", ["given", "asked for"])
def test_a_ci_job_publishes_by_its_identity(world: World, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_OIDC_RESOURCE", NAME)
    world.server.identities["job"] = TOKEN
    if way == "given":
        monkeypatch.setenv("HF_OIDC_ID_TOKEN", "job")
    else:
        monkeypatch.setenv("GITHUB_ACTIONS", "true")
        monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_URL", f"{world.server.endpoint}/identity")
        monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "job-job")
    running = start(world)
    said = running.communicate(timeout=LONGEST)[1]
    assert running.returncode == 0, said
    assert TOKEN not in said and "job-job" not in said
    world.published()


@pytest.fixture
def job(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """A CI job that shows its identity; each exchange gives a token of its own, and ends the one before."""
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_OIDC_RESOURCE", NAME)
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_URL", f"{world.server.endpoint}/identity")
    monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "job-job")
    world.server.identities["job"] = TOKEN
    return world


def lapse(world: World) -> None:
    """From now on the job's identity gives another token, and the first one counts no more."""
    world.server.tokens["hf_second"] = world.server.tokens.pop(TOKEN, set())
    world.server.writers["hf_second"] = world.server.writers.pop(TOKEN, set())
    world.server.identities["job"] = "hf_second"


@pytest.mark.parametrize("status", [400, 503])
def test_an_exchange_that_fails_for_a_while_is_tried_again(job: World, status: int) -> None:
    body = b'{"error": "invalid_grant", "error_description": "This operation was aborted"}'
    job.server.faults.append(Fault("/oauth/token", "POST", status=status, body=body, times=2))
    running = start(job, IMPATIENT)
    said = running.communicate(timeout=LONGEST)[1]
    assert running.returncode == 0, said
    job.published()


def test_an_exchange_that_never_works_may_be_the_hubs_fault(job: World) -> None:
    fault = Fault("/oauth/token", "POST", status=400, times=1000)
    job.server.faults.append(fault)
    running = start(job, IMPATIENT)
    said = running.communicate(timeout=LONGEST)[1]
    assert running.returncode == 9 and "Traceback" not in said, said
    assert 1000 - fault.times >= 6, "once, and after each of five waits"
    assert "its own fault perhaps" in said and "id-token: write" in said and "run it again later" in said


@pytest.mark.parametrize("when", ["/objects/batch", "/objects/verify", "/commit/main", "/storage/", "/tag/"])
def test_a_token_that_ends_amid_an_upload_is_exchanged_anew(job: World, when: str) -> None:
    """As after an hour, or when the Hub calls it back: what storage has is not sent again."""
    job.server.faults.append(Fault(when, run=lambda: lapse(job), skip=1 if when == "/storage/" else 0))
    running = start(job)
    said = running.communicate(timeout=LONGEST)[1]
    assert running.returncode == 0, said
    assert "hf_second" not in said
    job.published()
    assert sum(request.path == "/oauth/token" for request in job.server.requests) >= 2


@pytest.mark.parametrize("given", ["", "another job"])
def test_an_identity_that_is_not_taken_is_explained(world: World, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    monkeypatch.setenv("HF_OIDC_RESOURCE", NAME)
    monkeypatch.setenv("HF_OIDC_ID_TOKEN", given)
    running = start(world)
    said = running.communicate(timeout=LONGEST)[1]
    assert running.returncode == 9 and "id-token: write" in said and "Traceback" not in said, said


def test_an_upload_needs_nothing_but_what_its_lock_installs(world: World) -> None:
    """Every module that a whole upload imports is Python's, the project's, or of a package in locks/publish.txt."""
    code = (
        "import sys; before = {*sys.modules}; from pipeline import upload; code = upload.main(sys.argv[1:]); "
        "new = {name: sys.modules[name] for name in {*sys.modules} - before}; "
        "print(*(name for name, module in new.items() if vars(module).get('__file__'))); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, str(world.folder), "--repository", NAME, "--confirm"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert {"pipeline", "huggingface_hub"} <= loaded
    lock = (PROJECT / "locks" / "publish.txt").read_text(encoding="utf-8")
    locked = {name.replace("-", "_").lower() for name in re.findall(r"^([\w.-]+)==", lock, flags=re.MULTILINE)}
    owners = metadata.packages_distributions()
    allowed = {top for top, names in owners.items() if {name.replace("-", "_").lower() for name in names} & locked}
    outside = {name for name in loaded & owners.keys() if name not in allowed | {"pipeline"}}
    assert outside == set()
    assert not loaded & {"torch", "litert_torch", "ai_edge_litert", "transformers", "numpy", "jax", "tensorflow"}


# --- random schedules -------------------------------------------------------------------------------------------------


def schedule(dice: random.Random) -> list[Fault]:
    """Up to five faults of any kind, anywhere, up to nine times."""
    made = []
    for _ in range(dice.randint(1, 5)):
        method, path = dice.choice(list(POINTS.values()))
        kinds = {**PASSING, **LASTING, "swap": {"swap": True}, "range": {"ignore_range": True}}
        what = dict(dice.choice(list(kinds.values())))
        if "cut" in what:
            what["cut"] = dice.randint(0, 2000)
        if "slow" in what:
            what["slow"] = 0.002
        made.append(Fault(path, method, times=dice.choice((1, 1, 2, 9)), skip=dice.randint(0, 3), **what))
    return made


@pytest.mark.parametrize("seed", range(SCHEDULES))
def test_a_random_schedule_of_faults_loses_nothing(world: World, seed: int) -> None:
    dice, files = random.Random(seed), world.files
    world.server.faults = schedule(dice)
    for _ in range(60):  # each run uses up a fault or ends well
        code = world.confirmed()
        assert code in (0, 4, 9)
        world.sound(files)
        if code == 0:
            break
    world.published()
    world.server.faults.clear()
    assert world.confirmed() == 0
    world.published()


# --- make check FILES=owner/name@revision -----------------------------------------------------------------------------


def test_what_is_on_the_hub_is_checked_as_a_folder_is(world: World, tmp_path: Path) -> None:
    assert world.confirmed() == 0
    tag, commit = world.receipt["tag"], world.receipt["commit"]
    options = ["--downloads", str(tmp_path / "downloads")]
    for revision in (tag, "main", commit):
        assert check.main([f"{NAME}@{revision}", *options]) == 0
    assert "23 files, 5 model files" in world.capture.readouterr().err
    assert world.server.count("GET", "/storage/.*/tiny-gemma3n_int8.tflite") == 2, "read back, and downloaded once"
    assert check.main([str(world.folder)]) == 0, "the receipt lies beside what was published"


def test_a_repository_that_was_changed_is_found(world: World, tmp_path: Path) -> None:
    assert world.confirmed() == 0
    options = ["--downloads", str(tmp_path / "downloads")]
    world.server.add(NAME, {**KEPT, **world.files, "tiny-gemma3n_int8.tflite": b"swapped"})
    assert check.main([f"{NAME}@main", *options]) == 4
    world.server.add(NAME, {**KEPT, **world.files, "more.tflite": b"more"})
    assert check.main([f"{NAME}@main", *options]) == 4
    world.server.add(NAME, {**KEPT, **world.files, "../outside": b"more"})
    assert check.main([f"{NAME}@main", *options]) == 4
    assert not (tmp_path / "outside").exists() and not list(tmp_path.rglob("outside"))


def test_an_interrupted_check_goes_on(world: World, tmp_path: Path) -> None:
    assert world.confirmed() == 0
    options = [f"{NAME}@main", "--downloads", str(tmp_path / "downloads")]
    world.server.faults.append(Fault(f"/storage/.*/{PARTIAL}", cut=1500))
    world.server.faults.append(Fault(f"/resolve/.*/{PARTIAL}", status=403, skip=1))
    assert check.main(options) == 3
    world.server.requests.clear()
    assert check.main(options) == 0
    assert world.server.ranges(PARTIAL)[0].startswith("bytes=1500-")


@pytest.mark.parametrize(("files", "code"), [("org/model", 2), ("org/model@", 2), ("nothing", 2), ("../x@y/../z", 3)])
def test_neither_a_folder_nor_a_revision_on_the_hub(world: World, tmp_path: Path, files: str, code: int) -> None:
    assert check.main([files, "--downloads", str(tmp_path)]) == code
