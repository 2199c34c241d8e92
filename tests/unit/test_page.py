"""The page's folder and its server, without a browser: `nox -s browser` has the rest."""

from __future__ import annotations

import json
import re
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import serve
from pipeline.bundling import web
from pipeline.core.errors import BundleError, ResourceError, UsageError

SOURCES = [file for file in web.SOURCES.glob("*.*") if file.suffix in (".js", ".html", ".css", ".svg")]
LITERT = "@litertjs/core/dist/index.js"


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """web/ with packages that hold next to nothing, of the versions in the lock."""
    copy = tmp_path / "web"
    shutil.copytree(web.SOURCES, copy, ignore=shutil.ignore_patterns("node_modules", "test"))
    lock = json.loads((copy / "package-lock.json").read_text())["packages"]
    for path in web._LIBRARIES.values():
        file = copy / "node_modules" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text('import { a } from "@litertjs/wasm-utils";\n' if path == LITERT else path)
    for place, said in lock.items():
        if (copy / place).is_dir() and place:
            (copy / place / "package.json").write_text(json.dumps({"version": said["version"], "license": "MIT"}))
    return copy


def test_the_lock_has_a_hash_of_every_package_and_names_no_registry() -> None:
    packages = json.loads((web.SOURCES / "package-lock.json").read_text())["packages"]
    wanted = json.loads((web.SOURCES / "package.json").read_text())
    held = {name for name in packages if name}
    assert {f"node_modules/{name}" for name in {**wanted["dependencies"], **wanted["devDependencies"]}} <= held
    for name in held:
        assert packages[name]["integrity"].startswith("sha512-") and "resolved" not in packages[name], name


def test_every_file_of_the_page_is_put_into_the_folder() -> None:
    assert {file.name for file in SOURCES} == {*web.LOADED, "sw.js"}


def test_the_page_may_ask_nobody_but_its_own_host() -> None:
    said = (web.SOURCES / "index.html").read_text()
    policy = dict(row.split(" ", 1) for row in re.findall(r'Policy" content="([^"]*)"', said)[0].split("; "))
    assert policy.pop("default-src") == policy.pop("base-uri") == policy.pop("form-action") == "'none'"
    assert policy.pop("script-src") == "'self' 'wasm-unsafe-eval'"
    assert set(policy.values()) == {"'self'"} and "connect-src" in policy
    addresses = {file.name: re.findall(r"https?://(?!www\.w3\.org/2000/svg)\S+", file.read_text()) for file in SOURCES}
    assert not any(addresses.values()), addresses


def test_libraries_must_be_those_of_the_lock(sources: Path) -> None:
    assert web.require_libraries(sources)["@litertjs/core"] == "2.5.3"
    package = sources / "node_modules/@litertjs/core/package.json"
    package.write_text(json.dumps({"version": "2.5.4"}))
    with pytest.raises(UsageError, match=r"holds 2\.5\.4, web/package-lock\.json wants @litertjs/core 2\.5\.3"):
        web.require_libraries(sources)
    package.unlink()
    with pytest.raises(UsageError, match="holds nothing"):
        web.require_libraries(sources)
    (sources / "package-lock.json").unlink()
    with pytest.raises(UsageError, match="is missing"):
        web.require_libraries(sources)


def test_the_folder_has_page_and_libraries_with_their_licences(sources: Path, tmp_path: Path) -> None:
    target = tmp_path / "page"
    target.mkdir()
    web.place_page(target, sources)
    assert (target / "vendor/litert.js").read_text() == 'import { a } from "./wasm-utils.js";\n'
    assert (target / "app.js").read_bytes() == (web.SOURCES / "app.js").read_bytes()
    assert "@litertjs/core 2.5.3, MIT, with one import renamed" in (target / "licences/README.md").read_text()
    assert all((target / name).is_file() for name in web._LIBRARIES)
    kept = web.list_files(target)
    assert {"page.json", "report.html", "app.js", "vendor/jinja.js"} <= set(kept)
    assert not [name for name in kept if name.startswith(("wasm/", "model/"))]


def test_a_runtime_that_imports_in_another_way_is_refused(sources: Path, tmp_path: Path) -> None:
    (sources / "node_modules" / LITERT).write_text("import a from 'elsewhere';")
    with pytest.raises(BundleError, match="in another way"):
        web.place_page(tmp_path, sources)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The address of a folder with a page's headers."""
    shutil.copyfile(web.SOURCES / "_headers", tmp_path / "_headers")
    (tmp_path / "wasm").mkdir()
    for name in ("index.html", "worker.js", "wasm/a.wasm"):
        (tmp_path / name).write_text(name)
    with serve.server(tmp_path, 0) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_address[1]}"
        made.shutdown()


def test_the_server_sends_what_threads_need(served: str) -> None:
    with urllib.request.urlopen(f"{served}/") as answer:
        assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        assert "Content-Security-Policy" not in answer.headers
    with urllib.request.urlopen(f"{served}/worker.js?x") as answer:
        assert answer.headers["Content-Type"] == "text/javascript"
        assert "connect-src 'self'" in answer.headers["Content-Security-Policy"]
    with urllib.request.urlopen(f"{served}/wasm/a.wasm") as answer:
        assert answer.headers["Content-Type"] == "application/wasm"
        assert answer.headers["Content-Security-Policy"]
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{served}/../noxfile.py")


def test_the_headers_of_a_space_are_those_of_the_server() -> None:
    card = dict(re.findall(r"^  (cross-origin-\S+): (\S+)$", web.space_card("a", ()), flags=re.MULTILINE))
    named = {name.lower(): value for pattern, name, value in serve.headers(web.SOURCES / "_headers") if pattern == "/*"}
    assert card and card == {name: value for name, value in named.items() if name in card}


def test_only_a_page_is_served_and_only_on_a_free_port(tmp_path: Path, served: str) -> None:
    with pytest.raises(UsageError, match="is no page"):
        serve.server(tmp_path / "wasm", 0)
    with pytest.raises(ResourceError, match="can't be had"):
        serve.server(tmp_path, int(served.rpartition(":")[2]))
