"""Layers of one kind, traced once and copied for the others.

torch.export and the passes after it take a third of a second a layer, and what they find is the same for every layer of
a kind but the weights. So the first layer of a kind is traced between two marks, `pipeline::enter` and
`pipeline::leave`, and each other one is a single node, `pipeline::layer`. When all is decomposed, `expand` writes in
its place what stands between the marks. The files are the same to the byte, but that constants which layers share may
be called after another one, which `tests/stages/test_repeat.py` holds.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.node import Argument, Node, map_arg
from torch.fx.traceback import NodeSource
from torch.utils._pytree import tree_flatten, tree_unflatten

_POSITION = "layer"
"""The attribute by which a module says which layer it is in; all others make the kind."""
_PLACE = re.compile(r"layers\.\d+")
_once: ContextVar[bool] = ContextVar("once", default=False)


class State(Protocol):
    """What layers read and write besides their arguments, such as a cache."""

    def kind(self, index: int) -> object:
        """What makes layers of one sort treat it alike."""

    def taken(self, index: int) -> list[Tensor]:
        """What the layer will read of it."""

    def given(self, index: int, taken: Sequence[Tensor]) -> State:
        """The same state for this layer alone, which reads `taken` instead."""

    def left(self, index: int) -> list[Tensor]:
        """What the layer has written."""

    def leave(self, index: int, left: Sequence[Tensor]) -> None:
        """Write `left` in the layer's place."""


@torch.library.custom_op("pipeline::enter", mutates_args=())
def enter(inputs: list[Tensor], kind: str) -> list[Tensor]:
    """The inputs of the first layer of a kind."""
    return [x.clone() for x in inputs]


@torch.library.custom_op("pipeline::leave", mutates_args=())
def leave(outputs: list[Tensor], kind: str) -> list[Tensor]:
    """Its results."""
    return [x.clone() for x in outputs]


@torch.library.custom_op("pipeline::layer", mutates_args=())
def layer(inputs: list[Tensor], like: list[Tensor], kind: str, name: str) -> list[Tensor]:
    """The results of another layer of that kind, which are like those of the first; it never runs."""
    raise NotImplementedError(f"{name} of kind {kind} with {len(inputs)} inputs for {len(like)} results")


@enter.register_fake
def _(inputs: list[Tensor], kind: str) -> list[Tensor]:
    return [torch.empty_like(x) for x in inputs]


@leave.register_fake
def _(outputs: list[Tensor], kind: str) -> list[Tensor]:
    return [torch.empty_like(x) for x in outputs]


@layer.register_fake
def _(inputs: list[Tensor], like: list[Tensor], kind: str, name: str) -> list[Tensor]:
    return [torch.empty_like(x) for x in like]


@contextmanager
def once() -> Iterator[None]:
    """Within, `run_layers` has layers of one kind traced once; outside, each runs as it is."""
    token = _once.set(True)
    try:
        yield
    finally:
        _once.reset(token)


