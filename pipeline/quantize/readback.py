"""Open a written file and find out what it holds, whatever its name says.

A converter that silently leaves a model in float (or half of it) exits with 0: AEQ 0.10.0's `dynamic_wi8b32_afp32`
did so for a 1 GB model. So every file is read back and held against what it was to become.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from pipeline.core import log, parallel
from pipeline.core.errors import PipelineError, QuantiseError, TooFewBitsError
from pipeline.core.facts import Contents
from pipeline.core.recipe import Scheme
from pipeline.runtime.interface import Array, Detail, Interpreter
from pipeline.runtime.litert import MappedModel
from pipeline.tflite.graph import Graph
from pipeline.tflite.schema import Operator

Arithmetic = Literal["integer", "hybrid", "float"]
Target = Literal["fp16", "dynamic", "static", "static16", "int4"]

_STATIC = ("static", "static16")
# As long as a prefill: at one token attention would hardly count.
_SEQUENCE = 128
_PRODUCTS = ("FULLY_CONNECTED", "BATCH_MATMUL", "CONV_2D")
_NARROW = ("INT8", "INT4")
_WEIGHTS = ("FLOAT32", "FLOAT16", *_NARROW)
# By the types of what is multiplied; at 16 bits, activations by each other as well.
_ARITHMETIC: Mapping[tuple[str, str], Arithmetic] = {
    ("INT8", "INT8"): "integer",
    ("INT16", "INT8"): "integer",
    ("INT16", "INT16"): "integer",
    ("FLOAT32", "INT8"): "hybrid",
    ("FLOAT32", "INT4"): "hybrid",
}
# They move, pick or convert values, and none of them has an integer kernel to be missed.
_NO_ARITHMETIC = (
    *("QUANTIZE", "DEQUANTIZE", "CAST", "EMBEDDING_LOOKUP", "GATHER", "SELECT_V2"),
    *("RESHAPE", "TRANSPOSE", "SQUEEZE", "EXPAND_DIMS", "STRIDED_SLICE", "SLICE", "BROADCAST_TO", "CONCATENATION"),
)
# What a file of each kind must at least be. Recipes demand more; below this it is not that kind of file.
_DECODE = "decode"
_LEAST_WEIGHTS = 0.9
_LEAST_FOUR_BITS = 0.4
_LEAST_INTEGER = 0.5
# A manifest is read by people too.
_LISTED = 40


@dataclass(frozen=True, kw_only=True)
class Product:
    """A matrix product: its operator's name, its multiply-adds, the arithmetic of its kernel, whether it has weights.

    `integer`: activations are int8 or int16 in the file, and what they are multiplied by as well. `hybrid`: float32
    activations, quantised by the kernel, times int8 or 4-bit weights. `float`: the rest. A layer that is computed of
    two int8 tensors (static.py) or two rows (int8x2.py) is one product: its remainder does not count.
    """

    name: str
    multiply_adds: int
    arithmetic: Arithmetic
    weights: bool


@dataclass(frozen=True, kw_only=True)
class ReadBack:
    """What stands in a file.

    `shares`: element type → its share of all weights (float and integer constants, counted by elements, without the
    scales of others). `bits_per_weight`: of matrices and tables, scales included. `products` are
    counted at batch 1 and 128 tokens. `float_operators`: kind → how many operators of it compute in float32.
    `tables`: element types of the embedding tables.
    """

    size: int
    shares: Mapping[str, float]
    bits_per_weight: float
    products: tuple[Product, ...]
    float_operators: Mapping[str, int]
    tables: tuple[str, ...]

    def share(self, *arithmetic: Arithmetic, weights_only: bool = False) -> float:
        """The share of multiply-adds in kernels of these kinds, of all products or of those with weights."""
        counted = [product for product in self.products if product.weights or not weights_only]
        total = sum(product.multiply_adds for product in counted)
        return sum(p.multiply_adds for p in counted if p.arithmetic in arithmetic) / max(total, 1)


def read_back(file: Path) -> ReadBack:
    """Look into a step graph or a decoder; of several signatures, `decode` is counted.

    A step graph is run once, with the plain kernels, to learn its shapes.
    """
    views = {view.signature(): view for view in Graph.read(file).views()}
    # `decode` alone computes logits; all weights are shared with the others.
    graph = views.get(_DECODE) or next(iter(views.values()))
    elements = _elements(graph)
    # Bits per weight of matrices and tables: norms are few, and stay float32 in every file.
    stored, weight_bytes = _stored([graph])
    shapes = _shapes(graph, file)
    operators, products = list(graph.operators()), _products(graph)
    return ReadBack(
        size=file.stat().st_size,
        shares={kind: count / sum(elements.values()) for kind, count in elements.items()},
        bits_per_weight=8 * weight_bytes / max(stored, 1),
        products=tuple(_product(graph, o, shapes, rows) for o, rows in products),
        float_operators=dict(sorted(Counter(graph.code(o) for o in operators if _computes_in_float(graph, o)).items())),
        tables=tuple(graph.type_of(int(o.inputs[1])) for o in operators if graph.code(o) == "EMBEDDING_LOOKUP"),
    )


def stored_weights(files: Iterable[Path]) -> tuple[int, int]:
    """Elements of all matrices and tables in `files`, and the bytes that they take, scales included."""
    return _stored(Graph.read(file) for file in files)


def _stored(graphs: Iterable[Graph]) -> tuple[int, int]:
    stored = size = 0
    for graph in graphs:
        for view, tensor in _constants(graph):
            # A scale or a norm is no weight in the sense of "4 bits per weight".
            if len(view.shape(tensor)) >= 2:
                stored += math.prod(view.shape(tensor))
                size += view.stored_bytes(tensor)
    return stored, size


def _elements(graph: Graph) -> Counter[str]:
    """Element type → how many weights of it there are."""
    elements: Counter[str] = Counter()
    for view, tensor in _constants(graph):
        if view.type_of(tensor) in _WEIGHTS:
            elements[view.type_of(tensor)] += math.prod(view.shape(tensor))
    return elements


def _constants(graph: Graph) -> Iterator[tuple[Graph, int]]:
    """Every constant but the scales of others, one that several tensors share once."""
    seen = set[int]()
    for view in graph.views():
        scales = view.holds_scales()
        for tensor, entry in enumerate(view.main.tensors):
            if entry.buffer not in seen and tensor not in scales and view.is_constant(tensor):
                seen.add(entry.buffer)
                yield view, tensor


def _shapes(graph: Graph, file: Path) -> list[tuple[int, ...]]:
    """The shape of each tensor; where it is chosen when it runs, that of batch 1 and 128 tokens, given or cached."""
    shapes = [graph.shape(tensor) for tensor in range(len(graph.main.tensors))]
    if not any(-1 in shape for shape in shapes):
        return shapes
    live = _decoded(file, graph) if graph.signature() == _DECODE else shapes_at(file, (1, _SEQUENCE))
    return [live.get(tensor, ()) for tensor in range(len(shapes))]


def _decoded(file: Path, graph: Graph) -> dict[int, tuple[int, ...]]:
    """The shape of each tensor of a decoder, whose cache grows, after a run for one token."""
    interpreter = _open(file)
    run = interpreter.get_signature_runner(_DECODE)
    sizes = {
        name: ([size if size > 0 else _SEQUENCE for size in detail["shape_signature"]], detail["dtype"])
        for name, detail in run.get_input_details().items()
    }
    run(**{name: np.zeros(shape, kind) for name, (shape, kind) in sizes.items()})
    return _told(interpreter, graph.place)


def shapes_at(file: Path, shape: tuple[int, int]) -> dict[int, tuple[int, ...]]:
    """The shape of each tensor of a step graph after a run at `shape`: batch, sequence."""
    return _told(run_at(file, shape), 0)


def _told(interpreter: Interpreter, subgraph: int) -> dict[int, tuple[int, ...]]:
    details = interpreter.get_tensor_details(subgraph)
    return {int(detail["index"]): tuple(int(size) for size in detail["shape"]) for detail in details}


def run_at(file: Path, shape: tuple[int, int]) -> Interpreter:
    """The interpreter after a run of a step graph, or of a part of one, at `shape`, on ones.

    Shapes are settled when the graph runs: a RESHAPE reads its size from a tensor. Inside XNNPACK's partitions they are
    not kept, so the plain kernels run.
    """
    interpreter = _open(file)
    inputs, ones = interpreter.get_input_details(), np.ones(shape, np.int32)
    for detail in inputs:
        interpreter.resize_tensor_input(detail["index"], ones.shape)
    interpreter.allocate_tensors()
    for detail in inputs:
        interpreter.set_tensor(detail["index"], ones)
    interpreter.invoke()
    return interpreter


def _open(file: Path) -> Interpreter:
    """LiteRT's interpreter with its built-in kernels."""
    from ai_edge_litert import interpreter

    # Without XNNPACK, which would pack all weights anew: twice the file in memory.
    kind = interpreter.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    opened: Interpreter = interpreter.Interpreter(model_path=str(file), experimental_op_resolver_type=kind)
    return opened


