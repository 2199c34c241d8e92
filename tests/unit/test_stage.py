"""The stage runner: inputs checked, folder cleared, manifest last, one exit code for each way to end."""

from __future__ import annotations

import ast
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from pipeline import reproduce
from pipeline.core import errors, graph, manifest, stage
from pipeline.core.errors import PipelineError
from pipeline.core.facts import Fetch
from pipeline.core.manifest import Source
from pipeline.core.options import Options
from pipeline.core.recipe import PROJECT
from pipeline.core.recipe import load as load_recipe
from pipeline.core.stage import Context, Outcome, Stage
from pipeline.tflite.graph import Graph

Work = Callable[[Context], Outcome]
Run = Callable[..., int]
RECIPE = PROJECT / stage.DEFAULT_RECIPE

SCRIPT = '''
"""A stage in a process of its own: writes `parts` files; between the two it says so and waits to be told."""
import sys
from pipeline.core.stage import Context, Outcome, Stage, main

def work(context):
    for part in range(2):
        (context.folder / f"part{part}.bin").write_bytes(bytes([part]) * 100_000)
        if part == 0 and "--wait" in sys.argv:
            print("half", flush=True)
            sys.stdin.readline()
    return Outcome(model="toy", revision="r1")

words = [word for word in sys.argv[1:] if word != "--wait"]
sys.exit(main(Stage(name="slow", summary="writes two files", work=work), words))
'''


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run a stage through `main` in a temporary artefact folder, as the command line would."""

    def run(made: Stage, *more: str) -> int:
        recipe = str(PROJECT / stage.DEFAULT_RECIPE)
        return stage.main(made, ["--model-id", "org/toy", "--artifacts", str(tmp_path), "--recipe", recipe, *more])

    return run


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "org--toy"


def first_work(context: Context) -> Outcome:
    (context.folder / "checkpoint").mkdir()
    (context.folder / "checkpoint" / "weights.bin").write_bytes(bytes(range(256)))
    (context.folder / "note.txt").write_text(context.model_id, encoding="utf-8")
    return Outcome(facts={"parameters": 256}, model="org/toy", revision="abc")


def second_work(context: Context) -> Outcome:
    source = context.root / context.upstream["first"].output("weights.bin").path
    (context.folder / "half.bin").write_bytes(source.read_bytes()[::2])
    return Outcome()


FIRST = Stage(name="first", summary="makes weights", work=first_work)
SECOND = Stage(name="second", summary="halves them", work=second_work, needs_of=lambda *_: ("first",))


def fetch_work(context: Context) -> Outcome:
    card = {"licence": "mit", "base_models": (), "lineage": ()}
    facts = Fetch(model_type="gemma3n_text", parameters=256, dtype="bfloat16", shards=1, **card)
    return replace(first_work(context), facts=facts)


FETCH = Stage(name="fetch", summary="makes weights", work=fetch_work)


def failing(error: BaseException) -> Stage:
    def work(context: Context) -> Outcome:
        (context.folder / "half-done.bin").write_bytes(b"x")
        raise error

    return Stage(name="first", summary="fails", work=work)


def test_a_stage_leaves_its_files_a_run_record_and_a_manifest(run: Run, root: Path) -> None:
    assert run(FIRST) == 0
    made = manifest.read(root / "first")
    assert [record.path for record in made.outputs] == ["first/checkpoint/weights.bin", "first/note.txt"]
    assert (made.stage, made.model, made.revision, made.inputs) == ("first", "org/toy", "abc", ())
    assert made.facts == {"parameters": 256}
    assert made.tools["python"] == ".".join(map(str, sys.version_info[:3]))
    manifest.check(made.outputs, root)
    seconds = json.loads((root / "first" / "run.json").read_text(encoding="utf-8"))
    assert seconds["peak_resident"] > seconds["peak_anonymous"] > 1_000_000
    assert 0 <= seconds["seconds"] < 60
    assert 0 < seconds["processor_seconds"] <= sum(os.times()[:4])


def test_a_stage_checks_and_records_the_files_that_it_reads_and_no_others(run: Run, root: Path) -> None:
    """Bundle opens no weights of the checkpoint, so it does not hash them either."""
    bundle = Stage(name="bundle", summary="packs", work=lambda _: Outcome(), needs_of=lambda *_: ("fetch",))
    assert run(FETCH) == 0
    (root / "fetch" / "checkpoint" / "weights.bin").write_bytes(b"others")
    assert run(bundle) == 0
    assert [record.path for record in manifest.read(root / "bundle").inputs] == ["fetch/note.txt"]
    (root / "fetch" / "note.txt").write_text("others")
    assert run(bundle) == 4


def test_a_later_stage_inherits_the_model_and_records_what_it_read(run: Run, root: Path) -> None:
    assert (run(FIRST), run(SECOND)) == (0, 0)
    made = manifest.read(root / "second")
    assert (made.model, made.revision) == ("org/toy", "abc")
    assert made.inputs == manifest.read(root / "first").outputs


def test_two_runs_give_the_same_manifest_and_the_same_files(run: Run, root: Path) -> None:
    def everything() -> dict[str, bytes]:
        of_this_machine = ("run.json", "hashed.json")
        files = (file for file in root.rglob("*") if file.is_file() and file.name not in of_this_machine)
        return {file.relative_to(root).as_posix(): file.read_bytes() for file in files}

    assert (run(FIRST), run(SECOND)) == (0, 0)
    before = everything()
    assert (run(FIRST), run(SECOND)) == (0, 0)
    assert everything() == before
    assert "second/manifest.json" in before


def test_the_manifest_names_no_machine(run: Run, root: Path) -> None:
    assert run(FIRST) == 0
    text = (root / "first" / "manifest.json").read_text(encoding="utf-8")
    assert str(root) not in text
    assert os.uname().nodename not in text or len(os.uname().nodename) < 4


@pytest.mark.parametrize(
    "kind",
    [
        errors.PipelineError,
        errors.UsageError,
        errors.FetchError,
        errors.IntegrityError,
        errors.ExportError,
        errors.QuantiseError,
        errors.BundleError,
        errors.VerificationError,
        errors.PublishError,
        errors.ResourceError,
    ],
)
def test_each_error_has_its_exit_code_and_is_printed_whole(
    run: Run, root: Path, capsys: pytest.CaptureFixture[str], kind: type[PipelineError]
) -> None:
    assert run(failing(kind("it broke", cause="rust", remedy="oil it"))) == kind.exit_code
    assert capsys.readouterr().err.endswith("error: it broke\n  cause: rust\n  do:    oil it\n")
    assert not (root / "first" / "manifest.json").exists()


CLEAN, EDITED, LATER = Source(commit="a", dirty=False), Source(commit="a", dirty=True), Source(commit="b", dirty=False)


@pytest.mark.parametrize(
    ("before", "after", "recorded"),
    [
        (CLEAN, CLEAN, CLEAN),
        (EDITED, EDITED, EDITED),
        (CLEAN, EDITED, EDITED),
        (CLEAN, LATER, EDITED),  # commit b did not make it
        (EDITED, LATER, EDITED),
    ],
)
def test_code_that_changes_while_a_stage_runs_is_not_what_made_it(
    run: Run,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    before: Source,
    after: Source,
    recorded: Source,
) -> None:
    now = [before]
    monkeypatch.setattr(stage, "source", lambda: now[-1])

    def work(context: Context) -> Outcome:
        now.append(after)
        return first_work(context)

    assert run(Stage(name="first", summary="makes weights", work=work)) == 0
    assert manifest.read(root / "first").source == recorded
    assert ("code changed while first ran" in capsys.readouterr().err) is (before != after)


@pytest.mark.parametrize(("code", "ends"), [(8, 8), (10, 10), (1, 1), (-9, 1)])
def test_reproduce_ends_with_the_code_of_the_stage_that_failed(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int, ends: int
) -> None:
    assert run(FETCH) == 0
    monkeypatch.setattr(reproduce.process, "run", lambda *_command, **_options: code)
    recipe = str(PROJECT / stage.DEFAULT_RECIPE)
    common = ["--model-id", "org/toy", "--artifacts", str(tmp_path), "--recipe", recipe]
    assert reproduce.main([*common, "--again", str(tmp_path / "again")]) == ends
    assert f"error: stage fetch failed with exit code {code}" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["again", "artifacts"])
def test_reproduce_removes_nothing_but_what_it_made(
    run: Run, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """`--again` may be a folder of somebody's, or that of the first build."""
    assert run(FETCH) == 0
    again = root.parent if place == "artifacts" else tmp_path / "mine"
    (again / "org--toy").mkdir(parents=True, exist_ok=True)
    (again / "org--toy" / "thesis.txt").write_text("years of work")
    (again / "letter.txt").write_text("dear")
    monkeypatch.setattr(reproduce.process, "run", lambda *_command, **_options: 5)
    common = ["--model-id", "org/toy", "--artifacts", str(tmp_path), "--recipe", str(RECIPE), "--again"]
    assert reproduce.main([*common, str(again)]) == 2
    assert (again / "org--toy" / "thesis.txt").is_file() and (again / "letter.txt").is_file()
    assert [reproduce.main([*common, str(tmp_path / "second")]) for _ in range(2)] == [5, 5]  # its own is cleared