def run_layers(layers: nn.ModuleList, state: State, x: Tensor, args: Callable[[int], tuple[object, ...]]) -> Tensor:
    """x → layer 0 → layer 1 → …, each called with what the one before gives, its `args` and `state`.

    Args:
        layers: may differ in all but their place by attributes and shapes alone.
        state: see `State`.
        x: of the first layer.
        args: of each layer by its number: tensors, in containers that torch knows.
    """
    firsts: dict[str, tuple[str, list[Tensor]]] = {}
    for index, module in enumerate(layers):
        if not _once.get():
            x = module(x, *args(index), state)
            continue
        leaves, spec = tree_flatten((x, *args(index)))
        parameters = dict(module.named_parameters())
        taken, others = state.taken(index), [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        inputs = [*taken, *(leaf for leaf in leaves if isinstance(leaf, Tensor)), *parameters.values()]
        shapes = [(tuple(value.shape), value.dtype) for value in inputs]
        key = repr((state.kind(index), spec, others, _structure(module), shapes))
        if key in firsts:
            kind, like = firsts[key]
            results = layer(inputs, like, kind, f"layers.{index}")
        else:
            kind = str(len(firsts))
            entered = iter(enter(inputs, kind))
            own = state.given(index, [next(entered) for _ in taken])
            again = tree_unflatten([next(entered) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)
            values = {name: next(entered) for name in parameters}
            results = leave([functional_call(module, values, (*again, own)), *own.left(index)], kind)
            firsts[key] = kind, results
        x, *left = results
        state.leave(index, left)
    return x


def _structure(module: nn.Module) -> list[object]:
    """All that a module's graph depends on but shapes and values: classes and attributes, of all modules in it."""
    common = {*vars(nn.Module()), _POSITION} - {"training"}
    return [
        (name, type(part), sorted((key, repr(value)) for key, value in vars(part).items() if key not in common))
        for name, part in module.named_modules()
    ]


def expand(program: torch.export.ExportedProgram) -> None:
    """Write every layer out, in place, and take the marks away."""
    bodies: dict[object, _Body] = {}
    nodes: list[Node] = []
    entered: Node | None = None
    for node in list(program.graph.nodes):
        if node.target is torch.ops.pipeline.enter.default:
            entered, nodes = node, []
        elif node.target is torch.ops.pipeline.leave.default:
            assert entered is not None
            bodies[node.args[1]] = _Body(entered, nodes, node)
            entered = None
        elif node.target is torch.ops.pipeline.layer.default:
            _copy(program, node, bodies[node.args[2]])
        elif entered is not None and not _is_item(node, entered):
            nodes.append(node)
    for body in bodies.values():
        _replace_items(program, body.left, body.left.args[0])
        _replace_items(program, body.entered, body.entered.args[0])


@dataclass(frozen=True)
class _Body:
    """The first layer of a kind: its two marks, and the nodes between them."""

    entered: Node
    nodes: list[Node]
    left: Node


def _copy(program: torch.export.ExportedProgram, node: Node, body: _Body) -> None:
    inputs = node.args[0]
    name, mark = str(node.args[3]), torch.ops.litert_torch.mark_tensor.default
    place = [argument.name for argument in mark._schema.arguments].index("id")
    values = {item: _item(inputs, item) for item in body.entered.users}
    with program.graph.inserting_before(node):
        for old in body.nodes:
            new = program.graph.node_copy(old, lambda value: values.get(value, value))
            new.meta = {**old.meta, "nn_module_stack": _renamed(old, name), "from_node": [NodeSource(new)]}
            if old.target is mark:  # composite operators are told apart by their id alone
                new.update_arg(place, f"{old.args[place]} {name}")
            values[old] = new
    _replace_items(program, node, map_arg(body.left.args[0], lambda value: values.get(value, value)))


def _renamed(node: Node, name: str) -> dict[str, object]:
    """The stack of modules of a node in another layer."""
    stack = node.meta.get("nn_module_stack", {})
    return {key: (_PLACE.sub(name, path, count=1), kind) for key, (path, kind) in stack.items()}


def _is_item(node: Node, of: Node) -> bool:
    return node.target is operator.getitem and node.args[0] is of


def _item(of: Argument, item: Node) -> Node:
    """The node in the list `of` that the node `item` takes out of such a list."""
    place = item.args[1]
    assert isinstance(of, Sequence) and isinstance(place, int)
    node = of[place]
    assert isinstance(node, Node)
    return node


def _replace_items(program: torch.export.ExportedProgram, node: Node, results: Argument) -> None:
    """Let those that read results of `node` read `results` instead."""
    for item in list(node.users):
        result = _item(results, item)
        item.replace_all_uses_with(result)
        program.graph_signature.replace_all_uses(item.name, result.name)
        program.graph.erase_node(item)
    program.graph.erase_node(node)