def _products(graph: Graph) -> list[tuple[Operator, int]]:
    """Every matrix product, and in how many rows it takes its input; those of remainders are left out.

    What a product is for is seen in the graph: a remainder's is added to one of the value's with the same weights.
    """
    consumers, layers = graph.consumers(), set[tuple[int, int]]()
    products = []
    for operator in (operator for operator in graph.operators() if graph.code(operator) in _PRODUCTS):
        weight, total = int(operator.inputs[1]), _added(graph, operator, consumers)
        layer = (graph.buffer(weight), id(total))
        if total is None or not graph.is_constant(weight) or layer not in layers:
            products.append((operator, _rows(graph, operator, consumers)))
        layers.add(layer)
    return products


def _added(graph: Graph, product: Operator, consumers: Mapping[int, Sequence[Operator]]) -> Operator | None:
    """The addition that alone reads the result of `product`, scaled or not (static.py); None if there is none."""
    while len(readers := consumers.get(int(product.outputs[0]), [])) == 1:
        product = readers[0]
        if graph.code(product) not in ("DEQUANTIZE", "MUL"):
            return product if graph.code(product) == "ADD" else None
    return None


def _rows(graph: Graph, operator: Operator, consumers: Mapping[int, Sequence[Operator]]) -> int:
    """In how many rows a layer takes its input, which are summed next (int8x2.py): 2 or 1."""
    result = int(operator.outputs[0])
    readers, shape = consumers.get(result, []), graph.shape(result)
    axis = [len(shape) - 2]
    summed = readers and all(
        graph.code(reader) == "SUM" and graph.constant(int(reader.inputs[1])).tolist() == axis for reader in readers
    )
    return shape[-2] if summed else 1


