"""What goes wrong in the toolchain without our rules. A test here that fails means upstream has mended it: delete ours.

Seen in litert-torch 0.10.0 with torch 2.13.0 and transformers 5.24.0.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from litert_torch import convert, fx_infra
from litert_torch.backend.debuginfo import _build

from pipeline.core.recipe import PROJECT
from pipeline.export import decompose, export, lowering
from pipeline.export.operators import Embedding, Linear, gather, matmul, normalise, update
from pipeline.runtime.litert import litert
from pipeline.tflite.graph import Graph

Compute = Callable[..., torch.Tensor]
Decomposing = Callable[[], AbstractContextManager[None]]
S = torch.export.Dim("s", min=1, max=64)
B = torch.export.Dim("b", min=1, max=8)


class Wrapped(torch.nn.Module):
    def __init__(self, compute: Compute) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.compute(x)}


def run(
    compute: Compute, shape: tuple[int, ...], folder: Path, decomposing: Decomposing = decompose.by_node
) -> tuple[np.ndarray, np.ndarray]:
    """`compute` converted with unknown first two dimensions, run at another shape; and what PyTorch gives."""
    module, example = Wrapped(compute).eval(), torch.randn(2, 32, *shape)
    with lowering.dynamic_shapes(), decomposing():
        convert(module, (example,), dynamic_shapes=({0: B, 1: S},)).export(str(folder / "y.tflite"))
    x = torch.randn(3, 7, *shape)
    got = litert(folder / "y.tflite", xnnpack=True, threads=1).get_signature_runner()(args_0=x.numpy())["y"]
    with torch.no_grad():
        return got, module(x)["y"].numpy()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


USED: dict[str, Compute] = {
    "tanh": torch.tanh,
    "sqrt": lambda x: torch.sqrt(x * x + 1),
    "gelu": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "sum": lambda x: torch.sum(x, dim=-1),
    "maximum": lambda x: torch.maximum(x, torch.tensor(0.0)),
    "lt": lambda x: torch.where(torch.lt(x, torch.tensor(0.5)), x, torch.tensor(0.0)),
    "and": lambda x: torch.where(torch.gt(x, torch.tensor(0.0)) & torch.lt(x, torch.tensor(1.0)), x, torch.tensor(0.0)),
    "slice": lambda x: x[:, :, 1:2] * 1.0,
    "cat": lambda x: torch.cat((-x, x), dim=-1),
}


@pytest.mark.parametrize("name", USED)
def test_what_the_graph_modules_use_is_exact(name: str, tmp_path: Path) -> None:
    got, expected = run(USED[name], (6,), tmp_path)
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("compute", [torch.relu, lambda x: torch.where(x < 0.5, x, torch.tensor(0.0))])
def test_what_the_graph_modules_avoid_does_not_convert(compute: Compute, tmp_path: Path) -> None:
    """relu and a comparison with a number: written as maximum and a comparison with a tensor."""
    with pytest.raises(Exception):  # noqa: B017 - the kind of error is upstream's affair
        run(compute, (6,), tmp_path, nullcontext)


def test_our_operators_are_exact(tmp_path: Path) -> None:
    linear, other, weight = Linear(6, 5), torch.randn(6, 4), torch.randn(6)
    for compute in (
        linear,
        lambda x: matmul(x, other, False),
        lambda x: normalise(x, None, 1e-6),
        lambda x: normalise(x, weight, 1e-6),
    ):
        got, expected = run(compute, (6,), tmp_path)
        np.testing.assert_allclose(got, expected, rtol=2e-6, atol=2e-6)


def test_a_cache_is_written_and_read_where_pytorch_does(tmp_path: Path) -> None:
    """A part that would not fit is moved back when written; places in a ring are counted from its front."""

    class Cache(torch.nn.Module):
        def forward(self, x: torch.Tensor, part: torch.Tensor, start: torch.Tensor) -> dict[str, torch.Tensor]:
            zero, index = torch.zeros(1, dtype=torch.int32), torch.arange(0, 9, dtype=torch.int32)
            turned = gather(x, torch.remainder(index - start, 9), 1)
            return {"written": update(x, part, torch.cat([zero, start, zero])), "turned": turned}

    module = Cache().eval()
    x, part = torch.randn(2, 9, 5), torch.randn(2, 3, 5)
    with lowering.dynamic_shapes(), decompose.by_node():
        convert(module, (x, part, torch.zeros(1, dtype=torch.int32))).export(str(tmp_path / "y.tflite"))
    for xnnpack in (True, False):
        runner = litert(tmp_path / "y.tflite", xnnpack=xnnpack, threads=1).get_signature_runner()
        for start in (0, 1, 6, 7, 8, 100):
            at = torch.tensor([start], dtype=torch.int32)
            got, expected = runner(args_0=x.numpy(), args_1=part.numpy(), args_2=at.numpy()), module(x, part, at)
            for name in ("written", "turned"):
                np.testing.assert_array_equal(got[name], expected[name].numpy(), err_msg=f"{name} at {start}")


def test_the_shapes_of_a_model_are_known_without_torchs_compiler() -> None:
    """Initial values on the meta device would import it, in every stage that asks for tensors."""
    code = (
        "import sys, json; from pathlib import Path; from pipeline.models import architecture_for; "
        "architecture_for(json.loads(Path('examples/tiny-gemma3n/config.json').read_text())).tensors(); "
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=False).returncode == 0


def test_linear_with_bias_is_pytorchs() -> None:
    ours, theirs = Linear(6, 5), torch.nn.Linear(6, 5)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 1, 6)
    torch.testing.assert_close(ours(x), theirs(x))


def test_embedding_is_pytorchs() -> None:
    ours, theirs = Embedding(9, 4), torch.nn.Embedding(9, 4)
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(0, 9, (2, 3), dtype=torch.int32)
    torch.testing.assert_close(ours(ids), theirs(ids))


def test_in_place_update_of_a_slice_is_lowered_wrongly(tmp_path: Path) -> None:
    """transformers' decoder layer has it: `corrected[1:] += first_prediction`. Here it is a product with 0 and 1."""

    def update(x: torch.Tensor) -> torch.Tensor:
        y = x * 2.0
        y[:, :, 1:] += 1.0
        return y

    assert wrong(update, (3,), tmp_path)


