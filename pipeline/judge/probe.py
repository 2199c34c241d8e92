"""A decoder that answers with what it was given, in numbers: it makes a measuring instrument of LiteRT-LM.

The runtime gives text alone. This decoder keeps in its cache, at the positions that it is told, a few numbers of what
it is given there: sums of soft token and of per-layer inputs, each with signs of its own, so that no column goes
unseen, and how many positions the mask lets it see. Then it answers with values out of the cache, four letters each: 20
bits in base 32. Which value and which digit go by the answer's position alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipeline.tflite.graph import Graph
from pipeline.tflite.lazy import Array

DIGITS, BASE = 4, 32
"""Letters of a value, and how many letters there are."""
VALUES = 64
"""In an answer."""
PREFILL = 128
_STEPS = BASE**DIGITS
_SPAN, _REACH = 16.0, 6.0
"""Values stand in −8 … 8, and their scales are such that the largest that is right is 6: steps of 1.5e-5."""
_SOFT, _PER_LAYER = 16, 7
"""Sums that are kept of a position's soft token, and of its per-layer inputs."""
_NEAR = (4, 16, 64)
"""Rows from the first soft token on among which values are taken in turns: short sounds have a few alone."""
_SEED = 20261130
Doubles = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Given:
    """What the decoder should be given: by name of a picture or sound its vectors [n, H], from position `start` on.

    And per-layer inputs [layers, D] at all of them; of a model without these they are empty. `whole`: each of the
    vectors sees all of them.
    """

    start: int
    vectors: Mapping[str, NDArray[np.float32]]
    per_layer: NDArray[np.float32]
    whole: bool = False


@dataclass(frozen=True)
class Probe:
    """The decoder for a cache of `length` positions; its answers are in the tokens `letters` of a `vocabulary`.

    It has a signature for each of the lengths `prefills`.
    """

    given: Given
    length: int
    letters: Sequence[int]
    vocabulary: int
    prefills: Sequence[int] = (PREFILL,)
    soft: Array = field(init=False)
    """[16, H]: the signs of the sums, and their scale."""
    per_layer: Array = field(init=False)
    """[7, P], the same."""
    places: NDArray[np.int64] = field(init=False)
    """[64, 2]: row, from the first soft token on, and column of each value that is spelt."""

    def __post_init__(self) -> None:
        # Signs, not single columns: whatever column is off, every sum shows it.
        draw = np.random.default_rng(_SEED)
        rows = np.concatenate([*self.given.vectors.values()])
        object.__setattr__(self, "soft", _signs(draw, _SOFT, rows))
        object.__setattr__(self, "per_layer", _signs(draw, _PER_LAYER, self.given.per_layer.reshape(1, -1)))
        object.__setattr__(self, "places", _places(max(map(len, self.given.vectors.values())), len(self.per_layer)))

    @property
    def columns(self) -> int:
        """Numbers that are kept of a position: of soft tokens, of per-layer inputs, and what it sees."""
        return len(self.soft) + len(self.per_layer) + 1

    @property
    def seen(self) -> int:
        """The column of the positions that a position sees."""
        return self.columns - 1

    @property
    def step(self) -> float:
        """What one position more is in that column."""
        return _REACH / self.length

    def expected(self, name: str) -> Doubles:
        """[n, columns]: what is kept of the vectors of a picture or sound, if all is right."""
        soft = self.given.vectors[name].astype(np.float64) @ self.soft.T
        inputs = np.tile(self.given.per_layer.ravel().astype(np.float64) @ self.per_layer.T, (len(soft), 1))
        last = np.full(len(soft), len(soft) - 1) if self.given.whole else np.arange(len(soft))
        sees = (self.given.start + 1 + last)[:, None] * self.step
        return np.concatenate([soft, inputs, sees], axis=1)

    def read(self, text: str, alphabet: str, position: int) -> tuple[NDArray[np.int64], Doubles]:
        """What an answer says whose first letter stands behind `position`: places [n, 2] and values [n]."""
        digits = [alphabet.index(letter) for letter in text]
        # An answer begins within a value wherever its prompt's length says so; that value comes again at the end.
        skipped = -position % DIGITS
        whole = digits[skipped : len(digits) - (len(digits) - skipped) % DIGITS]
        numbers = np.array(whole).reshape(-1, DIGITS) @ BASE ** np.arange(DIGITS)[::-1]
        first = (position + skipped) // DIGITS
        places = self.places[(first + np.arange(len(numbers))) % VALUES]
        return places, numbers / _STEPS * _SPAN - _SPAN / 2

    def graph(self) -> Graph:
        """As a TFLite model with the signatures that LiteRT-LM looks for."""
        graph = Graph.empty()
        _Part(graph, self, 1).build()
        for tokens in self.prefills:
            _Part(graph.another(), self, tokens).build()
        return graph


