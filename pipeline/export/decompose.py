"""litert-torch's decompositions, one node at a time instead of a trace of the whole graph.

litert-torch 0.10.0 calls torch.export's `run_decompositions` three times a graph (torch 2.13.0). Each call traces the
graph anew through several dispatch modes: up to 7 ms a node, three quarters of an export, while most nodes stay as they
are. Here only a node that is to be decomposed is traced, on the fake tensors that torch.export has left at its inputs.
The files are the same to the byte, which `tests/stages/test_lowering.py` holds.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.fx.config
from litert_torch import fx_infra
from litert_torch.backend.experimental import torch_tfl
from torch._ops import OpOverload
from torch.fx.node import Argument, Node, map_arg
from torch.fx.passes.shape_prop import _extract_tensor_metadata
from torch.fx.traceback import NodeSource
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from pipeline.export import repeat

Table = Mapping[object, Callable[..., object]]

_ASSERTS = torch.ops.aten._assert_tensor_metadata.default

_FUNCTIONAL: Table = {
    torch.ops.aten.lift_fresh_copy.default: torch.clone,
    torch.ops.aten.detach.default: lambda x: x,
    torch.ops.aten.detach_.default: lambda x: x,
}
"""What stands around a constant in the code: without effect where nothing is differentiated or written in place."""


@contextmanager
def by_node() -> Iterator[None]:
    """Let litert-torch decompose as this module does, and torch not look up each node's line of code.

    The lines are a fifth of the time of torch.export; they reach no file, only the message of a failure.
    """
    before, lines = fx_infra.safe_run_decompositions, torch.fx.config.do_not_emit_stack_traces
    fx_infra.safe_run_decompositions = decompose
    torch.fx.config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        fx_infra.safe_run_decompositions = before
        torch.fx.config.do_not_emit_stack_traces = lines


def decompose(
    program: torch.export.ExportedProgram, table: Table | None = None, can_skip: bool = True
) -> torch.export.ExportedProgram:
    """Replace, in place, what `table` has, composite operators and Python functions; returns `program`.

    `can_skip` is litert-torch's: there is nothing to be gained by skipping.

    Raises:
        RuntimeError: an operator that writes to its input, which only a trace of the whole graph can express, or one
            made of a size or a constant that no node of the graph gives.
    """
    graph, known = program.graph, {**(table or {}), **_FUNCTIONAL}
    sizes: dict[object, Node] = {}
    for node in list(graph.nodes):
        if "from_node" not in node.meta:
            node.meta["from_node"] = [NodeSource(node)]  # litert-torch tells tensors of one module apart by it
        if isinstance(node.meta.get("val"), torch.SymInt):
            sizes.setdefault(node.meta["val"].node.expr, node)
        elif node.op == "call_function" and node.target is _ASSERTS:
            graph.erase_node(node)
        elif node.op == "call_function" and _decomposes(node.target, known):
            result = _Tracer(node, known, sizes).trace()
            node.replace_all_uses_with(result)
            program.graph_signature.replace_all_uses(node.name, result.name)
            graph.erase_node(node)
    graph.eliminate_dead_code()
    if torch_tfl.decomps.keys() <= known.keys():  # the last time, with what makes TFLite's operators
        repeat.expand(program)
    return program


def _decomposes(target: object, table: Table) -> bool:
    if target in table:
        return True
    if not isinstance(target, OpOverload):
        return target is not operator.getitem
    if target._schema.is_mutable:
        raise RuntimeError(f"{target} writes to its input")
    return target._can_decompose()


class _Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs one node on the fake tensors of its inputs and writes, before it, the nodes that it is made of."""

    def __init__(self, node: Node, table: Table, sizes: dict[object, Node]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._node, self._table, self._sizes = node, table, sizes
        self._nodes: dict[int, tuple[Node, object]] = {}  # with the value, so that no other takes its id

    def trace(self) -> Node:
        """The node of the result."""
        node = self._node
        args, kwargs = map_arg((node.args, node.kwargs), self._value)
        with node.graph.inserting_before(node), node.meta["val"].fake_mode, self:
            assert callable(node.target)
            made = self._node_of(node.target(*args, **kwargs))
        assert isinstance(made, Node)
        return made

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args)
        with self:
            made = self._table[func](*args, **kwargs) if func in self._table else NotImplemented
            if made is NotImplemented:
                made = func.decompose(*args, **kwargs)
        return self._record(func, args, kwargs) if made is NotImplemented else made

    def _record(self, func: OpOverload, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        value = func(*args, **kwargs)
        inputs = tree_map(self._node_of, (args, kwargs))
        node = self._node.graph.call_function(func, *inputs)
        node.meta = {**self._node.meta, "val": value, "tensor_meta": _extract_tensor_metadata(value)}
        self._nodes[id(value)] = node, value
        return value

    def _value(self, node: Node) -> Argument:
        value: Argument = node.meta["val"]
        self._nodes[id(value)] = node, value
        return value

    def _node_of(self, value: object) -> object:
        """The node of a tensor or an unknown size; anything else is written as it is."""
        if isinstance(value, torch.SymInt):
            return self._size(value)
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in self._nodes:
            raise RuntimeError(f"{self._node} is made of a constant tensor")
        return self._nodes[id(value)][0]

    def _size(self, value: torch.SymInt) -> int | Node:
        size = value.node.expr
        if size.is_number:
            return int(size)
        if size not in self._sizes:
            self._sizes[size] = self._measure(value)
        return self._sizes[size]

    def _measure(self, value: torch.SymInt) -> Node:
        """A new node for a size of one of the tensors at hand."""
        for node, tensor in self._nodes.values():
            for axis, size in enumerate(getattr(tensor, "shape", ())):
                if isinstance(size, torch.SymInt) and size.node.expr == value.node.expr:
                    measured = self._node.graph.call_function(torch.ops.aten.sym_size.int, (node, axis))
                    measured.meta = {**self._node.meta, "val": value}
                    measured.meta.pop("tensor_meta", None)
                    return measured
        raise RuntimeError(f"no node gives the size {value} that {self._node} is made of")
