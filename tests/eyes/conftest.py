"""The model that sees and hears, whose stages are made once for all tests here."""

from __future__ import annotations

import shutil

import pytest
import whole
from line import Line, shared

from pipeline import bundle, fetch, fp32, golden, graph, int8, towers

CHANGES = {
    # Of a tower with few blocks the third stage is too much to keep.
    r", 'timm_model\.blocks\.2\.[0-8]\.']": "]",
    "ladder = true": "ladder = false",
    "cache_length = 4096": "cache_length = 1024",
}


@pytest.fixture(scope="session")
def line(tmp_path_factory: pytest.TempPathFactory) -> Line:
    """The shipped model with eyes and ears, as far as bundles and what the reference says of it."""

    def make(line: Line) -> None:
        shutil.copytree(whole.TRAINED, line.model)
        for stage in (fetch.STAGE, golden.STAGE, graph.STAGE, towers.STAGE, fp32.STAGE, int8.STAGE, bundle.STAGE):
            assert line.run(stage, *whole.TAKE) == 0

    return shared(tmp_path_factory, "eyes", make, model="eyes", **CHANGES)
