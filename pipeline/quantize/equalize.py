"""Cross-layer equalization: scales moved between neighbouring layers, for closer int8 weights, free at run time.

Cross-layer equalization (Nagel et al., arXiv 1906.04721), with a strength as in SmoothQuant (Xiao et al., arXiv
2211.10438) but on the weights alone: column j is multiplied by rms(column j)^−strength. A linear layer's weights
[outputs, inputs] are rounded in steps of their row's largest. Where some columns are far larger than the rest, they set
the step for all. Dividing such columns, and multiplying what feeds them by the same factors (float32 [inputs]), leaves
the model as it was; factors are powers of two, so it stays so to the bit. What feeds a column is either

- a norm's weight: before q, k and v, before gate and up, before the head; or
- a row of the matrix before it: down_proj reads gelu(gate) · up, so up_proj's rows take the factors. Each row has a
  scale of its own and is rounded exactly as before.

A table that is also the head is looked up as well: there the factors are undone in the constant that scales the rows
anyway.

Result: a small gain, Gemma 3 270M's KLD 0.0134 instead of 0.0143; `groups.py` is the larger one; docs/experiments.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipeline.quantize.rows import LINEAR, LOOKUP, PRODUCT
from pipeline.tflite.graph import Graph
from pipeline.tflite.lazy import Array
from pipeline.tflite.schema import Operator

# Factors stay within 2^±8: enough for any channel seen, and far from the ends of float32.
_LARGEST_EXPONENT = 8
_MOVES = ("RESHAPE", "SQUEEZE", "EXPAND_DIMS")

Factors = NDArray[np.float32]


def equalize_columns(graph: Graph, strength: float) -> dict[str, Factors]:
    """Even out the columns of linear layers where what feeds them can take the factors, in every signature alike.

    Column j is multiplied by rms(column j)^(−strength), over all matrices that read it, rounded to a power of two and
    with a geometric mean of about 1.

    Args:
        graph: with float32 weights.
        strength: 0 moves nothing, 1 makes all columns equally large.

    Returns:
        By the name of each matrix that was changed, what its columns were multiplied with.
    """
    equalized = [(site, _factors(site, strength)) for site in _closed_sites(graph)]
    for site, factors in equalized:
        _apply(site, factors)
    return {
        use.view.origin(use.tensor).matrix: factors for site, factors in equalized for use in site.matrices.values()
    }


@dataclass(frozen=True)
class _Use:
    """Input `place` of `operator`: a constant."""

    view: Graph
    operator: Operator
    place: int

    @property
    def tensor(self) -> int:
        return int(self.operator.inputs[self.place])

    @property
    def buffer(self) -> int:
        return self.view.buffer(self.tensor)

    @property
    def is_matrix(self) -> bool:
        return self.view.code(self.operator) == LINEAR


@dataclass
class _Site:
    """Matrices that read the same channels, by buffer, and every constant that takes the factors of these channels."""

    matrices: dict[int, _Use] = field(default_factory=dict)
    feeders: list[_Use] = field(default_factory=list)
    closed: bool = True

    def add(self, other: _Site) -> None:
        self.matrices |= other.matrices
        self.feeders += other.feeders
        self.closed &= other.closed


# --- finding


def _closed_sites(graph: Graph) -> list[_Site]:
    """Groups of matrices, each with all that share a matrix or an input in any signature, whose uses can all change."""
    sites: dict[int, _Site] = {}
    users: Counter[int] = Counter()
    walks = [_Walk(view) for view in graph.views()]
    for walk in walks:
        users.update(use.buffer for use in walk.matrices())
        for local in walk.sites():
            # One matrix may read differently fed inputs in two signatures; then all of those take the factors, or none
            # does.
            _merge(sites, local)
    for walk in walks:
        for table in walk.tables():
            if table.buffer in sites:
                # After all matrices are known: only a table that is also the head of some signature needs undoing.
                sites[table.buffer].add(walk.undoing(table))
    unique = {id(site): site for site in sites.values()}.values()
    return [site for site in unique if site.closed and _rows_are_free(site, users)]


def _merge(sites: dict[int, _Site], local: _Site) -> None:
    joined = _Site()
    for known in {id(site): site for buffer in local.matrices if (site := sites.get(buffer))}.values():
        joined.add(known)
    joined.add(local)
    sites.update(dict.fromkeys(joined.matrices, joined))


def _rows_are_free(site: _Site, users: Counter[int]) -> bool:
    """Whether matrices that take the factors in their rows give nothing to anyone else."""
    # A matrix gives its rows away once per signature; one more reader than that would see them changed.
    taking = Counter(feeder.buffer for feeder in site.feeders if feeder.is_matrix)
    return all(users[buffer] == count for buffer, count in taking.items())


class _Walk:
    """One signature's graph, searched against the flow."""

    def __init__(self, view: Graph) -> None:
        self.view, self.consumers, self.producers = view, view.consumers(), view.producers()
        self.results = {int(tensor) for tensor in view.main.outputs}

    def matrices(self) -> list[_Use]:
        """The weights of linear layers."""
        return [_Use(self.view, operator, 1) for operator in self.view.operators() if self._is_layer(operator)]

    def tables(self) -> list[_Use]:
        """The tables of lookups."""
        return [
            _Use(self.view, operator, 1) for operator in self.view.operators() if self.view.code(operator) == LOOKUP
        ]

    def sites(self) -> list[_Site]:
        """The groups of this signature: layers with the same input, and what feeds it."""
        readers: dict[int, list[_Use]] = {}
        for use in self.matrices():
            readers.setdefault(int(use.operator.inputs[0]), []).append(use)
        return [self._site(x, uses) for x, uses in readers.items()]

    def _site(self, x: int, uses: list[_Use]) -> _Site:
        feeder = self._feeder(x)
        # Whoever else reads x, or a caller, would see what was divided.
        alone = len(self.consumers[x]) == len(uses) and x not in self.results
        return _Site({use.buffer: use for use in uses}, [feeder] if feeder else [], alone and feeder is not None)

    def undoing(self, table: _Use) -> _Site:
        """What takes the factors of a table off again: the constant that its rows are multiplied by next."""
        rows = int(table.operator.outputs[0])
        while self._alone(rows) and self._same_channels(self.consumers[rows][0]) == rows:
            rows = int(self.consumers[rows][0].outputs[0])
        scale = self._constant_of(self.consumers[rows][0]) if self._alone(rows) else None
        return _Site({}, [scale] if scale else [], scale is not None)

    def _feeder(self, tensor: int) -> _Use | None:
        """The constant that the channels (last axis) of `tensor` are proportional to."""
        operator = self.producers.get(tensor)
        # Back to the nearest product: a norm ends in one with its weight, and gelu(gate) · up is one.
        while operator is not None and self.view.code(operator) != "MUL":
            before = self._same_channels(operator)
            operator = self.producers.get(before) if self._alone(before) else None
        return self._factor(operator) if operator is not None and _is_plain(operator) else None

    def _same_channels(self, operator: Operator) -> int:
        """The input of `operator` that its output's channels are proportional to, −1 if there is none."""
        code, result = self.view.code(operator), self.view.shape(int(operator.outputs[0]))
        # Attention mixes rows of v by scores: channels of the result are those of its right operand, unless transposed.
        if code == PRODUCT:
            return -1 if operator.builtinOptions.adjY else int(operator.inputs[1])
        moved = int(operator.inputs[0]) if code in _MOVES else -1
        return moved if moved >= 0 and self.view.shape(moved)[-1:] == result[-1:] else -1

    def _factor(self, product: Operator) -> _Use | None:
        """Of a product of two: its constant, or one factor's constant or rows."""
        feeder = self._constant_of(product)
        makers = [self.producers.get(int(tensor)) for tensor in product.inputs if self._alone(int(tensor))]
        for maker in (maker for maker in makers if maker is not None and _is_plain(maker)):
            if feeder is None and self.view.code(maker) == "MUL":
                feeder = self._constant_of(maker)
            if feeder is None and self._is_layer(maker) and not _has_bias(maker):
                feeder = _Use(self.view, maker, 1)
        return feeder

    def _constant_of(self, operator: Operator) -> _Use | None:
        """The constant of a product that has as many channels as a row of it, or is one number."""
        if self.view.code(operator) != "MUL" or not _is_plain(operator):
            return None
        width = self.view.shape(int(operator.outputs[0]))[-1:]
        for place, tensor in enumerate(int(i) for i in operator.inputs):
            # A scalar becomes a vector when it takes the factors. Of width 1 nothing can be evened out.
            if self.view.is_constant(tensor) and self.view.shape(tensor) in ((), (1,), width) and width != (1,):
                return _Use(self.view, operator, place)
        return None

    def _alone(self, tensor: int) -> bool:
        """Whether one operator reads `tensor`, and no caller does."""
        return tensor >= 0 and len(self.consumers.get(tensor, [])) == 1 and tensor not in self.results

    def _is_layer(self, operator: Operator) -> bool:
        if self.view.code(operator) != LINEAR:
            return False
        weight = int(operator.inputs[1])
        return self.view.is_constant(weight) and self.view.type_of(weight) == "FLOAT32"