def test_negative_index_is_lowered_wrongly(tmp_path: Path) -> None:
    """Here the last position is taken by a product with a one-hot row."""
    assert wrong(lambda x: x[:, -1, :] * 1.0, (3,), tmp_path)


def wrong(compute: Compute, shape: tuple[int, ...], folder: Path) -> bool:
    """Whether the lowering fails or gives other numbers than PyTorch."""
    try:
        got, expected = run(compute, shape, folder, nullcontext)
    except Exception:  # noqa: BLE001 - any failure of upstream's counts
        return True
    return got.shape != expected.shape or not np.allclose(got, expected, atol=1e-4)


def test_one_tensor_given_twice_becomes_one_input() -> None:
    """torch.export takes the same tensor given for two inputs as one: the mask would be the token ids."""

    class Difference(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x - y

    same = torch.ones(2, 3)
    program = torch.export.export(Difference(), (same, same)).module()
    assert float(program(torch.ones(2, 3), torch.zeros(2, 3)).abs().max()) != 1.0


def reshaped_and_not() -> Graph:
    """Rows d as [1, 60] and as [1, 1, 1, 60], read in turns: d + d (d² + 2)."""
    graph = Graph.empty()
    ids, rows = graph.add_tensor("ids", "INT32", (1,)), graph.add_tensor("rows", "FLOAT32", (1, 60))
    table = graph.add_constant(np.arange(120, dtype=np.float32).reshape(2, 60), "table")
    two = graph.add_constant(np.array(2, np.float32), "two")
    shape = graph.add_constant(np.array([1, 1, 1, 60], np.int32), "shape")
    doubled = graph.add_tensor("doubled", "FLOAT32", (1, 60))
    reshaped, square, sum_, product, total = (graph.add_tensor(name, "FLOAT32", (1, 1, 1, 60)) for name in "rsupt")
    graph.main.inputs, graph.main.outputs = [ids], [total]
    graph.main.operators = [
        graph.operator("EMBEDDING_LOOKUP", [ids, table], [rows]),
        graph.operator("MUL", [rows, two], [doubled]),
        graph.operator("RESHAPE", [doubled, shape], [reshaped]),
        graph.operator("MUL", [doubled, reshaped], [square]),
        graph.operator("ADD", [square, two], [sum_]),
        graph.operator("MUL", [doubled, sum_], [product]),
        graph.operator("ADD", [doubled, product], [total]),
    ]
    graph.add_signature("s", {"ids": ids}, {"total": total})
    return graph


def test_a_reshaped_tensor_is_overwritten_by_the_built_in_kernels(tmp_path: Path) -> None:
    """Here sums and products read the reshaped one alone."""
    graph, found = reshaped_and_not(), []
    for file in (tmp_path / "mixed.tflite", tmp_path / "tidied.tflite"):
        graph.write(file)
        runner = litert(file, xnnpack=False, threads=1).get_signature_runner("s")
        found.append(runner(ids=np.ones(1, np.int32))["total"].ravel())
        export._read_reshaped(graph)
    rows = 2.0 * np.arange(60, 120)
    expected = rows + rows * (rows**2 + 2)
    assert not np.allclose(found[0], expected), "upstream has mended it"
    np.testing.assert_allclose(found[1], expected, rtol=1e-6)


class Mixed(torch.nn.Module):
    """Each kind of node: composite, in a table, a composite of litert-torch's, of an unknown size, ours, a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.up = Linear(6, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        places = torch.arange(0, x.shape[1], dtype=torch.int32).to(torch.float32)[None, :, None]
        y = torch.nn.functional.gelu(self.up(x.transpose(0, 1).transpose(0, 1)), approximate="tanh")
        y = torch.softmax(y.reshape(x.shape[0], x.shape[1], 4) * 0.5, dim=-1)
        return {"rows": torch.maximum(y, torch.tensor(0.1)) + places, "x": normalise(x, None, 1e-6)}


@pytest.mark.parametrize("dynamic", [False, True])
def test_decomposing_by_node_writes_the_same_file_in_one_trace(
    dynamic: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traces: list[str] = []
    traced = torch.export.ExportedProgram.run_decompositions

    def counted(*args: Any, **kwargs: Any) -> Any:
        traces.append(folder)
        return traced(*args, **kwargs)

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", counted)
    module, written = Mixed().eval(), {}
    kinds: dict[str, Decomposing] = {"ours": decompose.by_node, "theirs": nullcontext}
    for folder, decomposing in kinds.items():
        with lowering.dynamic_shapes(), decomposing():
            shapes = ({0: B, 1: S},) if dynamic else None
            convert(module, (torch.randn(2, 32, 6),), dynamic_shapes=shapes).export(str(tmp_path / folder))
        written[folder] = (tmp_path / folder).read_bytes()
    assert written["ours"] == written["theirs"]
    assert traces == ["theirs"] * 3, "upstream traces less often: is our way still the faster one?"


def test_an_operator_that_writes_to_its_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="writes to its input"):
        run(lambda x: (x * 2.0).add_(1.0), (3,), tmp_path)


def test_nothing_of_the_patches_is_left_behind() -> None:
    before = _build._get_hierarchy
    with lowering.dynamic_shapes():
        assert os.environ["LITERT_TORCH_FULL_TFL_DECOMPS"] == "1"
    with decompose.by_node():
        assert fx_infra.safe_run_decompositions is decompose.decompose
        assert torch.fx.config.do_not_emit_stack_traces
    assert fx_infra.safe_run_decompositions is not decompose.decompose
    assert not torch.fx.config.do_not_emit_stack_traces
    assert _build._get_hierarchy is before
    assert "LITERT_TORCH_FULL_TFL_DECOMPS" not in os.environ