@pytest.mark.parametrize("inside", [True, False])
def test_only_a_file_that_a_stage_made_is_to_be_removed(
    run: Run, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], inside: bool
) -> None:
    """Whoever reads a file can't know whose its folder is."""
    assert run(FIRST) == 0
    file = (root / "first" if inside else tmp_path / "mine") / "notes.tflite"

    def work(context: Context) -> Outcome:
        file.parent.mkdir(exist_ok=True)
        file.write_text("milk, eggs")
        Graph.read(file)
        return Outcome()

    assert run(Stage(name="second", summary="reads", work=work, needs_of=lambda *_: ("first",))) == 4
    said = capsys.readouterr().err
    assert f"error: {file} is not a TFLite file\n" in said
    assert (f"do:    remove {root / 'first'} and run make again\n" in said) is inside
    assert ("do:" in said) is inside


def test_no_library_code_says_to_remove_a_folder() -> None:
    """Only core knows what is a stage's own."""
    for file in sorted((PROJECT / "pipeline").glob("*/*.py")):
        if file.parent.name == "core":
            continue
        calls = (node for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.keyword))
        told = [ast.unparse(node.value) for node in calls if node.arg == "remedy"]
        assert not [text for text in told if re.search(r"\bremove\b.*\bfolder\b", text)], file