def _product(graph: Graph, operator: Operator, shapes: Sequence[tuple[int, ...]], rows: int) -> Product:
    """Multiply-adds: elements of the result times the length of what is summed for each, over `rows`."""
    left, right, result = int(operator.inputs[0]), int(operator.inputs[1]), int(operator.outputs[0])
    # Its left operand is [..., rows, summed], the right one may be stored either way round.
    if graph.code(operator) == "BATCH_MATMUL":
        summed = shapes[left][-2 if operator.builtinOptions.adjX else -1]
    else:
        summed = int(np.prod(shapes[right][1:]))
    name, types = graph.operator_name(operator), (graph.type_of(left), graph.type_of(right))
    return Product(
        # Operators outside all modules have no path; a name has to begin with something.
        name=name if not name.startswith(";") else f"step{name}",
        multiply_adds=int(np.prod(shapes[result])) * summed // rows,
        arithmetic=_ARITHMETIC.get(types, "float"),
        weights=graph.is_constant(right),
    )


def _computes_in_float(graph: Graph, operator: Operator) -> bool:
    """Whether an operator does arithmetic in float32."""
    if graph.code(operator) in _NO_ARITHMETIC:
        return False
    tensors = [int(i) for i in (*operator.inputs, *operator.outputs) if i >= 0]
    types = [graph.type_of(tensor) for tensor in tensors]
    # Float activations times integer weights are multiplied in integers, though both ends are float32.
    hybrid = graph.code(operator) in _PRODUCTS and types[1] in _NARROW
    return "FLOAT32" in types and not hybrid


def check(contents: ReadBack, target: Target, file: Path, *, floats: bool = False) -> Contents:
    """Make sure that a file is what it was to become, and return what the manifest says of it.

    `integer_share` counts a static file's products with integer activations only, a dynamic file's hybrid ones too.
    `float_products` are the largest of the others by name, with their share; a static file's head is one of them. With
    `floats` the recipe leaves what it will in float32: then 4 bits alone are asked for.

    Raises:
        TooFewBitsError: too few weights have 4 bits, and that is all.
        QuantiseError: too few weights have the type, a table is of another, or too few products are integer.
    """
    wanted = {"fp16": ("FLOAT16",), "int4": _NARROW}.get(target, ("INT8",))
    share = sum(contents.shares.get(kind, 0.0) for kind in wanted)
    # In a full-integer file a hybrid product is one that was left over.
    kinds: tuple[Arithmetic, ...] = ("integer",) if target in _STATIC else ("integer", "hybrid")
    integer, linear = contents.share(*kinds), contents.share(*kinds, weights_only=True)
    wrong = []
    if share < _LEAST_WEIGHTS and not floats:
        types = ", ".join(f"{value:.1%} {kind.lower()}" for kind, value in sorted(contents.shares.items()))
        wrong.append(f"its weights are {types}")
    few = f"only {contents.shares.get('INT4', 0.0):.1%} of its weights have 4 bits"
    if target == "int4" and contents.shares.get("INT4", 0.0) < _LEAST_FOUR_BITS:
        wrong.append(few)
    # A table is half of a small model and no product, so shares of products would not show it.
    if set(contents.tables) - {*wanted} and not floats:
        wrong.append(f"its embedding tables are {', '.join(sorted({t.lower() for t in contents.tables}))}")
    # Of weights' products alone: attention over a long sequence outweighs them, and stays float where it has to.
    if target != "fp16" and linear < _LEAST_INTEGER and not floats:
        wrong.append(f"only {linear:.1%} of the multiply-adds with its weights are integer")
    if wrong:
        kind = TooFewBitsError if wrong == [few] else QuantiseError
        raise kind(
            f"{file} is not a {target} file: {'; '.join(wrong)}",
            cause="the graph has weights or products that the quantiser does not know, or the recipe keeps too much",
            remedy="compare its operators with those in pipeline/quantize/rows.py",
        )
    return _facts(contents, target, share, integer)


