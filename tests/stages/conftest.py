"""The shipped model, taken through the stages once per test run, and a Hub on this machine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import constants
from line import Line, shared

from pipeline import bundle, fetch, fp16, fp32, golden, graph, int8
from pipeline.release import hub

LONG = ("bundle", "decoder", "tune", "verify", "interrupted", "step", "out_of_core", "check", "upload")
"""Files that take longest, by what follows `test_`."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the longest files come first: at the end no process waits long for the other one."""
    order = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Line:
    """fetch and golden, with the small recipe."""

    def make(line: Line) -> None:
        assert line.run(fetch.STAGE) == 0
        assert line.run(golden.STAGE, "--device", "cpu") == 0

    return shared(tmp_path_factory, "judged", make)


@pytest.fixture(scope="session")
def built(judged: Line, tmp_path_factory: pytest.TempPathFactory) -> Line:
    """The same with the graphs, fp32, fp16, int8 and the bundles."""

    def make(line: Line) -> None:
        for stage in ("fetch", "golden"):
            shutil.copytree(judged.root / stage, line.root / stage, symlinks=True)
        for stage in (graph.STAGE, fp32.STAGE, fp16.STAGE, int8.STAGE, bundle.STAGE):
            assert line.run(stage) == 0

    return shared(tmp_path_factory, "built", make)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A running Hub that the client is pointed at, without a token and with short waits."""
    monkeypatch.setattr(hub, "WAITS", (0.01, 0.01, 0.01))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with HubServer() as made:
        monkeypatch.setenv("HF_ENDPOINT", made.endpoint)
        yield made
