"""Dynamic-shape lowering rules: what litert-torch's native `tfl` decompositions lack for our graphs.

Seen in litert-torch 0.10.0 with torch 2.13.0. The default lowering goes through JAX, which refuses unknown dimensions.
`LITERT_TORCH_FULL_TFL_DECOMPS=1` switches to the decompositions in `litert_torch/backend/experimental/torch_tfl`, which
allow them but cover few operators. `dynamic_shapes()` adds the missing ones for the time of one conversion. Each rule
maps an ATen operator to the TFLite operator of the same meaning, so results are exact.

`tests/stages/test_lowering.py` fails for a rule that upstream has come to cover: then delete it here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from litert_converter.mlir import ir
from litert_torch.backend import inline_consts
from litert_torch.backend.debuginfo import _build
from litert_torch.backend.experimental.torch_tfl import _decomps, _lowerings
from litert_torch.backend.lowerings import registry
from litert_torch.backend.lowerings import utils as lowering_utils
from torch import Tensor

from pipeline.convert import operators as _operators  # noqa: F401 (registers what is lowered here)

_SWITCH = "LITERT_TORCH_FULL_TFL_DECOMPS"
_aten = torch.ops.aten


def _unary(name: str, compute: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A torch operator that lowers to TFLite's unary operator `name`."""
    operator = torch.library.custom_op(f"pipeline_tfl::{name}", lambda x: compute(x).clone(), mutates_args=(), schema="(Tensor x) -> Tensor")
    operator.register_fake(lambda x: torch.empty_like(x))

    def lower(context: Any, x: ir.Value) -> Any:
        return _lowerings._ir_operation(f"tfl.{name}", lowering_utils.node_meta_to_ir_types(context.node), [x])

    overload = getattr(torch.ops.pipeline_tfl, name).default
    registry.lower(overload)(lower)
    return overload


_tanh = _unary("tanh", torch.tanh)
_sqrt = _unary("sqrt", torch.sqrt)
_relu = _unary("relu", torch.relu)


@torch.library.custom_op("pipeline_tfl::sum", mutates_args=())
def _sum(x: Tensor, dims: Sequence[int], keepdim: bool) -> Tensor:
    return torch.sum(x, dims, keepdim)


@_sum.register_fake
def _(x: Tensor, dims: Sequence[int], keepdim: bool) -> Tensor:
    return torch.sum(x, dims, keepdim)


@registry.lower(torch.ops.pipeline_tfl.sum.default)
def _lower_sum(context: Any, x: ir.Value, dims: Sequence[int], keepdim: bool) -> Any:
    axes = lowering_utils.numpy_array_constant(np.array(dims, dtype=np.int32))
    return _lowerings._ir_operation(
        "tfl.sum",
        lowering_utils.node_meta_to_ir_types(context.node),
        [x, axes],
        {"keep_dims": ir.BoolAttr.get(keepdim)},
    )


@registry.lower(torch.ops.pipeline.matmul.default)
def _lower_matmul(context: Any, x: ir.Value, y: ir.Value, transposed: bool) -> Any:
    flags = {"adj_x": False, "adj_y": transposed, "asymmetric_quantize_inputs": False}
    attributes = {name: ir.BoolAttr.get(value) for name, value in flags.items()}
    return _lowerings._ir_operation(
        "tfl.batch_matmul", lowering_utils.node_meta_to_ir_types(context.node), [x, y], attributes
    )


@registry.lower(torch.ops.pipeline.lookup.default)
def _lower_lookup(context: Any, ids: ir.Value, table: ir.Value) -> Any:
    return _lowerings._ir_operation(
        "tfl.embedding_lookup", lowering_utils.node_meta_to_ir_types(context.node), [ids, table]
    )


@registry.lower(torch.ops.pipeline.normalise.default)
def _lower_normalise(_context: Any, x: ir.Value, eps: float) -> Any:
    whole = ir.RankedTensorType(x.type)
    single = ir.RankedTensorType.get([*whole.shape[:-1], 1], whole.element_type)
    fused = {"fused_activation_function": ir.StringAttr.get("NONE")}
    last_axis = lowering_utils.numpy_array_constant(np.array([whole.rank - 1], dtype=np.int32))
    square = _lowerings._ir_operation("tfl.mul", [whole], [x, x], fused)
    mean = _lowerings._ir_operation("tfl.mean", [single], [square, last_axis], {"keep_dims": ir.BoolAttr.get(True)})
    shifted = _lowerings._ir_operation(
        "tfl.add", [single], [mean, lowering_utils.numpy_array_constant(np.array(eps, dtype=np.float32))], fused
    )
    inverse = _lowerings._ir_operation("tfl.rsqrt", [single], [shifted])
    return _lowerings._ir_operation("tfl.mul", [whole], [x, inverse], fused)


def _less_scalar(x: Tensor, y: float) -> Tensor:
    return torch.ops.tfl.less(*_decomps._promote_types_for_binary_op(x, y))


def _zeros_like(x: Tensor, **_: object) -> Tensor:
    return torch.ops.tfl.mul(*_decomps._promote_types_for_binary_op(x, 0))


RULES: dict[Any, Callable[..., Any]] = {
    _aten.tanh.default: _tanh,
    _aten.sqrt.default: _sqrt,
    _aten.relu.default: _relu,
    _aten.sum.dim_IntList: lambda x, dims, keepdim=False, dtype=None: torch.ops.pipeline_tfl.sum(x, dims, keepdim),
    _aten.lt.Scalar: _less_scalar,
    _aten.logical_and.default: lambda x, y: torch.ops.tfl.logical_and(x, y),
}


def _module_path(node: torch.fx.Node) -> str:
    """What a node's tensors are called: the path of its module, e.g. `layers.0.mlp.gate_proj`.

    The stock name strings together the class and module of every parent: 200 bytes a tensor, a quarter of a small
    file, and it changes when code moves.
    """
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return (stack[-1][0].removeprefix("model.") if stack else "") + ";"


@contextmanager
def dynamic_shapes() -> Iterator[None]:
    """Convert with unknown dimensions: switch to the native decompositions and add `RULES` to them."""
    before, stock = os.environ.get(_SWITCH), dict(_decomps.decomps)
    named, clamp = _build._get_hierarchy, inline_consts._clamp_inf_values
    os.environ[_SWITCH] = "1"
    _decomps.decomps.update(RULES)
    _build._get_hierarchy = _module_path
    # The stock function clamps in place, which makes a private copy of every mapped weight. Weights are finite: they
    # were checked when they were mapped (`weights.mapped`).
    inline_consts._clamp_inf_values = lambda tensor: tensor
    try:
        yield
    finally:
        _decomps.decomps.clear()
        _decomps.decomps.update(stock)
        _build._get_hierarchy, inline_consts._clamp_inf_values = named, clamp
        if before is None:
            del os.environ[_SWITCH]
        else:
            os.environ[_SWITCH] = before
