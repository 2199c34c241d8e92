"""How our operators become TFLite, and the state in which litert-torch converts graphs with unknown dimensions.

Seen in litert-torch 0.10.0 with torch 2.13.0; the hooks used here are private there. Its default lowering goes through
JAX, which refuses unknown dimensions. `LITERT_TORCH_FULL_TFL_DECOMPS=1` switches to the decompositions in
`litert_torch/backend/experimental/torch_tfl`, which allow them. The graph modules in `pipeline/models` are written with
what these cover and with `operators.py`.

`tests/stages/test_lowering.py` holds each workaround: a test there that fails means upstream has mended it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from litert_converter.mlir import ir
from litert_torch.backend.debuginfo import _build
from litert_torch.backend.experimental.torch_tfl import _lowerings
from litert_torch.backend.lowerings import registry
from litert_torch.backend.lowerings import utils as lowering_utils
from litert_torch.backend.lowerings.context import LoweringContext

from pipeline.export import operators as _operators  # noqa: F401 (registers what is lowered here)

_SWITCH = "LITERT_TORCH_FULL_TFL_DECOMPS"


@registry.lower(torch.ops.pipeline.matmul.default)
def _lower_matmul(context: LoweringContext, x: ir.Value, y: ir.Value, transposed: bool) -> ir.Value:
    # A TRANSPOSE before would copy the cache at every step; the kernel reads its rows as they lie.
    flags = {"adj_x": False, "adj_y": transposed, "asymmetric_quantize_inputs": False}
    attributes = {name: ir.BoolAttr.get(value) for name, value in flags.items()}
    return _lowerings._ir_operation(
        "tfl.batch_matmul", lowering_utils.node_meta_to_ir_types(context.node), [x, y], attributes
    )


@registry.lower(torch.ops.pipeline.linear.default)
def _lower_linear(context: LoweringContext, x: ir.Value, weight: ir.Value) -> ir.Value:
    # An absent bias can't be said here: the converter is given zeros, which `export` takes out again.
    outputs = ir.RankedTensorType(weight.type).shape[0]
    no_bias = lowering_utils.numpy_array_constant(np.zeros(outputs, np.float32))
    attributes = {
        "fused_activation_function": ir.StringAttr.get("NONE"),
        "weights_format": ir.StringAttr.get("DEFAULT"),
        # Else the result is [rows, outputs], and each layer needs reshapes of unknown sizes.
        "keep_num_dims": ir.BoolAttr.get(True),
        # Of no effect in float; the quantiser sets it where weights become int8.
        "asymmetric_quantize_inputs": ir.BoolAttr.get(False),
    }
    return _lowerings._ir_operation(
        "tfl.fully_connected", lowering_utils.node_meta_to_ir_types(context.node), [x, weight, no_bias], attributes
    )


@registry.lower(torch.ops.pipeline.convolve.default)
def _lower_convolve(
    context: LoweringContext, x: ir.Value, weight: ir.Value, stride: Sequence[int], padded: bool = False
) -> ir.Value:
    return _convolution(context, "tfl.conv_2d", x, weight, stride, padded)


@registry.lower(torch.ops.pipeline.convolve_apart.default)
def _lower_convolve_apart(
    context: LoweringContext, x: ir.Value, weight: ir.Value, stride: Sequence[int], padded: bool = False
) -> ir.Value:
    one = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), 1)
    return _convolution(context, "tfl.depthwise_conv_2d", x, weight, stride, padded, depth_multiplier=one)


def _convolution(
    context: LoweringContext,
    code: str,
    x: ir.Value,
    weight: ir.Value,
    stride: Sequence[int],
    padded: bool,
    **more: ir.Attribute,
) -> ir.Value:
    result = lowering_utils.node_meta_to_ir_types(context.node)
    # The kernel wants a bias; zeros change nothing.
    no_bias = lowering_utils.numpy_array_constant(np.zeros(ir.RankedTensorType(result[0]).shape[-1], np.float32))
    sizes = {"stride_h": stride[0], "stride_w": stride[1], "dilation_h_factor": 1, "dilation_w_factor": 1}
    attributes = {
        **{name: ir.IntegerAttr.get(ir.IntegerType.get_signless(32), size) for name, size in sizes.items()},
        "padding": ir.StringAttr.get("SAME" if padded else "VALID"),
        "fused_activation_function": ir.StringAttr.get("NONE"),
        **more,
    }
    return _lowerings._ir_operation(code, result, [x, weight, no_bias], attributes)


@registry.lower(torch.ops.pipeline.lookup.default)
def _lower_lookup(context: LoweringContext, ids: ir.Value, table: ir.Value) -> ir.Value:
    return _lowerings._ir_operation(
        "tfl.embedding_lookup", lowering_utils.node_meta_to_ir_types(context.node), [ids, table]
    )


@registry.lower(torch.ops.pipeline.normalise.default)
def _lower_normalise(_context: LoweringContext, x: ir.Value, weight: ir.Value | None, eps: float) -> ir.Value:
    whole = ir.RankedTensorType(x.type)
    single = ir.RankedTensorType.get([*whole.shape[:-1], 1], whole.element_type)
    fused = {"fused_activation_function": ir.StringAttr.get("NONE")}
    last_axis = lowering_utils.numpy_array_constant(np.array([whole.rank - 1], dtype=np.int32))
    square = _lowerings._ir_operation("tfl.mul", [whole], [x, x], fused)
    # MEAN and not SUM over a constant: the width is then nowhere in the graph but in its shapes.
    mean = _lowerings._ir_operation("tfl.mean", [single], [square, last_axis], {"keep_dims": ir.BoolAttr.get(True)})
    shifted = _lowerings._ir_operation(
        "tfl.add", [single], [mean, lowering_utils.numpy_array_constant(np.array(eps, dtype=np.float32))], fused
    )
    inverse = _lowerings._ir_operation("tfl.rsqrt", [single], [shifted])
    if weight is not None:
        inverse = _lowerings._ir_operation("tfl.mul", [whole], [inverse, weight], fused)
    return _lowerings._ir_operation("tfl.mul", [whole], [x, inverse], fused)


@registry.lower(torch.ops.aten.sigmoid.default)
def _lower_sigmoid(context: LoweringContext, x: ir.Value) -> ir.Value:
    return _lowerings._ir_operation("tfl.logistic", lowering_utils.node_meta_to_ir_types(context.node), [x])


@registry.lower(torch.ops.pipeline.fold.default)
def _lower_fold(context: LoweringContext, x: ir.Value, _kv_heads: int) -> ir.Value:
    (folded,) = lowering_utils.node_meta_to_ir_types(context.node)
    return _reshaped(_heads_first(x), folded)


@registry.lower(torch.ops.pipeline.unfold.default)
def _lower_unfold(context: LoweringContext, x: ir.Value, heads: int) -> ir.Value:
    (joined,) = lowering_utils.node_meta_to_ir_types(context.node)
    kind = ir.RankedTensorType(x.type)
    shape = [1, heads, ir.RankedTensorType(joined).shape[1], kind.shape[3]]
    return _reshaped(_heads_first(_reshaped(x, ir.RankedTensorType.get(shape, kind.element_type))), joined)


def _heads_first(x: ir.Value) -> ir.Value:
    """[1, T, N, D] → [1, N, T, D], and back."""
    kind, order = ir.RankedTensorType(x.type), (0, 2, 1, 3)
    swapped = ir.RankedTensorType.get([kind.shape[axis] for axis in order], kind.element_type)
    return _lowerings._ir_operation(
        "tfl.transpose", [swapped], [x, lowering_utils.numpy_array_constant(np.array(order, np.int32))]
    )


def _reshaped(x: ir.Value, result: ir.RankedTensorType) -> ir.Value:
    """`x` in the shape of `result`, of which one dimension may be unknown."""
    kind = ir.RankedTensorType(result)
    shape = [-1 if kind.is_dynamic_dim(axis) else size for axis, size in enumerate(kind.shape)]
    return _lowerings._ir_operation(
        "tfl.reshape", [kind], [x, lowering_utils.numpy_array_constant(np.array(shape, np.int32))]
    )


@registry.lower(torch.ops.pipeline.update.default)
def _lower_update(context: LoweringContext, x: ir.Value, part: ir.Value, start: ir.Value) -> ir.Value:
    return _lowerings._ir_operation(
        "tfl.dynamic_update_slice", lowering_utils.node_meta_to_ir_types(context.node), [x, part, start]
    )


@registry.lower(torch.ops.pipeline.gather.default)
def _lower_gather(context: LoweringContext, x: ir.Value, index: ir.Value, axis: int) -> ir.Value:
    integer = ir.IntegerType.get_signless(32)
    attributes = {"axis": ir.IntegerAttr.get(integer, axis), "batch_dims": ir.IntegerAttr.get(integer, 0)}
    return _lowerings._ir_operation(
        "tfl.gather", lowering_utils.node_meta_to_ir_types(context.node), [x, index], attributes
    )


def _module_path(node: torch.fx.Node) -> str:
    """What a node's tensors are called: the path of its module, e.g. `layers.0.mlp.gate_proj`.

    The stock name strings together the class and module of every parent: 200 bytes a tensor, a quarter of a small
    file, and it changes when code moves.
    """
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return (stack[-1][0].removeprefix("module.").removeprefix("model.") if stack else "") + ";"


@contextmanager
def dynamic_shapes() -> Iterator[None]:
    """Convert with unknown dimensions, and tensors named by module path."""
    before = os.environ.get(_SWITCH)
    # There is no public way to name tensors in litert-torch 0.10.0.
    named = _build._get_hierarchy
    # Read at each conversion, so it must stand in the environment, and only as long as one runs.
    os.environ[_SWITCH] = "1"
    _build._get_hierarchy = _module_path
    try:
        yield
    finally:
        _build._get_hierarchy = named
        if before is None:
            del os.environ[_SWITCH]
        else:
            os.environ[_SWITCH] = before
