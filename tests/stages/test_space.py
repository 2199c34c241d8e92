"""A static Space: what it holds, why it is refused, and its way to the Hub."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub.repocard import metadata_load
from release_line import STAGES, Line, clean

from pipeline import page as paging
from pipeline import space, upload
from pipeline.bundling import web
from pipeline.core import manifest
from pipeline.core.stage import Context, Outcome, Stage
from pipeline.release import folder, preflight

NAME = "org/model"
TOKEN = "hf_CanaryThatNobodyMaySee"
KEPT = {".gitattributes": b"*.tflite filter=lfs\n"}
SECTIONS = ("decoder", "embedder")


def page(context: Context) -> Outcome:
    """What stage page leaves, but for npm's packages and for the prompts, which take a checkpoint and Node.js."""
    preflight.judgement(context.root / "verify")
    for name in ("index.html", "app.js", "_headers"):
        shutil.copyfile(web.SOURCES / name, context.folder / name)
    (context.folder / "model").mkdir()
    for name in SECTIONS:
        folder.place_model(context.root / "int8" / f"{name}.tflite", context.folder / "model" / f"{name}.tflite")
    (context.folder / "README.md").write_text(web.space_card(context.root.name, ()), encoding="utf-8")
    folder.place_reports(context.root / "verify", ("report.html",), context.folder)
    return Outcome(facts={})


PAGE = Stage(
    name="page", summary="", work=page, needs_of=paging.STAGE.needs_of, measured=paging.STAGE.measured
)  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Line:
    """Verify, publish and page have passed; not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        clean(patch)
        line = Line(tmp_path_factory.mktemp("line"))
        line.fetch()
        for name in STAGES:
            line.variant(name, name.encode() * 30, *(SECTIONS if name == "int8" else ()))
        assert (line.verify(), line.publish(), line.run(PAGE)) == (0, 0, 0)
    return line


@pytest.fixture
def line(done: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Line:
    clean(monkeypatch)
    shutil.copytree(done.artifacts, tmp_path / "artifacts", symlinks=True)
    return Line(tmp_path / "artifacts")


def files(where: Path) -> dict[str, bytes]:
    found = (file for file in where.rglob("*") if file.is_file())
    made = {file.relative_to(where).as_posix(): file.read_bytes() for file in found}
    return {name: data for name, data in made.items() if name not in preflight.NOT_UPLOADED}


def test_it_holds_the_page_and_the_papers_of_its_files(line: Line) -> None:
    before = files(line.root / "page")
    assert line.run(space.STAGE) == 0
    made, published = files(line.root / "space"), files(line.root / "publish")
    assert {name: made[name] for name in before if name != "README.md"} == {
        name: data for name, data in before.items() if name != "README.md"
    }
    for name in ("LICENSE", "NOTICE", "report.json", "report.html", "manifests/verify.json"):
        assert made[name] == published[name]
    assert json.loads(made["manifests/page.json"])["stage"] == "page"
    said = metadata_load(line.root / "space" / "README.md")
    assert said is not None and said["sdk"] == "static" and said["license"] == "cc0-1.0"
    assert said["custom_headers"]["cross-origin-embedder-policy"] == "require-corp"
    assert files(line.root / "page") == before, "the page itself is left alone"
    release = preflight.release(line.root / "space")
    assert release.files.keys() == made.keys()
    assert release.tag == preflight.release(line.root / "publish").tag


def test_a_second_run_gives_the_same_bytes(line: Line) -> None:
    assert line.run(space.STAGE) == 0
    before = files(line.root / "space")
    assert line.run(space.STAGE) == 0
    assert files(line.root / "space") == before


def no_page(line: Line) -> None:
    shutil.rmtree(line.root / "page")


def other_verdict(line: Line) -> None:
    text = line.root / "verify" / "judgement.json"

    def again(context: Context) -> None:
        found = json.loads((context.folder / "judgement.json").read_text(encoding="utf-8"))
        (context.folder / "judgement.json").write_text(manifest.dump_json(found | {"positions": 9}), encoding="utf-8")

    assert line.verify(write=again) == 0 and line.publish() == 0 and text.is_file()


def changed_page(line: Line) -> None:
    (line.root / "page" / "app.js").write_text("//", encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "says"),
    [(no_page, "page"), (other_verdict, "other verdicts"), (changed_page, "app.js")],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_it_is_refused_where_the_page_is_not_that_of_the_published_files(
    line: Line, change: Callable[[Line], None], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(line)
    capsys.readouterr()
    assert line.run(space.STAGE) != 0
    text = capsys.readouterr().err
    assert says in text and "\n  do:    " in text and not (line.root / "space" / manifest.NAME).exists()


def failed_gate(line: Line) -> None:
    """A page that is put up although its files' checks did not pass."""
    report = line.root / "space" / "report.json"
    found = json.loads(report.read_text(encoding="utf-8"))
    found["checks"][0]["passed"] = False
    report.write_text(json.dumps(found), encoding="utf-8")


