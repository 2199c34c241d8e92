"""LiteRT-LM's own command line, and OpenAI's client against its server, say what verify and the API have heard.

In an environment of its own, which `nox -s clients` makes: the runtime as people install it, and nothing of this
project's. `WORDS` names what `tools/clients.py` wrote, `BUNDLE` the file, `LITERT_LM` the command.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

openai: Any = pytest.importorskip("openai")
STYLE = re.compile(r"\x1b\[[0-9;]*m")
SECONDS = 300


@pytest.fixture(scope="module")
def words() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(os.environ["WORDS"]).read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, beside which the command may leave what it packs."""
    return Path(shutil.copy(os.environ["BUNDLE"], tmp_path_factory.mktemp("bundle") / "int8.litertlm"))


def said(home: Path, *arguments: str) -> str:
    """What the command prints."""
    environment = {**os.environ, "HOME": str(home)}
    command = [os.environ["LITERT_LM"], *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=SECONDS, check=True)
    text = STYLE.sub("", done.stdout)
    assert "error occurred" not in text.lower(), text  # which it says with exit code 0 (0.18.1)
    return text


def test_describe_tells_what_the_bundle_says_of_itself(bundle: Path, tmp_path: Path) -> None:
    rows = dict(re.findall(r"^  ([^:\n]+): +(.+)$", said(tmp_path, "describe", str(bundle)), flags=re.MULTILINE))
    assert rows["Input Modalities"] == "Text" and rows["Text Default Backend"] == "CPU"
    assert rows["Max Context Tokens"] == "3969" and rows["Sampler Top K"] == "1"


def test_run_continues_a_bare_prompt_as_verify_heard(bundle: Path, words: dict[str, Any], tmp_path: Path) -> None:
    assert len(words["continued"]) >= 16
    for row in words["continued"]:
        text = said(tmp_path, "run", str(bundle), "--no-template", "--top-k", "1", "--prompt", row["prompt"])
        assert text.startswith(row["text"]), row["prompt"]  # verify stops after so many tokens


def test_run_answers_as_the_api_does(bundle: Path, words: dict[str, Any], tmp_path: Path) -> None:
    first = [row for row in words["answered"] if len(row["messages"]) == 1]
    assert len(first) >= 8 and all(row["ended"] for row in first)
    for row in first:
        text = said(tmp_path, "run", str(bundle), "--top-k", "1", "--prompt", row["messages"][0]["content"])
        assert text == row["text"] + "\n"


def test_benchmark_runs_to_its_end(bundle: Path, tmp_path: Path) -> None:
    text = said(tmp_path, "benchmark", str(bundle), "--prefill-tokens", "64", "--decode-tokens", "16")
    for what in ("Prefill", "Decode"):
        assert float(re.findall(rf"{what} speed: +([0-9.]+) tokens/s", text)[0]) > 0


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """OpenAI's client of `litert-lm serve`, on loopback."""
    home = tmp_path_factory.mktemp("home")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    command = [os.environ["LITERT_LM"], "serve", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, env={**os.environ, "HOME": str(home)}, stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + SECONDS
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert server.poll() is None and time.monotonic() < until, "the server did not start"
            time.sleep(0.1)
        # A key is sent in any case; the server asks for none.
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=SECONDS, max_retries=0)
    finally:
        server.terminate()
        server.wait(timeout=30)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_openais_client_hears_the_same_words(client: Any, bundle: Path, words: dict[str, Any], stream: bool) -> None:
    assert any(len(row["messages"]) > 1 for row in words["answered"])
    for row in words["answered"]:
        answer = client.chat.completions.create(
            model=str(bundle), messages=row["messages"], stream=stream, extra_body={"top_k": 1}
        )
        if stream:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in answer if chunk.choices)
        else:
            text = answer.choices[0].message.content
        assert text == row["text"] if row["ended"] else text.startswith(row["text"]), row["messages"]
