"""The bare sections of a bundle as LiteRT-LM runs them: tokens through the embedders and the decoder, with the cache.

LiteRT-LM gives no logits, so they are judged here, on the same files, in the LiteRT interpreter.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.core import log, parallel, recipe
from pipeline.core.errors import VerificationError
from pipeline.runtime.interface import Array, Interpreter, Model, Value
from pipeline.runtime.litert import MappedModel, litert

Cache = dict[str, Value]
"""A conversation's cache by input name: arrays, or LiteRT's buffers where the decoder is a `MappedModel`."""
Token = int | NDArray[np.float32]
"""A token's id, or the vector that stands for what is none, as a part of a picture: [H]."""
DECODER, EMBEDDER, PER_LAYER = recipe.DECODER, "embedder.tflite", "per_layer_embedder.tflite"
_REPACKED = 3e8
"""Bytes per second, roughly, at which XNNPACK lays out weights anew when a file is opened."""
# What LiteRT-LM 0.18 writes where a token may not look: 0.7 times the lowest float32.
_MASKED = np.float32(-0.7 * np.finfo(np.float32).max)
_PREFILL = re.compile(r"prefill_(\d+)")
_ANY = "prefill"
"""The signature for any number of tokens that a decoder has whose cache grows."""
_GROWTH = 16
"""Positions by which a cache grows at least, as in LiteRT-LM."""


class Conversation:
    """One conversation's cache and position; several can share the open `Sections`."""

    def __init__(self, sections: Sections) -> None:
        self.sections = sections
        self.position = 0
        self.cache = sections.empty_cache()

    def reset(self) -> None:
        """Start again at position 0 with the cache as it is: what it holds must not matter."""
        self.position = 0

    def prefill(self, tokens: Sequence[Token]) -> None:
        """Put `tokens` into the cache, in one call of the shortest prefill signature that holds them.

        A cache that grows is as long as what it holds, rounded up; what it held stays.

        Raises:
            VerificationError: no signature does, or the cache is full.
        """
        self._run(self.sections.signature_for(len(tokens)), tokens)

    def decode(self, token: Token) -> NDArray[np.float32]:
        """Put `token` into the cache and return the logits [V] of what follows it."""
        logits: NDArray[np.float32] = _array(self._run("decode", [token])["logits"])[0, 0]
        return logits

    def _run(self, signature: str, tokens: Sequence[Token]) -> dict[str, Value]:
        self.cache = self.sections.grown(self.cache, self.position + len(tokens))
        outputs = self.sections.run(signature, tokens, self.position, self.cache)
        self.cache |= {name: value for name, value in outputs.items() if name.startswith("kv_cache_")}
        self.position += len(tokens)
        return outputs