def _signs(draw: np.random.Generator, count: int, rows: Array) -> Array:
    """[count, width]: signs times the scale that brings the largest sum of `rows` to what is within reach."""
    if not rows.size:
        return np.zeros((0, rows.shape[1]), np.float32)
    signs = draw.choice([-1.0, 1.0], (count, rows.shape[1]))
    largest = np.abs(rows.astype(np.float64) @ signs.T).max()
    return (signs * (_REACH / (largest or 1.0))).astype(np.float32)


def _places(longest: int, per_layer: int) -> NDArray[np.int64]:
    """Of eight values six are of soft tokens, one is of per-layer inputs (if there are any), one is what is seen."""
    places, counts = [], [0, 0, 0]
    for value in range(VALUES):
        kind = {6: 1 if per_layer else 0, 7: 2}.get(value % 8, 0)
        turn, near = divmod(counts[kind], len(_NEAR) + 1)
        # Of the longest from its end on: the vector behind a picture is another table's.
        row = turn * 7 % _NEAR[near] if near < len(_NEAR) else max(0, longest - 1 - turn * (longest // 12))
        first, count = ((0, _SOFT), (_SOFT, per_layer), (_SOFT + per_layer, 1))[kind]
        places.append((row, first + counts[kind] % count))
        counts[kind] += 1
    return np.array(places)


class _Part:
    """One signature, for so many `tokens` at once."""

    def __init__(self, graph: Graph, probe: Probe, tokens: int) -> None:
        self.graph, self.probe, self.tokens = graph, probe, tokens

    def build(self) -> None:
        """Put operators and signature into the graph."""
        probe, tokens, length = self.probe, self.tokens, self.probe.length
        width = probe.soft.shape[1]
        shapes = {
            "embeddings": ("FLOAT32", (1, tokens, width)),
            "input_pos": ("INT32", (tokens,)),
            "mask": ("FLOAT32", (1, 1, tokens, length)),
            "kv_cache_k_0": ("FLOAT32", (1, 1, length, probe.columns)),
            "kv_cache_v_0": ("FLOAT32", (1, 1, 1, length)),
        }
        if probe.given.per_layer.size:
            shapes["per_layer_embeddings"] = ("FLOAT32", (1, tokens, *probe.given.per_layer.shape))
        taken = {name: self.graph.add_tensor(name, *shape) for name, shape in shapes.items()}
        kept = self._kept(taken)
        values = taken["kv_cache_v_0"]
        made = {"kv_cache_k_0": kept, "kv_cache_v_0": self._then("ADD", [values, values], (1, 1, 1, length))}
        if tokens == 1:
            made["logits"] = self._spelt(kept, taken["input_pos"])
        self.graph.main.inputs, self.graph.main.outputs = [*taken.values()], [*made.values()]
        self.graph.add_signature("decode" if tokens == 1 else f"prefill_{tokens}", taken, made)

    def _kept(self, taken: Mapping[str, int]) -> int:
        """The cache with the numbers of what is given, at the positions that are."""
        tokens, length, columns = self.tokens, self.probe.length, self.probe.columns
        given = self._then("CONCATENATION", self._numbers(taken), (tokens, columns), axis=1)
        position = self._then("RESHAPE", [taken["input_pos"], self._ints(1, tokens)], (1, tokens), "INT32")
        # By what the runtime says of positions, not by order: a vector that it puts elsewhere is read elsewhere.
        rows = self._constant(np.arange(length, dtype=np.int32)[:, None])
        there = self._then("EQUAL", [rows, position], (length, tokens), "BOOL")
        hit = self._then("CAST", [there], (length, tokens))
        any_ = self._then("REDUCE_MAX", [hit, self._ints(1)], (length, 1), keepDims=True)
        # Rows of padding are all told position 0, where nothing is read.
        old = self._then("SUB", [self._float(1.0), any_], (length, 1))
        held = self._then("MUL", [taken["kv_cache_k_0"], old], (1, 1, length, columns))
        new = self._then("BATCH_MATMUL", [hit, given], (length, columns))
        return self._then("ADD", [held, new], (1, 1, length, columns))

    def _numbers(self, taken: Mapping[str, int]) -> list[int]:
        """What is kept of each token: [T, 16], [T, 7] and [T, 1]."""
        tokens, length, made = self.tokens, self.probe.length, []
        for name, signs in (("embeddings", self.probe.soft), ("per_layer_embeddings", self.probe.per_layer)):
            if signs.size:
                flat = self._shaped(taken[name], (tokens, signs.shape[1]))
                made.append(self._then("FULLY_CONNECTED", [flat, self._constant(signs), -1], (tokens, len(signs))))
        # The mask is 0 where a token sees, and far below where it does not.
        hidden = self._then("MAXIMUM", [taken["mask"], self._float(-1.0)], (1, 1, tokens, length))
        count = self._then("SUM", [hidden, self._ints(3)], (1, 1, tokens), keepDims=False)
        seen = self._then("ADD", [self._shaped(count, (tokens, 1)), self._float(float(length))], (tokens, 1))
        return [*made, self._then("MUL", [seen, self._float(self.probe.step)], (tokens, 1))]

    def _spelt(self, kept: int, position: int) -> int:
        """The logits of the letter that the answer has behind `position`."""
        probe = self.probe
        value = self._then("FLOOR_DIV", [position, self._ints(DIGITS)], (1,), "INT32")
        value = self._then("FLOOR_MOD", [value, self._ints(VALUES)], (1,), "INT32")
        digit = self._then("FLOOR_MOD", [position, self._ints(DIGITS)], (1,), "INT32")
        flat = self._shaped(kept, (probe.length * probe.columns,))
        rows = np.minimum(probe.given.start + probe.places[:, 0], probe.length - 1)
        # One number of the cache, as GATHER takes it: by its place in all of it.
        places = self._constant((rows * probe.columns + probe.places[:, 1]).astype(np.int32))
        held = self._then("GATHER", [flat, self._then("GATHER", [places, value], (1,), "INT32")], (1,))
        scaled = self._then("MUL", [held, self._float(_STEPS / _SPAN)], (1,))
        whole = self._then("ROUND", [self._then("ADD", [scaled, self._float(_STEPS / 2)], (1,))], (1,))
        whole = self._then("MAXIMUM", [whole, self._float(0.0)], (1,))
        whole = self._then("MINIMUM", [whole, self._float(_STEPS - 1.0)], (1,))
        number = self._then("CAST", [whole], (1,), "INT32")
        units = self._constant((BASE ** np.arange(DIGITS)[::-1]).astype(np.int32))
        unit = self._then("GATHER", [units, digit], (1,), "INT32")
        number = self._then("FLOOR_DIV", [number, unit], (1,), "INT32")
        number = self._then("FLOOR_MOD", [number, self._ints(BASE)], (1,), "INT32")
        letters = self._constant(np.array(probe.letters, np.int32))
        token = self._then("GATHER", [letters, number], (1,), "INT32")
        # Not a table of 32 rows as wide as the vocabulary, which would be larger than all else.
        every = self._constant(np.arange(probe.vocabulary, dtype=np.int32))
        chosen = self._then("EQUAL", [every, token], (probe.vocabulary,), "BOOL")
        logits = self._then("CAST", [chosen], (probe.vocabulary,))
        return self._shaped(
            self._then("MUL", [logits, self._float(20.0)], (probe.vocabulary,)), (1, 1, probe.vocabulary)
        )

    def _then(
        self, code: str, inputs: Sequence[int], shape: Sequence[int], kind: str = "FLOAT32", **settings: int | bool
    ) -> int:
        result = self.graph.add_tensor(f"{code.lower()}_{len(self.graph.main.tensors)}", kind, shape)
        self.graph.main.operators.append(self.graph.operator(code, inputs, [result], **settings))
        return result

    def _shaped(self, tensor: int, shape: Sequence[int]) -> int:
        return self._then("RESHAPE", [tensor, self._ints(*shape)], shape)

    def _constant(self, values: Array) -> int:
        return self.graph.add_constant(values, f"constant_{len(self.graph.main.tensors)}")

    def _ints(self, *values: int) -> int:
        return self._constant(np.array(values, np.int32))

    def _float(self, value: float) -> int:
        return self._constant(np.array(value, np.float32))
