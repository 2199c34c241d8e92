"""A small model as a flatbuffer, whose neighbouring layers can trade scales."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.quantize import rows as quantize
from pipeline.tflite import schema
from pipeline.tflite.graph import Graph

VOCABULARY, WIDTH, INNER = 40, 32, 48
IDS = np.array([3, 0, 39, 7, 3], np.int32)
Floats = NDArray[np.float32]


class Model:
    """ids [n] → scaled embedding → norm → tanh(gate) · up → down, added → norm → the embedding as the head."""

    def __init__(self, seed: int = 1, spread: float = 1.0) -> None:
        self.random, self.spread = np.random.default_rng(seed), spread
        self.graph, self.operators = Graph.empty(), []
        graph = self.graph
        self.ids = graph.add_tensor("ids", "INT32", (-1,))
        self.table = graph.add_constant(self.matrix(VOCABULARY, WIDTH), "table")
        x = self.to("MUL", self.to("EMBEDDING_LOOKUP", self.ids, self.table), self.constant(np.float32(5.7)))
        normed = self.norm(x)
        gate, up = (self.layer(normed, self.matrix(INNER, WIDTH), name) for name in ("gate", "up"))
        self.up = up
        mixed = self.to("MUL", self.to("TANH", gate, width=INNER), up, width=INNER)
        x = self.to("ADD", x, self.layer(mixed, self.matrix(WIDTH, INNER), "down"))
        self.logits = self.to("FULLY_CONNECTED", self.norm(x), self.table, -1, width=VOCABULARY)
        graph.main.inputs, graph.main.outputs, graph.main.operators = [self.ids], [self.logits], self.operators
        graph.add_signature("one", {"ids": self.ids}, {"logits": self.logits})

    def matrix(self, rows: int, columns: int) -> Floats:
        """Random, with columns of very different size."""
        sizes = np.exp(self.spread * self.random.standard_normal(columns))
        return (self.random.standard_normal((rows, columns)) * sizes).astype(np.float32)

    def constant(self, values: Any) -> int:
        return self.graph.add_constant(np.asarray(values), f"constant;{len(self.graph.main.tensors)}")

    def to(self, code: str, *inputs: int, width: int = WIDTH, **settings: Any) -> int:
        result = self.graph.add_tensor(f"{code};{len(self.operators)}", "FLOAT32", (-1, width))
        self.operators.append(self.graph.operator(code, inputs, [result], **settings))
        return result

    def layer(self, x: int, weight: Floats, name: str) -> int:
        return self.to("FULLY_CONNECTED", x, self.graph.add_constant(weight, name), -1, width=len(weight))

    def norm(self, x: int) -> int:
        size = self.to("SUM", self.to("MUL", x, x), self.constant(np.array([1], np.int32)), width=1, keepDims=True)
        weight = self.constant(np.exp(self.random.standard_normal(WIDTH)).astype(np.float32))
        return self.to("MUL", x, self.to("MUL", self.to("RSQRT", size, width=1), weight))


def logits(graph: Graph, file: Path, signature: str = "one") -> Floats:
    """What plain kernels make of IDS: they add in a fixed order."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    graph.prune()
    graph.write(file)
    kernels = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = Interpreter(model_path=str(file), experimental_op_resolver_type=kernels)
    result: Floats = interpreter.get_signature_runner(signature)(ids=IDS)["logits"]
    return result


def twice(model: Model) -> Graph:
    """The model with a second signature that shares its constants."""
    graph = model.graph
    graph.model.subgraphs.append(copy.deepcopy(graph.main))
    Graph(graph.model, 1).add_signature("two", {"ids": model.ids}, {"logits": model.logits})
    return graph


def rounded(graph: Graph) -> None:
    """Let the weights be what int8 makes of them, in float: activations are another matter."""
    for operator in graph.operators():
        if graph.code(operator) == "FULLY_CONNECTED":
            weight = int(operator.inputs[1])
            values, scales = quantize.quantise_rows(graph.blocks(weight))
            whole = np.concatenate(list(values.each(lambda block: block)))
            graph.set_constant(weight, whole * scales.scale[:, None])


def bytes_by_type(graph: Graph) -> dict[str, int]:
    """Element type → bytes of constants of that type; a buffer that several tensors share counts once."""
    seen: dict[int, tuple[str, int]] = {}
    for subgraph in graph.model.subgraphs:
        for tensor in subgraph.tensors:
            if (data := graph.model.buffers[tensor.buffer].data) is not None:
                seen.setdefault(int(tensor.buffer), (schema.names("TensorType")[tensor.type], len(data)))
    total: Counter[str] = Counter()
    for type_name, size in seen.values():
        total[type_name] += size
    return dict(total)