def test_an_interrupt_ends_with_130_and_no_manifest(run: Run, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(failing(KeyboardInterrupt())) == 130
    assert not (root / "first" / "manifest.json").exists()
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_resource_error(run: Run, capsys: pytest.CaptureFixture[str], code: int) -> None:
    assert run(failing(OSError(code, os.strerror(code)))) == 10
    assert "the disk is full" in capsys.readouterr().err


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory")])
def test_too_little_memory_is_a_resource_error(
    run: Run, capsys: pytest.CaptureFixture[str], error: BaseException
) -> None:
    assert run(failing(error)) == 10
    assert "not enough memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EIO, "Input/output error"), ZeroDivisionError("no"), np.linalg.LinAlgError("not positive definite")],
)
def test_what_nobody_expected_ends_with_1_and_shows_where_it_happened_and_last_what_it_is(
    run: Run, root: Path, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    assert run(failing(error)) == 1
    said = capsys.readouterr().err
    assert "in work" in said
    assert f"error: unexpected {type(error).__name__}: {error}\n  cause: " in said
    assert said.splitlines()[-1] == "  do:    report it with all that is printed above"
    assert not (root / "first" / "manifest.json").exists()


def test_stale_files_are_cleared_and_other_folders_are_not(run: Run, root: Path) -> None:
    assert run(failing(errors.ExportError("no"))) == 5
    (root / "first" / "old").mkdir()
    (root / "first" / "old" / "stale.bin").write_bytes(b"old")
    (root / "neighbour").mkdir()
    (root / "neighbour" / "kept.bin").write_bytes(b"kept")
    assert run(FIRST) == 0
    assert not (root / "first" / "half-done.bin").exists()
    assert not (root / "first" / "old").exists()
    assert (root / "neighbour" / "kept.bin").read_bytes() == b"kept"


def test_a_failed_run_takes_the_old_manifest_away(run: Run, root: Path) -> None:
    assert run(FIRST) == 0
    assert run(failing(errors.ExportError("no"))) == 5
    assert not (root / "first" / "manifest.json").exists()


def test_files_named_like_the_runners_own_deeper_down_are_outputs(run: Run, root: Path) -> None:
    def work(context: Context) -> Outcome:
        (context.folder / "checkpoint").mkdir()
        for name in ("manifest.json", "run.json"):
            (context.folder / "checkpoint" / name).write_text("{}", encoding="utf-8")
        return Outcome()

    assert run(Stage(name="first", summary="", work=work)) == 0
    paths = [record.path for record in manifest.read(root / "first").outputs]
    assert paths == ["first/checkpoint/manifest.json", "first/checkpoint/run.json"]


@pytest.mark.parametrize("damage", ["missing", "truncated", "changed", "no manifest", "spoilt manifest"])
def test_damaged_input_is_found_before_anything_is_touched(run: Run, root: Path, damage: str) -> None:
    assert (run(FIRST), run(SECOND)) == (0, 0)
    weights, record = root / "first" / "checkpoint" / "weights.bin", root / "first" / "manifest.json"
    if damage == "missing":
        weights.unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "changed":
        weights.write_bytes(bytes(256))
    elif damage == "no manifest":
        record.unlink()
    else:
        record.write_text("{}", encoding="utf-8")
    assert run(SECOND) == 4
    assert (root / "second" / "manifest.json").exists()


def test_arguments_may_choose_the_folder_and_what_is_read(run: Run, root: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Choice(Options):
        scheme: str = "dynamic"

        def folder(self, stage: str) -> str:
            return f"{stage}-{self.scheme}"

    made = Stage(
        name="int8",
        summary="quantises",
        work=lambda context: Outcome(facts={"read": list(context.upstream), "scheme": context.chosen(Choice).scheme}),
        options=Choice,
        needs_of=lambda _, options: ("first",) if options != Choice() else (),
    )
    assert (run(FIRST), run(made, "--scheme", "static"), run(made)) == (0, 0, 0)
    assert manifest.read(root / "int8-static").facts == {"read": ["first"], "scheme": "static"}
    assert manifest.read(root / "int8-dynamic").facts == {"read": [], "scheme": "dynamic"}


@pytest.mark.parametrize("wanted", [None, "step", "bundle", "all"])
def test_graphs_are_the_recipes_unless_somebody_chooses(run: Run, root: Path, wanted: str | None) -> None:
    def work(context: Context) -> Outcome:
        return Outcome(facts={"graphs": context.graphs})

    options = ("--graphs", wanted) if wanted else ()
    assert run(Stage(name="first", summary="", work=work), *options) == 0
    assert manifest.read(root / "first").facts == {"graphs": wanted or load_recipe(RECIPE).graphs}


def test_unknown_graphs_end_with_2(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(FIRST, "--graphs", "decoder")
    assert caught.value.code == 2
    assert "--graphs" in capsys.readouterr().err


def test_a_stage_that_needs_what_was_not_asked_for_touches_nothing(run: Run, root: Path) -> None:
    def needs(root: Path, _options: Options) -> tuple[str, ...]:
        raise errors.UsageError(f"{root.name} has nothing to build")

    assert run(Stage(name="second", summary="", work=second_work, needs_of=needs), "--graphs", "step") == 2
    assert not root.exists()


def test_measured_files_stay_and_are_not_in_the_manifest(run: Run, root: Path) -> None:
    made = Stage(name="first", summary="", work=first_work, measured=("note.txt", "weights.bin"))
    assert run(made) == 0
    assert (root / "first" / "note.txt").is_file()
    assert [record.path for record in manifest.read(root / "first").outputs] == ["first/checkpoint/weights.bin"]


def test_what_comes_after_finds_the_manifest_written_and_is_left_out_after_a_failure(run: Run, root: Path) -> None:
    seen = []

    def after(context: Context) -> None:
        seen.append((context.folder / "manifest.json").is_file())

    assert run(Stage(name="first", summary="", work=failing(errors.ExportError("no")).work, after=after)) == 5
    assert run(Stage(name="first", summary="", work=first_work, after=after)) == 0
    assert seen == [True]


def test_wrong_arguments_end_with_2(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(FIRST, "--no-such-option")
    assert caught.value.code == 2
    assert "python -m pipeline.first" in capsys.readouterr().err


def test_a_missing_recipe_ends_with_2(tmp_path: Path) -> None:
    arguments = ["--model-id", "org/toy", "--artifacts", str(tmp_path), "--recipe", str(tmp_path / "absent.toml")]
    assert stage.main(FIRST, arguments) == 2
    assert not (tmp_path / "org--toy").exists()


def test_model_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    assert graph.model_name("google/gemma-3n-E2B-it") == "google--gemma-3n-E2B-it"
    assert graph.model_name("models/tiny") == graph.model_name("models/tiny/") == "tiny"
    assert graph.model_name(str(tmp_path / "models" / "tiny" / "..")) == "models"


@pytest.fixture
def slow(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start the waiting stage as a process; its first output line means it is in the middle of its work."""
    script = tmp_path / "slow.py"
    script.write_text(SCRIPT, encoding="utf-8")

    def start(artifacts: Path, *more: str) -> subprocess.Popen[str]:
        recipe = str(PROJECT / stage.DEFAULT_RECIPE)
        command = [sys.executable, str(script), "--model-id", "toy", "--artifacts", str(artifacts), "--recipe", recipe]
        environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
        pipe = subprocess.PIPE
        return subprocess.Popen([*command, *more], stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)

    return start


def wait_until_half(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "run.json"}


def test_killed_in_the_middle_the_next_run_gives_the_same_bytes(
    tmp_path: Path, slow: Callable[..., subprocess.Popen[str]]
) -> None:
    undisturbed, disturbed = tmp_path / "a", tmp_path / "b"
    assert slow(undisturbed).wait(60) == 0
    with slow(disturbed, "--wait") as process:
        wait_until_half(process)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert list(files(disturbed / "toy" / "slow")) == ["part0.bin"]
    assert slow(disturbed).wait(60) == 0
    assert files(disturbed / "toy" / "slow") == files(undisturbed / "toy" / "slow")


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_with_130_and_no_manifest(
    tmp_path: Path, slow: Callable[..., subprocess.Popen[str]], sent: signal.Signals
) -> None:
    with slow(tmp_path / "a", "--wait") as process:
        wait_until_half(process)
        process.send_signal(sent)
        assert process.wait(60) == 130
    assert not (tmp_path / "a" / "toy" / "slow" / "manifest.json").exists()


def test_two_runs_of_one_stage_at_once_are_refused(tmp_path: Path, slow: Callable[..., subprocess.Popen[str]]) -> None:
    with slow(tmp_path / "a", "--wait") as process:
        wait_until_half(process)
        second = slow(tmp_path / "a")
        _, said = second.communicate(timeout=60)
        assert second.returncode == errors.ResourceError.exit_code
        assert "another run is working on" in said
        assert process.poll() is None
        process.communicate("go\n", timeout=60)
    assert process.returncode == 0
    made = manifest.read(tmp_path / "a" / "toy" / "slow")
    manifest.check(made.outputs, tmp_path / "a" / "toy")


def test_the_memory_of_a_stage_is_sampled_while_it_works(run: Run, root: Path) -> None:
    def work(context: Context) -> Outcome:
        block = bytearray(os.urandom(1)) * 200_000_000
        time.sleep(0.3)
        del block
        return Outcome()

    assert run(Stage(name="first", summary="", work=work)) == 0
    assert json.loads((root / "first" / "run.json").read_text(encoding="utf-8"))["peak_anonymous"] > 200_000_000


@pytest.mark.parametrize("forever", [True, False])
def test_an_interrupt_that_a_library_swallows_ends_the_stage_all_the_same(tmp_path: Path, forever: bool) -> None:
    """Also if the work comes to its end before patience does."""
    program = f"""
import contextlib, os, signal, sys, time
from pipeline.core import stage
stage._PATIENCE = 0.5 if {forever} else 60
def work(context):
    (context.folder / "half.bin").write_bytes(bytes(100))
    with contextlib.suppress(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60 if {forever} else 0)
    return stage.Outcome(model="toy", revision="r1")
sys.exit(stage.main(stage.Stage(name="deaf", summary="", work=work)))
"""
    where = ["--model-id", "org/toy", "--artifacts", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", program, *where], cwd=PROJECT, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 130 and "the same command goes on" in done.stderr
    assert not list((tmp_path / "org--toy" / "deaf").iterdir())
