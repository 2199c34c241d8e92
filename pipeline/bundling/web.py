"""What a browser gets of a bundle: the page in web/, its libraries, and what they have to know of the model.

The page runs the bundle's sections in LiteRT.js as `runtime/sections.py` does in the interpreter. It renders prompts by
the checkpoint's own template, in @huggingface/jinja, which is made for templates of the Hub and lacks arguments of
`trim` that the bundle's rewritten template has (0.5.11). Both templates give the text that transformers gives: stage
bundle proves its own, `prove` this one.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import chain, cycle, islice
from pathlib import Path

from pipeline.bundling.metadata import Described, template_source
from pipeline.bundling.template import Message, wanted
from pipeline.core import process
from pipeline.core.errors import BundleError, UsageError
from pipeline.core.manifest import FileRecord
from pipeline.core.recipe import PROJECT

SOURCES = PROJECT / "web"
LOADED = (
    "index.html",
    "style.css",
    "icon.svg",
    "app.js",
    "engine.js",
    "files.js",
    "gpu.js",
    "needs.js",
    "text.js",
    "worker.js",
)
"""What a browser loads of web/, beside `sw.js`, which keeps it."""
_NOT_LOADED = ("sw.js", "_headers")
_LIBRARIES = {
    "vendor/litert.js": "@litertjs/core/dist/index.js",
    "vendor/wasm-utils.js": "@litertjs/wasm-utils/dist/index.js",
    "vendor/jinja.js": "@huggingface/jinja/dist/index.js",
    "vendor/tokenizers.js": "@huggingface/tokenizers/dist/tokenizers.min.mjs",
    "fonts/tifinagh.woff2": "@fontsource/noto-sans-tifinagh/files/noto-sans-tifinagh-tifinagh-400-normal.woff2",
    **{
        f"wasm/litert_wasm_{kind}internal.{suffix}": f"@litertjs/core/wasm/litert_wasm_{kind}internal.{suffix}"
        for kind in ("", "compat_", "threaded_", "jspi_")
        for suffix in ("js", "wasm")
    },
}
"""Files of npm packages by where they stand in the page's folder."""
_BARE, _BESIDE = '"@litertjs/wasm-utils"', '"./wasm-utils.js"'
"""What LiteRT.js imports (2.5.3), which a worker can't look up: import maps hold for documents alone."""
_RUNTIME_BYTES = 48_000_000
_SECTION_COPIES, _CACHE_COPIES = 4, 3
"""Of their bytes in memory: the file, and its weights as XNNPACK lays them out for each signature; a cache that is
read, one that is written, and one while they change hands. While sliding layers kept all positions, Gemma 3 270M took
1.51 GB of 1.59 by this, the shipped model 87 MB of 91.
"""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What the page says of the model: where it is from, and the checks that its files passed.

    `kld` is how far the recipe lets the bundle be from Hugging Face, in nats: a GPU may be as far from what was judged.
    """

    name: str
    model: str
    revision: str
    checks: int
    kld: float


def require_libraries(source: Path = SOURCES) -> dict[str, str]:
    """The versions of the page's libraries, by package.

    Raises:
        UsageError: they are not installed as the lock says.
    """
    if not (source / "package-lock.json").is_file():
        raise UsageError(
            f"{source} is missing", cause="the container holds no page", remedy="run `make page` without IN=docker"
        )
    modules, lock = source / "node_modules", json.loads((source / "package-lock.json").read_text(encoding="utf-8"))
    names = {"/".join(path.split("/")[:2]) for path in _LIBRARIES.values()}
    versions = {name: str(lock["packages"][f"node_modules/{name}"]["version"]) for name in sorted(names)}
    for name, version in versions.items():
        file = modules / name / "package.json"
        found = json.loads(file.read_text(encoding="utf-8"))["version"] if file.is_file() else "nothing"
        if found != version:
            raise UsageError(
                f"{file.parent} holds {found}, web/package-lock.json wants {name} {version}",
                cause="the page's libraries are not installed, or the lock has changed since",
                remedy="run `npm ci --prefix web` (Node.js 20.19 or later), or `make page`, which does",
            )
    return versions


def place_page(target: Path, source: Path = SOURCES) -> None:
    """Put the page, its libraries and their licences into the folder `target`.

    Raises:
        BundleError: LiteRT.js is another one than this was written for.
    """
    for name in (*LOADED, *_NOT_LOADED):
        shutil.copyfile(source / name, target / name)
    for name, path in _LIBRARIES.items():
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / "node_modules" / path, target / name)
    main = target / "vendor/litert.js"
    text = main.read_text(encoding="utf-8")
    if text.count(f"from {_BARE}") != 1:
        raise BundleError(
            f"@litertjs/core imports {_BARE} in another way than 2.5.3",
            cause="the lock in web/ has another version",
            remedy="look at its dist/index.js, and mend pipeline/bundling/web.py",
        )
    main.write_text(text.replace(f"from {_BARE}", f"from {_BESIDE}"), encoding="utf-8")
    _place_licences(target / "licences", source / "node_modules")


def _place_licences(target: Path, modules: Path) -> None:
    target.mkdir()
    rows = ["# Libraries of this page\n"]
    for name in sorted({"/".join(path.split("/")[:2]) for path in _LIBRARIES.values()}):
        said = json.loads((modules / name / "package.json").read_text(encoding="utf-8"))
        changed = ", with one import renamed" if name == "@litertjs/core" else ""
        rows.append(f"- {name} {said['version']}, {said['license']}{changed}")
        for file in (modules / name).glob("LICENSE*"):
            shutil.copyfile(file, target / f"{name.replace('/', '-').removeprefix('@')}.txt")
    shutil.copyfile(PROJECT / "LICENSE", target / "Apache-2.0.txt")
    (target / "README.md").write_text("\n".join(rows) + "\n", encoding="utf-8")


def chat(described: Described) -> dict[str, object]:
    """The checkpoint's template (empty without one), its named tokens, and the id that prompts begin with, if any."""
    named = described.tokenizer.special_tokens_map
    return {
        "template": template_source(described.tokenizer.chat_template),
        "tokens": {name: token for name, token in named.items() if isinstance(token, str)},
        "start": described.metadata.start,
    }