def other_decoder(line: Line) -> None:
    file = line.root / "space" / "model" / "decoder.tflite"
    file.unlink()
    file.write_bytes(b"TFL3 not judged")


def no_papers(line: Line) -> None:
    (line.root / "space" / "SHA256SUMS").unlink()


@pytest.mark.parametrize(
    ("change", "says"),
    [(failed_gate, "verification failed"), (other_decoder, "decoder.tflite"), (no_papers, "not ready")],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_nothing_is_sent_of_a_folder_that_its_papers_do_not_clear(
    line: Line,
    server: HubServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Line], None],
    says: str,
) -> None:
    world(server, monkeypatch)
    assert line.run(space.STAGE) == 0
    change(line)
    assert put_up(line, "--confirm") == 9
    assert says in capsys.readouterr().err and not server.requests


def world(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub with a model and a Space of one name."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    server.tokens[TOKEN] = server.writers[TOKEN] = {NAME, f"spaces/{NAME}"}
    server.add(NAME, {**KEPT, "old.tflite": b"the model"})
    server.add(f"spaces/{NAME}", {**KEPT, "README.md": b"---\nsdk: static\n---\n", "style.css": b"of the Hub"})


def put_up(line: Line, *options: str) -> int:
    return upload.main([str(line.root / "space"), "--repository", NAME, "--space", *options])


def test_it_goes_up_in_one_commit_read_back_tagged_and_receipted(
    line: Line, server: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world(server, monkeypatch)
    assert line.run(space.STAGE) == 0
    made, model = files(line.root / "space"), server.repos[NAME]
    assert put_up(line) == 0, "a dry run"
    assert {request.method for request in server.requests} == {"GET"}
    assert put_up(line, "--confirm") == 0
    there = server.repos[f"spaces/{NAME}"]
    receipt = json.loads((line.root / "space" / "receipt.json").read_text(encoding="utf-8"))
    assert there.commits[receipt["commit"]] == {**KEPT, **made}
    assert there.refs["main"] == receipt["commit"] == there.tags[receipt["tag"]] and len(there.commits) == 2
    assert receipt["repository"] == NAME and receipt["kind"] == "space" and receipt["files"].keys() == made.keys()
    assert len(model.commits) == 1 and not model.tags, "the model of that name is another repository"
    text = capsys.readouterr().err
    assert f"{server.endpoint}/spaces/{NAME}/tree/{receipt['tag']}" in text and TOKEN not in text
    server.requests.clear()
    assert put_up(line, "--confirm") == 0
    assert "nothing to do" in capsys.readouterr().err
    assert {request.method for request in server.requests} == {"GET"}


def test_a_space_that_is_not_there_is_not_made(
    line: Line, server: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world(server, monkeypatch)
    del server.repos[f"spaces/{NAME}"]
    assert line.run(space.STAGE) == 0
    assert put_up(line, "--confirm") == 9
    text = capsys.readouterr().err
    assert "SPACE=" in text and re.search(rf"hf repos create {NAME} --type space --sdk static", text)
