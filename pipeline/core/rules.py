"""The rules that Make includes, and what every stage is made from: written by Python, from the one table of stages.

    python -m pipeline.core.rules MODEL_ID=… RECIPE=… GOALS=int8 …

prints the path of a file for Make to include, `artifacts/<model>/.inputs/rules.mk`: a rule per stage. Beside it stands
`.inputs/<stage>` for each, rewritten only where something that the stage depends on changed: its settings, the contents
of the modules that it imports, its recipe and texts, the lock; a checkpoint's files by path, size and time. Names in a
checkpoint's folder stand in these files alone: neither Make nor a shell sees them.

The recipe is chosen by the checkpoint's type, and that of one on the Hub is not known before somebody asks. Then the
rules hold one for themselves: Make, which first makes anew what it includes, runs `identify` and begins again.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import cast, get_args

from pipeline.core import container, parallel, senses
from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.graph import (
    STAGES,
    STEPS,
    Choice,
    Towers,
    behind,
    makeable,
    model_name,
    model_root,
    refuse_within,
    towers_in,
)
from pipeline.core.manifest import NAME, write_atomically
from pipeline.core.recipe import CONFIG, DEFAULT, IDENTIFIED, PROJECT, STEP, Graphs, load, named_in, with_context

_SPECIAL = "$'\"`;&|<>()[]{}*?!%:\\#"
"""What Make or a shell would read as more than a name."""
_LEADING = "-~"
"""What a command would read as an option, and Make as somebody's home."""
_LIBRARIES = "web/node_modules/.package-lock.json"
"""What npm writes last: the libraries of the page are there, each with the hash that the lock has."""
_NPM = (
    "command -v npm >/dev/null || { echo 'error: the page needs npm, of Node.js 20.19 or later'; exit 2; }; "
    "npm ci --prefix web --omit dev --no-progress --loglevel error"
)
_COMMANDS = ("plan", "template", "upload", "check", "inspection", "job", "reproduce", "chat", "run", "tune")
"""What runs beside the stages."""
_FILES = ("calibration", "eval", "task", "template", "picture", "audio")
_ADAPTER = "adapter_config.json"
_WITHOUT_RECIPE = {"clean", "check", "inspect"}
"""Goals that are the same whatever the recipe."""
_CHECKPOINT = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.md", "LICENSE*", "NOTICE*")


# --- what a stage is made from