def describe(described: Described, judged: Judged, files: Mapping[str, FileRecord], cache: int) -> dict[str, object]:
    """What page.json says.

    Args:
        described: the bundle's metadata.
        judged: what the page tells people.
        files: the records of the sections, by section, of the tokenizer and of what is recorded; paths in the page.
        cache: bytes of the KV cache.
    """
    metadata = described.metadata
    sizes = sum(record.size for name, record in files.items() if name in metadata.sections)
    return {
        "name": judged.name,
        "model": judged.model,
        "revision": judged.revision,
        "verdict": {"passed": True, "checks": judged.checks},
        "kld": judged.kld,
        "files": {
            name: {"path": record.path, "size": record.size, "sha256": record.sha256} for name, record in files.items()
        },
        "memory": _RUNTIME_BYTES + _SECTION_COPIES * sizes + _CACHE_COPIES * cache,
        "chat": chat(described),
        "stop": list(metadata.stop),
        "max_tokens": metadata.max_tokens,
        "sampler": {
            "top_k": metadata.sampler.top_k,
            "top_p": metadata.sampler.top_p,
            "temperature": metadata.sampler.temperature,
        },
    }


def prove(page: Path, described: Described) -> int:
    """Render conversations as the page in the folder `page` does, and return how many there were.

    Raises:
        BundleError: the page's template engine or tokenizer gives something else than transformers.
        UsageError: there is no Node.js.
    """
    cases = _cases(described)
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as stream:
        json.dump([asdict(case) for case in cases], stream)
        stream.flush()
        answer = process.output(["node", str(SOURCES / "prove.mjs"), str(page), stream.name])
    if answer is None:
        raise UsageError(
            "the page's template could not be tried",
            cause="there is no `node` on the path, or it is older than 20.19",
            remedy="install Node.js 20.19 or later",
        )
    if answer:
        raise BundleError(
            f"in a browser a prompt is another one than in transformers: {answer}",
            cause="the template or the tokenizer uses what the page's libraries lack",
            remedy="run the bundle elsewhere (`make chat`), or take what they lack out of the template (TEMPLATE=)",
        )
    return len(cases)


@dataclass(frozen=True)
class _Case:
    """A conversation, its prompt and the prompt's tokens, as transformers has them; without a template a bare text."""

    messages: list[Message] | None
    prompt: str
    ids: list[int]


def _cases(described: Described) -> list[_Case]:
    tokenizer = described.tokenizer
    source = template_source(tokenizer.chat_template)
    texts = [text for _, text in wanted(source, tokenizer)] if source else ["Azul, 你好, مرحبا 👩🏽‍🚀", " a  b\n"]
    talks = [list(talk) for talk, _ in wanted(source, tokenizer)] if source else [None] * len(texts)
    return [
        _Case(talk, text, tokenizer(text, add_special_tokens=False)["input_ids"])
        for talk, text in zip(talks, texts, strict=True)
    ]


def token_ids(described: Described, count: int) -> list[int]:
    """`count` tokens of conversations, one behind the other, and those again where they do not suffice."""
    return list(islice(cycle(chain.from_iterable(case.ids for case in _cases(described))), count))


def list_files(target: Path) -> list[str]:
    """Write files.json, the paths that the service worker keeps, and return them."""
    kept = [name for name in LOADED if name != "index.html"]
    kept += [name for name in _LIBRARIES if not name.startswith("wasm/")] + ["page.json", "report.html"]
    (target / "files.json").write_text(json.dumps(sorted(kept), indent=1) + "\n", encoding="utf-8")
    return kept


def space_card(name: str, licence_files: Iterable[str]) -> str:
    """README.md of a static Space, whose front matter has the headers that threads need."""
    terms = ", ".join(f"[{file}]({file})" for file in licence_files)
    return f"""\
---
title: {json.dumps(name)}
sdk: static
app_file: index.html
custom_headers:
  cross-origin-embedder-policy: require-corp
  cross-origin-opener-policy: same-origin
  cross-origin-resource-policy: same-origin
---

# {name}, in a browser

`index.html` runs the model in the visitor's browser; nothing that is written there is sent. Open the page at its own
address, not in a frame: only there can it use threads. [The report](report.html) says how the files were judged.
Libraries and their licences: [licences](licences/README.md). {f"The model's terms: {terms}." if terms else ""}
"""