class Sections:
    """The open sections in one folder."""

    def __init__(
        self,
        folder: Path,
        *,
        weights: Path | None = None,
        threads: int | None = None,
        xnnpack: bool = True,
        decoder: Interpreter | None = None,
        whole: bool = False,
    ) -> None:
        """Open `folder`'s decoder and what embedders stand beside it.

        Args:
            folder: where they are.
            weights: the file for the decoder's weights as XNNPACK repacks them, which otherwise take memory.
            threads: how many threads run the kernels (default: `parallel.threads`).
            xnnpack: whether the XNNPACK delegate runs what it can.
            decoder: an interpreter of the decoder, where that is open already.
            whole: whether vectors that stand side by side, those of a picture, see each other.
        """
        self._whole = whole
        threads = threads or parallel.threads()

        def open_file(name: str) -> Interpreter:
            return litert(folder / name, xnnpack=xnnpack, threads=threads)

        self._mapped: MappedModel | None = None
        if decoder is None:
            with log.waiting(f"opening {folder.name}/{DECODER}", (folder / DECODER).stat().st_size / _REPACKED):
                if weights:
                    self._mapped = MappedModel(folder / DECODER, weights, threads)
                else:
                    decoder = open_file(DECODER)
        model: Model | None = self._mapped or decoder
        assert model is not None
        self.signatures = model.get_signature_list()
        self._runners = {name: model.get_signature_runner(name) for name in self.signatures}
        self._shapes = {
            name: {key: tuple(detail["shape"]) for key, detail in runner.get_input_details().items()}
            for name, runner in self._runners.items()
        }
        embedders = {"embeddings": EMBEDDER, "per_layer_embeddings": PER_LAYER}
        self._embedders = {
            key: open_file(file).get_signature_runner()
            for key, file in embedders.items()
            if key in self._shapes["decode"]
        }

    @property
    def grows(self) -> bool:
        """Whether the cache grows with the conversation."""
        return _ANY in self.signatures

    @property
    def prefills(self) -> list[int]:
        """Tokens that each prefill signature takes, shortest first."""
        return sorted(int(match[1]) for name in self.signatures if (match := _PREFILL.fullmatch(name)))

    def signature_for(self, tokens: int) -> str:
        """The shortest prefill signature for `tokens` tokens.

        Raises:
            VerificationError: there is none.
        """
        if self.grows:
            return _ANY
        length = next((length for length in self.prefills if length >= tokens), None)
        if length is None:
            raise VerificationError(f"the decoder has no prefill signature for {tokens} tokens")
        return f"prefill_{length}"

    def empty_cache(self) -> Cache:
        """A cache of zeros; of no position where it grows."""
        shapes = self._shapes["decode"]
        kept = {name: shape for name, shape in shapes.items() if name.startswith("kv_cache_")}
        if self.grows:
            return {name: np.zeros(_resized(shape, _axis(name), 0), np.float32) for name, shape in kept.items()}
        if self._mapped:
            return {name: self._mapped.room("decode", name) for name in kept}
        return {name: np.zeros(shape, np.float32) for name, shape in kept.items()}

    def grown(self, cache: Cache, positions: int) -> Cache:
        """`cache`, or a longer one with what it holds, where it grows and has no room for `positions` positions."""
        held = self._length(cache)
        if not self.grows or held >= positions:
            return cache
        more = -(-(positions - held) // _GROWTH) * _GROWTH
        return {name: _longer(_array(value), _axis(name), more) for name, value in cache.items()}

    def _length(self, cache: Cache) -> int:
        """Positions that a conversation can have, in `cache` as it is now."""
        if not self.grows:
            return int(self._shapes["decode"]["mask"][-1])
        name = next(iter(cache))
        return int(_array(cache[name]).shape[_axis(name)])

    def run(self, signature: str, tokens: Sequence[Token], position: int, cache: Cache) -> dict[str, Value]:
        """Run `tokens` at `position` … with `cache`, padded as LiteRT-LM pads: position 0, all masked, all zero.

        The new cache is a part of what is returned; LiteRT's buffers are written in place, and given again.

        Raises:
            VerificationError: the cache has no room for them.
        """
        count, held = len(tokens), self._length(cache)
        shapes = self._called(signature, count, held)
        length = shapes["input_pos"][0]
        # The padded length: the update is one slice, which would be moved back over older tokens.
        if position + length > held:
            raise VerificationError(f"position {position} + {length} is beyond the cache of {held}")
        input_pos = np.zeros(length, np.int32)
        input_pos[:count] = np.arange(position, position + count)
        mask = np.full(shapes["mask"], _MASKED, np.float32)
        for row in range(count):
            # A token sees all before it and itself; rows of padding see nothing.
            mask[0, 0, row, : position + row + 1] = 0
        for start, stop in _vectors(tokens) if self._whole else ():
            mask[0, 0, start:stop, position + start : position + stop] = 0
        inputs: dict[str, Value] = {"input_pos": input_pos, "mask": mask, **self._embed(tokens, shapes)}
        inputs |= {name: cache[name] for name in shapes if name.startswith("kv_cache_")}
        return self._runners[signature](**inputs)

    def _called(self, signature: str, tokens: int, positions: int) -> dict[str, tuple[int, ...]]:
        """The shapes of a signature's inputs in a call for `tokens` tokens with a cache of `positions`."""
        shapes = self._shapes[signature]
        if not self.grows:
            return shapes
        kept = {
            name: shape if name.startswith("kv_cache_") else _resized(shape, 1, tokens)
            for name, shape in shapes.items()
            if name not in ("input_pos", "mask")
        }
        return {**kept, "input_pos": (tokens,), "mask": (1, 1, tokens, positions)}

    def _embed(self, tokens: Sequence[Token], shapes: dict[str, tuple[int, ...]]) -> dict[str, Array]:
        if "tokens" in shapes:
            ids = np.zeros(shapes["tokens"], np.int32)
            ids[0, : len(tokens)] = tokens
            return {"tokens": ids}
        inputs = {}
        for name, embedder in self._embedders.items():
            inputs[name] = np.zeros(shapes[name], np.float32)
            for row, token in enumerate(tokens):
                if isinstance(token, np.ndarray) and name == "embeddings":
                    inputs[name][0, row] = token
                    continue
                # Of what is no token the runtime takes token 0's per-layer inputs, as the models do.
                ids = np.array([[0 if isinstance(token, np.ndarray) else token]], np.int32)
                inputs[name][0, row] = _array(embedder(token_ids=ids)["embeddings"])[0, 0]
        return inputs


def _vectors(tokens: Sequence[Token]) -> Iterator[tuple[int, int]]:
    """Where vectors stand side by side: the first, and behind the last."""
    place = 0
    for vectors, group in itertools.groupby(tokens, lambda token: isinstance(token, np.ndarray)):
        count = len(list(group))
        if vectors:
            yield place, place + count
        place += count


def _axis(name: str) -> int:
    """Where the positions stand in a cache input: keys are [1, K, C, D], values [1, K, D, C]."""
    return 2 if name.startswith("kv_cache_k_") else 3


def _resized(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    return (*shape[:axis], size, *shape[axis + 1 :])


def _longer(values: Array, axis: int, more: int) -> Array:
    """`values` with `more` zeros behind them along `axis`."""
    return np.concatenate([values, np.zeros(_resized(values.shape, axis, more), values.dtype)], axis)


def _array(value: Value) -> Array:
    """A result that was not given room to be written into."""
    assert isinstance(value, np.ndarray)
    return value