@cache
def _imports(module: str) -> frozenset[str]:
    """The modules of `pipeline` that the code of `module` (dotted) imports, inside functions as well."""
    names = set[str]()
    for node in _statements(ast.parse(_file(module).read_bytes())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(name for name in names if name.split(".")[0] == "pipeline" and _file(name).is_file())


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """The statements of a module, inside others too; not what they consist of, which is ten times as much."""
    queue = [tree]
    while queue:
        node = queue.pop()
        yield node
        for part in ("body", "orelse", "finalbody", "handlers", "cases"):
            queue += getattr(node, part, ())


@cache
def _file(module: str) -> Path:
    path = PROJECT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def modules(stage: str) -> list[Path]:
    """The files whose contents stage `stage` depends on: what its module imports, and the data that these name.

    The families are chosen by a checkpoint's model type while a stage runs, so whoever imports one imports all.
    """
    queue, seen = [f"pipeline.{STAGES[stage].module}"], set[str]()
    while queue:
        module = queue.pop()
        if module not in seen:
            seen.add(module)
            parents = [module.rsplit(".", count)[0] for count in range(1, module.count(".") + 1)]
            queue += [*_imports(module), *parents]
            if module == "pipeline.models":
                queue += [f"{module}.{file.stem}" for file in _file(module).parent.glob("[!_]*.py")]
    return _with_data({_file(module) for module in seen})


def _with_data(files: set[Path]) -> list[Path]:
    """`files`, and the templates, tables and texts in their rooms that they, or one of these, name."""
    rooms = {file.parent for file in files} - {PROJECT / "pipeline"}
    data = [
        file
        for room in sorted(rooms)
        for file in room.rglob("*")
        if file.suffix not in (".py", ".pyc") and file.is_file()
    ]
    queue, named = list(files), set(files)
    while queue:
        source = queue.pop().read_text(encoding="utf-8")
        fresh = {file for file in data if file.name in source or f'"{file.parent.name}"' in source} - named
        named |= fresh
        queue += fresh
    return sorted(named)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was `said` to Make. `settings` are those of stages by name, where they are set; paths as they were given.

    In a container every path is absolute, since it is mounted where it is. It `looks` where the checkpoint's
    type is to be found out before there is a recipe.
    """

    model_id: str
    artifacts: Path
    recipe: Path
    choice: Choice
    settings: Mapping[str, str]
    goals: tuple[str, ...]
    said: Mapping[str, str]
    looks: bool = False

    @property
    def docker(self) -> bool:
        """Whether stages run in the container."""
        return self.said["IN"] == "docker"

    @property
    def folder(self) -> Path | None:
        """The checkpoint's folder, where MODEL_ID is one."""
        return Path(self.model_id).resolve() if Path(self.model_id).is_dir() else None

    @property
    def folders(self) -> list[Path]:
        """The folders that fetch reads: the checkpoint's, and that of an adapter's base."""
        base = self.settings.get("base", "")
        return [*([self.folder] if self.folder else []), *([Path(base)] if base and Path(base).is_dir() else [])]

    @property
    def asked(self) -> list[str]:
        """The words for which checkpoint is meant, and the files that lie here for it."""
        words = [self.model_id, *_option(self, "revision"), *_option(self, "base")]
        return [*words, *self.files]

    @property
    def files(self) -> list[str]:
        """The files that lie here for fetch, with size and time."""
        rows = (row for folder in self.folders for row in _checkpoint(folder))
        return [f"{file} {stat.st_size} {stat.st_mtime_ns}" for file, stat in rows]

    @property
    def online(self) -> bool:
        """Whether fetch asks the Hub: for a model, or for the base of an adapter that is here."""
        adapter = bool(self.folder) and (Path(self.model_id) / _ADAPTER).is_file()
        return len(self.folders) < (2 if adapter else 1)

    @property
    def root(self) -> Path:
        """The model's artefact folder."""
        return model_root(self.artifacts, self.model_id)

    def text(self, kind: str) -> str:
        """The file of a kind of text: the user's, else (or after `recipe.`) the recipe's; empty without any."""
        own = self.settings.get(kind, "")
        return own or str(getattr(self.choice.recipe.corpus, kind.removeprefix("recipe."), ""))

    def words(self, stage: str) -> list[str]:
        """The arguments of a stage, after those that all have."""
        node, words = STAGES[stage], []
        for name in node.settings:
            if name == "variants":
                words += ["--variants", *self.choice.judged]
            elif value := self.settings.get(name):
                words += [f"--{name}", value]
        return [*words, *node.options]

    @property
    def where(self) -> list[str]:
        """The arguments that all stages have."""
        model = str(self.folder) if self.docker and self.folder else self.model_id
        paths = [path.absolute() if self.docker else path for path in (self.artifacts, self.recipe)]
        return ["--model-id", model, "--artifacts", str(paths[0]), "--recipe", str(paths[1])]

    @property
    def aims(self) -> tuple[str, ...]:
        """The stages that the goals ask for."""
        more = {"chat": ("bundle",), "run": ("bundle",), "compare": ("verify",), "tune": ("graph", "moments")}
        more |= {"publish": ("space",)} if self.said["SPACE"] else {}
        stems = [goal.removeprefix(f"{self.root}/").removesuffix("/manifest.json") for goal in self.goals]
        aims = {aim for stem in stems for aim in more.get(stem, (stem,)) if aim in STAGES}
        return tuple(sorted(aims)) or ("publish",)

    @property
    def planned(self) -> tuple[str, ...]:
        """The stages that are planned before the first of them runs."""
        return tuple(name for name in behind(self.aims, self.choice) if name != "evaluate")


def record(request: Request, stage: str) -> str:
    """What `.inputs/<stage>` says: everything that the stage's result depends on, beside the stages that it reads."""
    lines = [shlex.join(["options", *request.words(stage)]), *(request.files if stage == "fetch" else [])]
    texts = dict.fromkeys(filter(None, map(request.text, STAGES[stage].texts)))
    taken = sorted(file for pattern in STAGES[stage].sources for file in PROJECT.glob(pattern) if file.is_file())
    paths = [
        *modules(stage),
        *taken,
        request.recipe,
        *(PROJECT / text for text in texts),
        PROJECT / "locks" / "cpu.txt",
    ]
    lines += [f"{_digest(path)} {_shown(path)}" for path in paths]
    return "\n".join(lines) + "\n"


def _checkpoint(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """The files of a checkpoint that fetch may take; they can be large, so they are known by size and time."""
    for file in sorted({file for pattern in _CHECKPOINT for file in folder.glob(pattern)}):
        if file.is_file():
            yield repr(str(file)), file.stat()


def _shown(path: Path) -> Path:
    return path.relative_to(PROJECT) if path.is_relative_to(PROJECT) else path


@cache
def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "absent"


# --- what Make includes


def rules(request: Request) -> str:
    """Variables and a rule per stage."""
    root, choice = request.root, request.choice
    plan = root / ".inputs" / f"planned.{'-'.join(request.aims)}"
    steps = [f"{root}/{name}/{STEP}" for name in choice.judged]
    texts = [word for name in ("eval", "calibration", "base", "template") for word in _option(request, name)]
    said = "none" if request.said["TOWERS"] == "none" else ""
    eyes = "vision" in towers_in(request.choice.towers) and not request.said["IN"]
    # Before anything else: without npm hours of work would end without a page.
    libraries = f" {_LIBRARIES}" if any(STAGES[name].sources for name in request.planned) else ""
    lines = [
        "# Written by pipeline/core/rules.py.",
        "HASH := \\#",
        f"ROOT := {root}",
        f"FILES_MADE := {' '.join([*steps, *(f'{root}/bundle/{name}.litertlm' for name in choice.bundles)])}",
        f"WHERE := {_quoted(request.where)}",
        f"override TOWERS := {request.settings['towers'] or said}",  # found, where nobody said it
        f"CALIBRATED := {_quoted(_option(request, 'calibration'))}",
        f"TEXTS := {_quoted(texts)}",
        *(_containers(request) if request.said["IN"] else ()),
        "",
        f"{plan}: {' '.join(f'{root}/.inputs/{name}' for name in request.planned)} | $(READY){libraries}",
        f"\t@$(call RUN,plan) -m pipeline.plan {_quoted(_plan_words(request))}",
        "\t@touch $@",
        "",
        "plan: $(READY)",
        f"\t$(call RUN,plan) -m pipeline.plan {_quoted(_plan_words(request))}",
        "",
        *(["reproduce: | .venv-vision/.ready", ""] if eyes else ()),  # which makes golden by itself
    ]
    if request.looks:  # Make begins again once this file is newer than it was read
        where = request.where if request.said["RECIPE"] else request.where[:4]  # else it is looked for
        words = _quoted([*where, *(w for name in ("revision", "base") for w in _option(request, name))])
        lines += [
            f"{root}/.inputs/rules.mk: {root}/{IDENTIFIED}",
            "\t@touch $@",
            f"{root}/{IDENTIFIED}: {root}/.inputs/asked | $(READY)",
            f"\t@$(call RUN,plan) -m pipeline.identify {words}",
            "",
        ]
    proof = f"{root}/.inputs/rendered"
    if choice.bundles:  # a template that no bundle can have is refused before hours of work
        words = _quoted([*request.where, *_option(request, "towers")])
        command = f"$(call RUN,template) -m pipeline.template {words}"
        lines += [f"{proof}: {root}/fetch/manifest.json | $(READY)", f"\t@{command}", "\t@touch $@", ""]
    lines += [f"{_LIBRARIES}: web/package-lock.json", f"\t@{_NPM}", "\t@touch $@", ""]
    for name, node in STAGES.items():
        before = [f"{root}/.inputs/{name}", *(f"{root}/{need}/manifest.json" for need in makeable(name, choice))]
        places = [word for place in node.places for word in _option(request, place)]
        words = _quoted([*request.where, *request.words(name), *places])
        first = f" {proof}" if choice.bundles and name != "fetch" else ""
        first += f" {_LIBRARIES}" if node.sources else ""
        first += " .venv-vision/.ready" if name == "golden" and eyes else ""  # what the reference sees by
        lines += [
            f"{name}: {root}/{name}/manifest.json",
            f"{root}/{name}/manifest.json: {' '.join(before)} | $(READY) {plan}{first}",
            f"\t$(call RUN,{name}) -m pipeline.{node.module} {words}",
        ]
    return "\n".join(lines) + "\n"


def _containers(request: Request) -> Iterator[str]:
    """A variable per stage and command: how it runs in the container, which may be the one that Make is in."""
    mounts, said = _mounts(request) if request.docker else [], request.said
    online = {
        "upload",
        "job",
        *(["fetch", "plan"] if request.online else []),
        *(["check"] if said["CHECKS_HUB"] else []),
    }
    for name in (*STAGES, *_COMMANDS):
        inside = "" if name in online else container.INSIDE
        how = container.command(name, said, mounts, online=name in online) if request.docker else inside
        yield f"IN_CONTAINER.{name} := {_escaped(how)}"


def _option(request: Request, name: str) -> list[str]:
    return [f"--{name}", request.settings[name]] if request.settings.get(name) else []


def _plan_words(request: Request) -> list[str]:
    options = [word for name in ("revision", "base", "graphs", "towers") for word in _option(request, name)]
    return [*request.where, *options, "--stages", *request.planned]


def _mounts(request: Request) -> list[str]:
    """What a stage in the container reads, at the path that it has here; a recipe's texts in the project."""
    texts = [request.text(kind) for kind in ("verification", "calibration")]
    own = [request.settings[name] for name in _FILES if request.settings.get(name)]
    linked = {file.resolve().parent for folder in request.folders for file in folder.iterdir()}
    read = {request.recipe.absolute(), *map(Path, own), *(Path(text) for text in texts if Path(text).is_absolute())}
    read |= {*request.folders, *linked}
    if odd := [path for path in read if ":" in str(path) or not str(path).isprintable()]:
        raise UsageError(f"{str(odd[0])!r} can't be mounted into a container", remedy="rename that folder, or copy it")
    mounts = [f"{path}:{path}:ro" for path in sorted(read)]
    mounts += [f"{PROJECT / text}:/app/{text}:ro" for text in dict.fromkeys(texts) if not Path(text).is_absolute()]
    return [word for mount in mounts for word in ("-v", mount)]


def _quoted(words: Iterable[str]) -> str:
    """`words` for a shell, in a file that Make reads.

    A variable ends at a `#`, also behind a backslash of the value, and a command keeps the backslash before one.
    """
    return _escaped(shlex.join(words))


def _escaped(command: str) -> str:
    return command.replace("$", "$$").replace("#", "$(HASH)")


def _plain(name: str, value: str, special: str = _SPECIAL) -> str:
    """`value`, which becomes part of Make's targets and of paths in commands.

    Raises:
        UsageError: it holds what Make or a shell would take for more than a name.
    """
    odd = sorted({sign for sign in value if sign in special or sign.isspace() or not sign.isprintable()})
    odd += [sign for sign in value[:1] if sign in _LEADING]
    if odd or not value:
        signs = " ".join(map(repr, odd)) if value else "nothing in it"
        raise UsageError(
            f"{name} is {value!r}, with {signs}: Make can't tell such a name from its own signs",
            remedy=f"rename the folder or file, or copy it, and set {name}= to that",
        )
    return value


def _check_words(said: Mapping[str, str]) -> None:
    """Refuse settings of a few words that are another one."""
    if said["GRAPHS"] not in ("", *get_args(Graphs)):
        raise UsageError(f"GRAPHS={said['GRAPHS']} is unknown: step, bundle or all")
    if said["TOWERS"] not in ("", *get_args(Towers)):
        raise UsageError(
            f"TOWERS={said['TOWERS']} is unknown: none, vision, audio, or vision,audio",
        )
    if said["IN"] not in ("", "docker", "image"):
        raise UsageError(f"IN={said['IN']} is unknown: leave it out, or IN=docker")
    if said["CONTEXT"] and "job" in said["GOALS"].split():
        raise UsageError("a job has the recipes of its image, and no CONTEXT=", remedy="leave one of them out")
    if said["CONFIRM"] not in ("", "yes") or (said["CONFIRM"] and not (said["HF_REPO"] or said["SPACE"])):
        raise UsageError(
            f"CONFIRM={said['CONFIRM']} is unknown: CONFIRM=yes, together with HF_REPO=owner/name or SPACE=owner/name"
        )
    if said["SPACE"] and said["HF_REPO"]:
        raise UsageError(
            "SPACE= and HF_REPO= are two repositories, each with a commit and a receipt of its own",
            remedy="say `make publish` twice, with one of them each",
        )
    if said["IN"] and (said["SPACE"] or {"page", "space"} & set(said["GOALS"].split())):
        raise UsageError(
            "the container holds no page and no Node.js",
            remedy="say it again without IN=docker, on what IN=docker made",
        )
    if said["CLUSTER"]:
        parallel.local_workers(said["CLUSTER"])
    if said["CLUSTER"] and said["IN"] == "docker":
        raise UsageError(
            "a stage in the container has no network, and so no CLUSTER=",
            remedy="say it again without IN=docker, with workers of the same commit and lock",
        )
    if said["IN"] and said["SIGNS"]:
        raise UsageError(
            "the container neither signs nor checks signatures",
            remedy="say it again on the host, without IN=docker, on what the container made",
        )


def ask(said: Mapping[str, str]) -> Request:
    """The request that Make's settings are, by their names there.

    Raises:
        UsageError: a name or a setting that can't work, or a recipe that is none.
    """
    for name in ("MODEL_ID", "ARTIFACTS"):
        _plain(name, said[name])
    if said["RECIPE"]:
        _plain("RECIPE", said["RECIPE"])
    if Path(said["MODEL_ID"]).is_dir():
        _plain("the folder that MODEL_ID leads to", str(Path(said["MODEL_ID"]).resolve()))
        if not model_name(said["MODEL_ID"]):
            raise UsageError(f"MODEL_ID is {said['MODEL_ID']!r}, a folder without a name to keep its results by")
    _check_words(said)
    model_root(Path(said["ARTIFACTS"]), said["MODEL_ID"])
    variants = tuple(dict.fromkeys(said["VARIANTS"].split()))
    if unknown := [name for name in variants if name not in STEPS]:
        raise UsageError(f"VARIANTS names {', '.join(unknown)}; step graphs are {', '.join(STEPS)}")
    settings = {name.lower().replace("_", "-"): value for name, value in said.items()}
    files = {name: str(Path(settings[name]).absolute()) for name in _FILES if settings[name]}
    if (base := settings.get("base", "")) and Path(base).is_dir():
        files["base"] = str(Path(base).resolve())

    file = Path(said["RECIPE"]) if said["RECIPE"] else DEFAULT
    request = Request(
        model_id=said["MODEL_ID"],
        artifacts=Path(said["ARTIFACTS"]),
        recipe=_shown(file),
        choice=_choice(file, said["GRAPHS"], variants or None, said["TOWERS"]),
        settings={**settings, **files},
        goals=tuple(said["GOALS"].split()),
        said=said,
    )
    _plain("the folder of the results", str(request.root), _SPECIAL + "=")  # `a=b: c` is a variable for Make
    for folder in request.folders:
        refuse_within(request.root, folder)
    return _with_towers(_with_recipe(request, said), said)


def _choice(file: Path, graphs: str, variants: tuple[str, ...] | None, towers: str) -> Choice:
    recipe = load(file)
    kind, taken = cast(Graphs, graphs or recipe.graphs), cast(Towers, towers or "none")
    return Choice(recipe=recipe, graphs=kind, variants=variants, towers=taken)


def _with_recipe(request: Request, said: Mapping[str, str]) -> Request:
    """`request` with the shipped recipe for the checkpoint's type; if that is not known yet, it `looks` first.

    With a recipe of one's own it looks for the towers alone, where that recipe takes any.
    """
    asked = request.root / ".inputs" / "asked"
    asked.parent.mkdir(parents=True, exist_ok=True)
    _rewrite(asked, shlex.join(request.asked) + "\n")
    known, own = _known(request, asked), Path(said["RECIPE"]) if said["RECIPE"] else None
    file = _with_context(own or (named_in(known) if known else None) or DEFAULT, request.root, said["CONTEXT"])
    settled = bool(own) and (bool(said["TOWERS"]) or not request.choice.recipe.towers.taken)
    asks = not known and not settled and not {*request.goals} <= _WITHOUT_RECIPE
    shows = asks and bool({*"nqt"} & {*said.get("FLAGS", "")})  # Make would look all the same
    if shows:
        kind = f"what type {request.model_id} is of is not known yet: shown as for {file.stem}"
        kind = f"whether {request.model_id} sees or hears is not known yet: shown as for text" if own else kind
        sys.stderr.write(f"warning: {kind}\n")
    if asks and not shows:  # a note that Make would take as it is, though it does not say enough
        (request.root / IDENTIFIED).unlink(missing_ok=True)
    choice = _choice(file, said["GRAPHS"], request.choice.variants, said["TOWERS"])
    return replace(request, recipe=_shown(file), choice=choice, looks=asks and not shows)


def _with_context(file: Path, root: Path, positions: str) -> Path:
    """The recipe in `file`, or a copy among what the stages are made from, with the cache that CONTEXT= asks for."""
    if not positions:
        return file
    copy = root / ".inputs" / f"{file.stem}-{positions}.toml"
    _rewrite(copy, with_context(file, positions))
    return copy


def _with_towers(request: Request, said: Mapping[str, str]) -> Request:
    """`request` with the towers that its recipe takes and the checkpoint has, where TOWERS= says nothing.

    `none` is what stages are told where there are none, which is nothing: else all would be made again.
    """
    if said["TOWERS"] == "none":
        return replace(request, settings={**request.settings, "towers": ""})
    taken = request.choice.recipe.towers.taken if request.choice.graphs != "step" else ()
    known = None if said["TOWERS"] or not taken else _known(request, request.root / ".inputs" / "asked")
    found: tuple[str, ...] = ()
    if known and known.name == CONFIG:
        found = senses.of_folder(known.parent, taken)
    elif known:
        named = json.loads(known.read_text(encoding="utf-8")).get("towers", ())
        found = tuple(tower for tower in taken if tower in named)
    if not found:
        return request
    towers = ",".join(found)
    choice = replace(request.choice, towers=cast(Towers, towers))
    return replace(request, choice=choice, settings={**request.settings, "towers": towers})


def _known(request: Request, asked: Path) -> Path | None:
    """The file that says of which type the checkpoint is, or None if somebody has to look.

    What was looked up or fetched counts while the same thing is asked for, by Make's own rule.
    """
    folder, fetched = request.folder, request.root / "fetch"
    if folder and ((folder / CONFIG).is_file() or not (folder / _ADAPTER).is_file()):
        return folder / CONFIG
    identified, since = request.root / IDENTIFIED, asked.stat().st_mtime_ns
    notes = {identified: identified, fetched / NAME: fetched / "checkpoint" / CONFIG}
    found = (said for note, said in notes.items() if note.is_file() and note.stat().st_mtime_ns >= since)
    return next((said for said in found if said.name == CONFIG or _says_towers(said)), None)


def _says_towers(note: Path) -> bool:
    """Whether a note of `identify` says which towers there are; older ones do not."""
    with suppress(ValueError, TypeError):
        return "towers" in json.loads(note.read_text(encoding="utf-8"))
    return False


def _rewrite(file: Path, text: str) -> None:
    """Write `text` to `file` if it says something else, so that Make sees what changed and nothing more."""
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        write_atomically(file, text)


def write(request: Request) -> Path:
    """Write what changed of `.inputs/` and return the file for Make."""
    folder = request.root / ".inputs"
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / "rules.mk"
    for file, text in [*((folder / name, record(request, name)) for name in STAGES), (made, rules(request))]:
        _rewrite(file, text)
    return made


def _told_by_the_environment(said: Mapping[str, str]) -> str:
    """A sentence about settings that nobody gave to this call: a stranger's program may use such a name too."""
    own = {"IN", "ARTIFACTS"} if said["IN"] == "image" else set()  # the image itself sets these
    own |= {"PYTHONHASHSEED", "OMP_WAIT_POLICY", "SOURCE_DATE_EPOCH"}  # which make hands to a make that it calls
    names = " ".join(name for name in said.get("ENVIRONMENT", "").split() if name not in own)
    told = f"warning: the environment has what is a setting here: {names} (`env -u NAME make …` leaves one out)\n"
    return told if names else ""


def main(argv: Sequence[str]) -> int:
    """Print the path of the rules for settings given as NAME=value; what is wrong goes to the standard error."""
    said = dict(word.split("=", 1) for word in argv)
    sys.stderr.write(_told_by_the_environment(said))
    try:
        sys.stdout.write(f"{write(ask(said))}\n")
    except PipelineError as error:
        sys.stderr.write("\n".join(error.lines()) + "\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