def _facts(contents: ReadBack, target: Target, share: float, integer: float) -> Contents:
    if target == "fp16":
        return Contents(size=contents.size, weights_float16_share=round(share, 6))
    total = sum(product.multiply_adds for product in contents.products)
    left = Counter[str]()
    for product in contents.products:
        if product.arithmetic == "float" or (target in _STATIC and product.arithmetic == "hybrid"):
            left[product.name] += product.multiply_adds
    found = Contents(
        size=contents.size,
        integer_share=round(integer, 6),
        multiply_adds=total,
        float_operators=contents.float_operators,
        float_products={name: round(count / total, 6) for name, count in left.most_common(_LISTED)},
    )
    if target != "int4":
        return replace(found, weights_int8_share=round(share, 6))
    four, eight = (round(contents.shares.get(f"INT{bits}", 0.0), 6) for bits in (4, 8))
    bits = round(contents.bits_per_weight, 4)
    return replace(found, weights_int4_share=four, weights_int8_share=eight, bits_per_weight=bits)


def contents(file: Path, scheme: Scheme) -> Contents:
    """What stands in a written int8 file; said as well.

    Raises:
        QuantiseError: it is not what the scheme makes, or does not run.
    """
    found = read_back(file)
    facts = check(found, scheme, file)
    round_trip(file)
    log.step(
        f"{file.name}: {log.human_bytes(found.size)}; {facts.integer_share:.1%} of multiply-adds integer, "
        f"{facts.weights_int8_share:.1%} of weights int8"
    )
    return replace(facts, scheme=scheme)


def round_trip(file: Path, error: type[PipelineError] = QuantiseError, packed: Path | None = None) -> None:
    """Open the file and run one step of its first signature, a decoder's `decode`, on an example of each input.

    The built-in kernels run: XNNPACK would repack the weights of every signature into memory. Only what would take an
    hour in these, and has one signature, runs in XNNPACK: `packed` is a file for its repacked weights. Results are
    looked at one by one, for a decoder's are as large as its cache.

    Raises:
        PipelineError: of kind `error`: it does not run, or a result is not finite.
    """
    try:
        if not all(np.isfinite(values).all() for values in (_ran_packed(file, packed) if packed else _ran(file))):
            raise error(f"{file} gives values that are not finite", cause="a range or a weight is out of bounds")
    except (RuntimeError, ValueError) as fault:
        raise error(
            f"{file} does not run: {fault}", cause="LiteRT has no kernel for one of its operators as it was written"
        ) from fault


def _ran(file: Path) -> Iterator[Array]:
    """The results in the built-in kernels."""
    interpreter = _open(file)
    inputs = {detail["index"]: _example(detail) for detail in interpreter.get_input_details()}
    for index, value in inputs.items():
        interpreter.resize_tensor_input(index, value.shape)
    interpreter.allocate_tensors()
    for index, value in inputs.items():
        interpreter.set_tensor(index, value)
    interpreter.invoke()
    # One at a time: a copy of all would take the memory of the cache once more.
    yield from (interpreter.get_tensor(detail["index"]) for detail in interpreter.get_output_details())


def _ran_packed(file: Path, packed: Path) -> Iterator[Array]:
    """The results in XNNPACK, of inputs whose shapes are fixed."""
    runner = MappedModel(file, packed, parallel.threads()).get_signature_runner(file.stem)
    details = runner.get_input_details().items()
    results = runner(**{name: np.zeros(detail["shape"], np.dtype(detail["dtype"])) for name, detail in details})
    yield from (np.asarray(values) for values in results.values())


def _example(detail: Detail) -> Array:
    """Zeros for floats, a mask or a cache; ones for integers, tokens and what masks them; 8 where any size will do."""
    shape = [8 if wanted < 0 else size for size, wanted in zip(detail["shape"], detail["shape_signature"], strict=True)]
    make = np.ones if np.issubdtype(detail["dtype"], np.integer) else np.zeros  # zeros of a long cache take no memory
    return make(shape, detail["dtype"])