def _is_plain(operator: Operator) -> bool:
    """Whether no activation function is fused into `operator`."""
    return not getattr(operator.builtinOptions, "fusedActivationFunction", 0)


def _has_bias(operator: Operator) -> bool:
    return len(operator.inputs) > 2 and int(operator.inputs[2]) >= 0


# --- changing


def _factors(site: _Site, strength: float) -> Factors:
    """Powers of two by column, from the columns' mean squares over all matrices."""
    # One set of factors for all that read the channels: q, k and v divide the same norm.
    total = sum((_squares(use) for use in site.matrices.values()), np.zeros(()))
    exponents = np.zeros(total.shape)
    # A column of zeros has no size to even out, and its logarithm would be infinite.
    used = total > 0
    sizes = -0.5 * strength * np.log2(total[used])
    # Without the mean the factors would grow or shrink all weights, which changes no rounding and strains ranges.
    exponents[used] = sizes - sizes.mean() if sizes.size else 0.0
    whole = np.clip(np.rint(exponents), -_LARGEST_EXPONENT, _LARGEST_EXPONENT)
    # Powers of two: multiplying and dividing by them changes exponents alone, so in float nothing changes at all.
    factors: Factors = np.exp2(whole).astype(np.float32)
    return factors


def _squares(matrix: _Use) -> NDArray[np.float64]:
    """Each column's sum of squares."""
    blocks = matrix.view.blocks(matrix.tensor).each(lambda block: np.square(block, dtype=np.float64).sum(axis=0))
    total: NDArray[np.float64] = sum(blocks, np.zeros(()))
    return total


def _apply(site: _Site, factors: Factors) -> None:
    for use in site.matrices.values():
        _change(use, lambda block, _: block * factors)
    # Once per buffer: signatures share it.
    for use in {feeder.buffer: feeder for feeder in site.feeders if feeder.is_matrix}.values():
        _change(use, lambda block, row: block / factors[row : row + len(block), None])
    _divide((feeder for feeder in site.feeders if not feeder.is_matrix), factors)


def _change(use: _Use, change: Callable[[Array, int], Array]) -> None:
    use.view.set_constant(use.tensor, use.view.blocks(use.tensor).map(np.float32, change))


def _divide(feeders: Iterable[_Use], factors: Factors) -> None:
    """Give each operator a constant of its own, once for all signatures: others may read the one it has."""
    divided: dict[int, int] = {}
    for use in feeders:
        view, values = use.view, use.view.constant(use.tensor) / factors
        if use.buffer not in divided:
            divided[use.buffer] = view.add_buffer(values)
        # The name of old: it stands in files, whose bytes are to stay.
        tensor = view.add_tensor(f"{view.operator_name(use.operator)};folded", "FLOAT32", values.shape)
        view.main.tensors[tensor].buffer = divided[use.buffer]
        use.operator.inputs[use.place] = tensor
