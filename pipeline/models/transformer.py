"""What the architectures share: norms, rotary positions, attention within a prompt or through a cache, the two graphs.

Shapes in docstrings: B batch, S sequence, H hidden size, V vocabulary, D head size, N query heads, K key/value heads,
G = N / K query heads per key/value head, T tokens of one call, C length of the cache, W sliding window, R length of a
sliding layer's cache.

Activations are carried as [B, S, 1, H]: the third axis is where heads, AltUp states and layers go, and an axis that is
already there spares the graph many reshapes.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.checkpoint.names import EMBEDDING, text_name
from pipeline.core.errors import UsageError
from pipeline.export.export import Inputs, Outputs
from pipeline.export.operators import Linear, fold, gather, linear, matmul, normalise, unfold, update
from pipeline.export.repeat import State
from pipeline.models import Tower

FULL, SLIDING = "full_attention", "sliding_attention"
# Far below any score (queries and keys are normalised, so scores stay within ± head size × the norms' weights), yet
# finite: a row with nothing to attend to must not become NaN.
MASKED = -1e9
_OWN_KV = re.compile(r"layers\.(\d+)\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\.")
TOWERS = re.compile(r"(model\.)?(vision_tower|audio_tower|embed_vision|embed_audio)\.")
"""What models that also see or hear have beside the text model."""


class Config(Protocol):
    """What the shared parts need to know of a model."""

    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def sliding_window(self) -> int | None: ...
    @property
    def layer_types(self) -> tuple[str, ...]: ...
    @property
    def final_logit_softcapping(self) -> float | None: ...

    def kv_source(self, layer: int) -> int:
        """The layer whose keys and values `layer` attends to, usually itself."""

    def kv_shape(self, kind: str) -> tuple[int, int]:
        """Key/value heads of the layers of type `kind`, K, and their size, D."""


class RMSNorm(nn.Module):
    """factor · (offset + weight) · x / √(mean(x²) + ε) over the last axis; without `weight` if it is not scaled."""

    def __init__(self, size: int, eps: float, *, scaled: bool = True, factor: float = 1.0, offset: float = 0.0) -> None:
        super().__init__()
        self.eps, self.factor, self.offset = eps, factor, offset
        self.weight = nn.Parameter(torch.ones(size)) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = normalise(x, self._factors(), self.eps)
        return normed

    def _factors(self) -> Tensor | None:
        if self.weight is None:
            return None
        return (self.weight + self.offset) * self.factor if self.offset else self.weight * self.factor


@dataclass(frozen=True)
class Rotation:
    """Cosine and signed sine of the rotary position embedding, each [B, S, 1, D]."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, positions: Tensor, theta: float, head_dim: int, factor: float = 1.0) -> Rotation:
        """Angles positions / (factor · theta^(2i/D)); `positions` is float [B, S].

        Su et al., RoFormer, 2021; `factor` is linear scaling (Chen et al., Position Interpolation, 2023).
        """
        # On the CPU, also where the module is on the meta device: the values become constants of the graph.
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
        return cls.of(positions, 1.0 / (theta**exponents) / factor)

    @classmethod
    def of(cls, positions: Tensor, frequencies: Tensor) -> Rotation:
        """Angles positions · frequencies, float [B, S] and [D / 2], in radians."""
        angles = positions[:, :, None, None] * frequencies
        cos, sin = torch.cos(angles), torch.sin(angles)
        # The sign stands in the sine, so that `apply` swaps halves and negates nothing.
        return cls(torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1))

    def scaled(self, factor: float) -> Rotation:
        """The same, and what is rotated multiplied with `factor`."""
        return self if factor == 1.0 else Rotation(self.cos * factor, self.sin * factor)

    def apply(self, x: Tensor) -> Tensor:
        """Rotate [B, S, heads, D]: the first half of D against the second."""
        half = x.shape[-1] // 2
        return x * self.cos + torch.cat((x[..., half:], x[..., :half]), dim=-1) * self.sin


torch.export.register_dataclass(Rotation)


def gelu(x: Tensor) -> Tensor:
    """GELU by its tanh formula, the activation of all Gemma models."""
    return functional.gelu(x, approximate="tanh")


class GatedMLP(nn.Module):
    """down(activation(gate x) · up x). [B, S, 1, H] → [B, S, 1, H], in between `width` wide."""

    def __init__(self, size: int, width: int, activation: Callable[[Tensor], Tensor], *, bias: bool = False) -> None:
        super().__init__()
        self.activation = activation
        self.gate_proj = Linear(size, width, bias=bias)
        self.up_proj = Linear(size, width, bias=bias)
        self.down_proj = Linear(width, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return product


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, S, 1, heads · D] → [B, S, heads, D]."""
    return x.reshape(x.shape[0], x.shape[1], heads, x.shape[-1] // heads)


class Attend(State, Protocol):
    """Where a layer's keys and values go, and what its queries see."""

    def __call__(self, layer: int, queries: Tensor, own: tuple[Tensor, Tensor] | None) -> Tensor:
        """Mix values for `queries` [B, S, N, D] → [B, S, 1, N · D].

        `own` are the layer's keys and values, each [B, S, K, D]; None if it attends to those of `kv_source(layer)`.
        """


class PromptAttention:
    """Attention among the tokens of whole prompts, batch and sequence unknown."""

    def __init__(self, config: Config, masks: Mapping[str, Tensor]) -> None:
        """`masks` by layer type, bool [B, S, S]: which keys a query sees."""
        self.config = config
        self.masks = {kind: _additive(mask) for kind, mask in masks.items()}
        self.attended: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, layer: int, queries: Tensor, own: tuple[Tensor, Tensor] | None) -> Tensor:
        """As `Attend`."""
        if own:
            self.attended[layer] = self._repeat(own[0]), self._repeat(own[1])
        keys, values = self.attended[self.config.kv_source(layer)]
        scores = matmul(queries.transpose(1, 2), keys, True) + self.masks[self.config.layer_types[layer]]
        mixed = matmul(torch.softmax(scores, dim=-1), values, False)
        width = queries.shape[2] * queries.shape[3]
        return mixed.transpose(1, 2).reshape(queries.shape[0], queries.shape[1], 1, width)

    def kind(self, index: int) -> tuple[object, ...]:
        """As `State`."""
        return self.config.layer_types[index], self.config.kv_source(index) == index

    def taken(self, index: int) -> list[Tensor]:
        """As `State`: keys and values of another layer."""
        return list(self.attended.get(self.config.kv_source(index), ()))

    def given(self, index: int, taken: Sequence[Tensor]) -> PromptAttention:
        """As `State`."""
        alone = copy.copy(self)
        alone.attended = {self.config.kv_source(index): (taken[0], taken[1])} if taken else {}
        return alone

    def left(self, index: int) -> list[Tensor]:
        """As `State`."""
        return list(self.attended[index]) if index in self.attended else []

    def leave(self, index: int, left: Sequence[Tensor]) -> None:
        """As `State`."""
        if left:
            self.attended[index] = left[0], left[1]

    def _repeat(self, x: Tensor) -> Tensor:
        """[B, S, K, D] → [B, N, S, D], each head G times.

        By concatenation: an `expand` to a symbolic batch fails at run time. Folding the G query heads into S instead
        would repeat nothing, but merging two unknown dimensions makes torch.export guard on their values.
        """
        groups = self.config.num_attention_heads // x.shape[2]
        shape = (x.shape[0], x.shape[1], self.config.num_attention_heads, x.shape[3])
        return torch.cat([x] * groups, dim=-1).reshape(shape).transpose(1, 2)


class CacheAttention:
    """Attention of T tokens at positions p … p + T − 1 of one conversation to everything up to themselves.

    A cache holds keys [1, K, C, D] and values [1, K, D, C] of each layer that has its own: both products then read
    their second operand along its rows. Those of sliding layers hold R ≤ C positions, as many as W and the longest call
    need: a ring, in which position p stands at p mod R. So neither their memory nor their cost grows with C.
    """

    def __init__(self, config: Config, input_pos: Tensor, mask: Tensor, cache: Mapping[str, Tensor]) -> None:
        """Take what the runtime gives.

        Args:
            config: the model's.
            input_pos: int32 [T]; the first is p, those of padding are 0.
            mask: float [1, 1, T, C], 0 where the query may look, far below zero elsewhere.
            cache: `k_<layer>` and `v_<layer>` of every layer with keys and values of its own.
        """
        self.config, self.cache = config, dict(cache)
        self.tokens, self.length = mask.shape[2], mask.shape[3]
        self.first = input_pos[:1]
        self.zero = torch.zeros(1, dtype=torch.int32)
        self.attended: dict[int, tuple[Tensor, Tensor]] = {}
        self.masks = {FULL: self._tiled(mask, FULL)}
        if SLIDING in config.layer_types:
            sliding = next(i for i, kind in enumerate(config.layer_types) if kind == SLIDING)
            self.ring = cache[f"k_{sliding}"].shape[2]
            slot, index = torch.remainder(self.first, self.ring), torch.arange(0, self.tokens, dtype=torch.int32)
            # T tokens are written at once, and as many of them as that is too early go round to the front.
            self.begin = torch.minimum(slot, torch.tensor(self.ring - self.tokens, dtype=torch.int32))
            round_ = slot - self.begin
            self.goes = torch.where(torch.lt(index, round_), torch.tensor(1.0), torch.tensor(0.0))
            self.turned, self.there = torch.remainder(index - round_, self.tokens), self.begin + index
            self.masks[SLIDING] = self._tiled(self._sliding_mask(input_pos, mask), SLIDING)

    def __call__(self, layer: int, queries: Tensor, own: tuple[Tensor, Tensor] | None) -> Tensor:
        """As `Attend`, with B = 1 and S = T."""
        kind = self.config.layer_types[layer]
        if own:
            self.attended[layer] = self._store(layer, *own)
        keys, values = self.attended[self.config.kv_source(layer)]
        # Query heads that share keys become rows of one product, nothing is repeated.
        scores = matmul(fold(queries, self.config.kv_shape(kind)[0]), keys, True) + self.masks[kind]
        mixed = matmul(torch.softmax(scores, dim=-1), values, True)
        return unfold(mixed, self.config.num_attention_heads)

    def kind(self, index: int) -> tuple[object, ...]:
        """As `State`."""
        return self.config.layer_types[index], self.config.kv_source(index) == index

    def taken(self, index: int) -> list[Tensor]:
        """As `State`: the layer's cache, or keys and values of another layer."""
        source = self.config.kv_source(index)
        return list(self._own(index) if source == index else self.attended[source])

    def given(self, index: int, taken: Sequence[Tensor]) -> CacheAttention:
        """As `State`."""
        alone, source = copy.copy(self), self.config.kv_source(index)
        alone.cache = {f"k_{index}": taken[0], f"v_{index}": taken[1]} if source == index else {}
        alone.attended = {} if source == index else {source: (taken[0], taken[1])}
        return alone

    def left(self, index: int) -> list[Tensor]:
        """As `State`: the new cache, and what is read of it."""
        return [*self._own(index), *self.attended[index]] if index in self.attended else []

    def leave(self, index: int, left: Sequence[Tensor]) -> None:
        """As `State`."""
        if left:
            self.cache[f"k_{index}"], self.cache[f"v_{index}"] = left[:2]
            self.attended[index] = left[2], left[3]

    def _own(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.cache[f"k_{layer}"], self.cache[f"v_{layer}"]

    def _store(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values [1, T, K, D] of the new tokens into the cache; the new cache, which the layer reads."""
        round_ = self.config.layer_types[layer] == SLIDING and self.ring < self.length
        write = self._write_round if round_ else self._write
        keys = write(self.cache[f"k_{layer}"], keys, (0, 2, 1, 3))
        values = write(self.cache[f"v_{layer}"], values, (0, 2, 3, 1))
        self.cache[f"k_{layer}"], self.cache[f"v_{layer}"] = keys, values
        return keys, values

    def _write(self, cache: Tensor, new: Tensor, order: tuple[int, ...]) -> Tensor:
        """`cache` with `new` [1, T, K, D], whose axes it has in another order, at the tokens' positions."""
        return update(cache, new.permute(order), self._place(self.first, order.index(1)))

    def _write_round(self, cache: Tensor, new: Tensor, order: tuple[int, ...]) -> Tensor:
        """The same in a ring, by two writes of T positions: to `begin`, and to the front."""
        axis = order.index(1)
        if self.tokens == 1:
            return update(cache, new.permute(order), self._place(self.begin, axis))
        # What goes round stands in front, as it will there, and the others follow as they will at `begin`. By GATHER:
        # GPUs run no SLICE that begins where a tensor says (LiteRT.js 2.5.3).
        turned = gather(new, self.turned, 1).permute(order)
        goes = self.goes.reshape([self.tokens if i == axis else 1 for i in range(4)])
        stays = 1.0 - goes  # products, since the kernel of SELECT_V2 takes ten times as long
        behind = gather(cache, self.there, axis) * goes + turned * stays
        written = update(cache, behind, self._place(self.begin, axis))
        front = written.narrow(axis, 0, self.tokens) * stays + turned * goes
        # No constant, though always 0: of those GPUs make nothing either.
        return update(written, front, self._place(torch.minimum(self.first, self.zero), axis))

    def _place(self, at: Tensor, axis: int) -> Tensor:
        """Where a part of a cache begins: `at` along `axis`, int32 [4]."""
        return torch.cat([at if i == axis else self.zero for i in range(4)])

    def _sliding_mask(self, input_pos: Tensor, mask: Tensor) -> Tensor:
        """[1, 1, T, C] → [1, 1, T, R] for what the ring holds, with what is W or more behind the query masked as well.

        A slot holds the newest position that stands there, up to the call's last; where that is none yet its first
        one, which lies ahead. What padding left in it is the position that was written over for it: W behind by now.
        """
        position = torch.arange(0, self.ring, dtype=torch.int32)
        if self.ring < self.length:
            last = self.first + (self.tokens - 1)
            position = torch.maximum(last - torch.remainder(last - position, self.ring), position)
            mask = gather(mask, position, 3)
        distance = input_pos[:, None] - position[None]
        assert self.config.sliding_window is not None
        far = torch.gt(distance, torch.tensor(self.config.sliding_window - 1, dtype=torch.int32))
        return torch.where(far[None, None], torch.tensor(MASKED), mask)

    def _tiled(self, mask: Tensor, kind: str) -> Tensor:
        """[1, 1, T, n] → [1, 1, G · T, n], for layers of type `kind`."""
        groups = self.config.num_attention_heads // self.config.kv_shape(kind)[0]
        return torch.cat([mask] * groups, dim=2) if groups > 1 else mask


class Head(nn.Module):
    """Logits by the token embedding or a matrix of the head's own, soft-capped: cap · tanh(x / cap)."""

    def __init__(self, cap: float | None) -> None:
        super().__init__()
        self.cap = cap

    @property
    def factor(self) -> float:
        """What hidden states are to be multiplied with on the way in.

        Dividing by the cap before the head, not after it: the converter folds a factor on the head's output into a
        second copy of the tied embedding.
        """
        return 1 / self.cap if self.cap else 1.0

    def forward(self, hidden: Tensor, table: Tensor) -> Tensor:
        """[B, S, H] (times `factor`) and the matrix [V, H] → [B, S, V]."""
        logits = linear(hidden, table)
        return torch.tanh(logits) * self.cap if self.cap else logits


def own_head(config: Config) -> Linear:
    """A head that is not the embedding: a matrix [V, H]."""
    return Linear(config.hidden_size, config.vocab_size, bias=False)


def head_matrix(graph: StepGraph | DecoderGraph) -> Tensor:
    """What gives the logits, [V, H]: the graph's own head, else its model's embedding."""
    matrix: Tensor = (graph.model.embed_tokens if graph.lm_head is None else graph.lm_head).weight
    return matrix


class StepGraph(nn.Module):
    """Next-token logits of whole prompts, any batch and length, left or right padding."""

    def __init__(self, model: Any, all_positions: bool = False, *, tied: bool = True) -> None:
        """`model` has `config`, `embed_tokens`, `embed(ids)`, and maps (positions, attend, *embedded) to states.

        Logits of `all_positions` instead of the last one's: what tune measures on. `tied`: the embedding is the head.
        """
        super().__init__()
        self.model, self.all_positions = model, all_positions
        self.head = Head(model.config.final_logit_softcapping)
        self.lm_head = None if tied else own_head(model.config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Logits of each row's last attended position.

        Args:
            input_ids: int32 [B, S] token ids; what stands at masked positions does not matter.
            attention_mask: int32 [B, S], 1 for tokens and 0 for padding.

        Returns:
            `logits`, float32 [B, V]; of every position, [B, S, V].
        """
        config = self.model.config
        attended = attention_mask.to(torch.float32)
        index = torch.arange(0, attention_mask.shape[1], dtype=torch.int32).to(torch.float32)
        distance = index[None, :, None] - index[None, None, :]  # query − key, [1, S, S]
        causal = torch.gt(distance, torch.tensor(-0.5)) & torch.gt(attended[:, None, :], torch.tensor(0.5))
        masks = {FULL: causal}
        if config.sliding_window is not None:
            masks[SLIDING] = causal & torch.lt(distance, torch.tensor(config.sliding_window - 0.5))
        attend = PromptAttention(config, masks)
        hidden = self.model(_positions(causal), attend, *self.model.embed(input_ids))
        if self.all_positions:
            scaled = hidden * self.head.factor if self.head.cap else hidden
            return {"logits": self.head(scaled, head_matrix(self)).squeeze(2)}
        # Before the head: of 2,048 positions a caller wants one, and the head is the largest product.
        chosen = self._last(hidden, attended, distance, self.head.factor)
        return {"logits": self.head(chosen, head_matrix(self)).squeeze(1)}

    @staticmethod
    def _last(hidden: Tensor, attended: Tensor, distance: Tensor, factor: float) -> Tensor:
        """[B, S, 1, H] → [B, 1, H] at each row's last attended position, so that the head runs on one position only.

        A product with a row that is `factor` there and 0 elsewhere: free of the negative index, which lowers to an
        empty slice (litert-torch 0.10.0).
        """
        after = torch.where(torch.lt(distance, torch.tensor(-0.5)), torch.tensor(1.0), torch.tensor(0.0))
        later = torch.sum(after * attended[:, None, :], dim=-1)
        last = torch.where(torch.gt(later, torch.tensor(0.5)), torch.tensor(0.0), attended * factor)
        return matmul(last[:, None, :], hidden.squeeze(2), False)


class DecoderGraph(nn.Module):
    """One call of LiteRT-LM: T tokens through the cache, with logits (T = 1, `decode`) or without (`prefill_<T>`)."""

    def __init__(self, model: Any, logits: bool, *, tied: bool = True) -> None:
        """`model` and `tied` as for `StepGraph`."""
        super().__init__()
        self.model, self.logits = model, logits
        self.head = Head(model.config.final_logit_softcapping)
        self.lm_head = own_head(model.config) if logits and not tied else None

    def run(
        self, embedded: tuple[Tensor, ...], input_pos: Tensor, mask: Tensor, kv_cache: Mapping[str, Tensor]
    ) -> Outputs:
        """Run T tokens.

        Args:
            embedded: what the model's `embed` gives for them.
            input_pos: int32 [T], their positions.
            mask: float32 [1, 1, T, C], 0 where a token may look and far below zero elsewhere.
            kv_cache: see `CacheAttention`.

        Returns:
            `kv_cache` with the new tokens, and `logits` float32 [1, T, V].
        """
        attend = CacheAttention(self.model.config, input_pos, mask, kv_cache)
        hidden = self.model(input_pos.to(torch.float32)[None], attend, *embedded).squeeze(2)
        output: Outputs = {"kv_cache": attend.cache}
        if self.logits:
            scaled = hidden * self.head.factor if self.head.cap else hidden
            output["logits"] = self.head(scaled, head_matrix(self))
        return output


class TokenDecoder(DecoderGraph):
    """A decoder section that looks tokens up itself."""

    def forward(self, tokens: Tensor, input_pos: Tensor, mask: Tensor, kv_cache: Mapping[str, Tensor]) -> Outputs:
        """`tokens` are int32 [1, T]; the rest as in `run`."""
        return self.run(self.model.embed(tokens), input_pos, mask, kv_cache)


class EmbeddingDecoder(DecoderGraph):
    """A decoder section that is passed what LiteRT-LM has looked up in two tables."""

    def forward(
        self,
        embeddings: Tensor,
        per_layer_embeddings: Tensor,
        input_pos: Tensor,
        mask: Tensor,
        kv_cache: Mapping[str, Tensor],
    ) -> Outputs:
        """`embeddings` [1, T, H] and `per_layer_embeddings` [1, T, L, P] are scaled; the rest as in `run`."""
        return self.run((embeddings[:, :, None], per_layer_embeddings), input_pos, mask, kv_cache)


class EmbeddedDecoder(DecoderGraph):
    """A decoder section that is passed what LiteRT-LM has looked up in a table, or what a picture is made to."""

    def forward(self, embeddings: Tensor, input_pos: Tensor, mask: Tensor, kv_cache: Mapping[str, Tensor]) -> Outputs:
        """`embeddings` [1, T, H] are scaled; the rest as in `run`."""
        return self.run((embeddings[:, :, None],), input_pos, mask, kv_cache)


@dataclass(frozen=True)
class Table:
    """An embedding table as a section of its own: one token in, its scaled row out.

    `name` of the section, `tensor` by canonical name, `scale` of its rows, `shape` of a row.
    """

    name: str
    tensor: str
    scale: float
    shape: tuple[int, ...]


Numbers = TypeVar("Numbers", bound=Config)


class PerLayer(Config, Protocol):
    """The numbers of a model with an embedding per layer: rows of L · P numbers, `hidden_size_per_layer_input` each."""

    @property
    def hidden_size_per_layer_input(self) -> int: ...


def embedding_tables(text: PerLayer) -> tuple[Table, Table]:
    """The sections in which LiteRT-LM looks tokens up for a model with an embedding per layer."""
    own = text.hidden_size_per_layer_input
    return (
        Table("embedder", EMBEDDING, text.hidden_size**0.5, (text.hidden_size,)),
        Table("per_layer_embedder", "embed_tokens_per_layer.weight", own**0.5, (text.num_hidden_layers, own)),
    )


class TextFamily(Generic[Numbers]):
    """What the `Architecture`s of all families do alike, from their numbers `text` and the graphs that they make."""

    text: Numbers
    left_out = TOWERS
    """The tensors of a checkpoint that its text model knowingly leaves out, by their beginning."""

    @property
    def slides(self) -> bool:
        """Whether a layer attends to a sliding window."""
        return SLIDING in self.text.layer_types

    def step(self, *, all_positions: bool = False) -> StepGraph:
        """The step graph, its weights still to be assigned."""
        raise NotImplementedError

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the text model: canonical name → shape. They take no memory."""
        with torch.device("meta"):
            state = self.step().state_dict()
        return {name.removeprefix("model."): tuple(tensor.shape) for name, tensor in state.items()}

    def tables(self) -> tuple[Table, ...]:
        """The sections that LiteRT-LM looks tokens up in; none: the decoder looks them up itself."""
        return ()

    def with_embedder(self) -> Self:
        """As `Architecture`: those that look tokens up in sections always have one."""
        if not self.tables():
            raise UsageError(
                "`bundle.embedder` of the recipe is true, and no decoder of this family is given embeddings",
                remedy="leave it out",
            )
        return self

    def towers(self) -> Mapping[str, Tower]:
        """What it sees and hears by; none that can be converted."""
        return {}

    def decoder_inputs(self, tokens: int, length: int, longest: int) -> Inputs:
        """Examples of what the decoder graph takes beside `input_pos` and `mask`, for `tokens` tokens.

        The cache is of `length` positions, for calls of up to `longest` tokens.
        """
        given: Inputs = {
            f"{table.name.removesuffix('embedder')}embeddings": torch.zeros(1, tokens, *table.shape)
            for table in self.tables()
        }
        given = given or {"tokens": torch.zeros((1, tokens), dtype=torch.int32)}
        return {**given, "kv_cache": cache_tensors(self.text, length, longest)}

    def canonical(self, name: str) -> str | None:
        """The text model's name of checkpoint tensor `name`.

        None for what it leaves out, and for keys and values of layers that share another layer's.
        """
        if self.left_out.match(name):
            return None
        own = text_name(name)
        match = _OWN_KV.match(own)
        layer = int(match[1]) if match else self.text.num_hidden_layers
        return None if layer < self.text.num_hidden_layers and self.text.kv_source(layer) != layer else own


def cache_tensors(config: Config, length: int, longest: int) -> dict[str, Tensor]:
    """Tensors like a cache of `length` positions: `k_<layer>` [1, K, C, D] and `v_<layer>` [1, K, D, C].

    Sliding layers have as many positions as calls of up to `longest` tokens need: a token's window, and the tokens
    behind it in its call, which may be padding that writes over what stands there. They hold nothing: an example of a
    long cache must not take memory.
    """
    own = [layer for layer in range(config.num_hidden_layers) if config.kv_source(layer) == layer]
    kinds = {layer: config.layer_types[layer] for layer in own}
    near = min(length, (config.sliding_window or length) + longest)
    lengths = {FULL: length, SLIDING: near}
    shapes = {layer: (*config.kv_shape(kind), lengths[kind]) for layer, kind in kinds.items()}
    keys = {f"k_{layer}": torch.empty(1, heads, each, size) for layer, (heads, size, each) in shapes.items()}
    return keys | {f"v_{layer}": torch.empty(1, heads, size, each) for layer, (heads, size, each) in shapes.items()}


def _positions(causal: Tensor) -> Tensor:
    """Each token's position among its row's attended ones, from 0: bool [B, S, S] → float [B, S]."""
    # By counting what is attended: with left padding the first token is at position 0, as in transformers.
    count = torch.sum(torch.where(causal, torch.tensor(1.0), torch.tensor(0.0)), dim=-1)
    return torch.maximum(count - 1.0, torch.tensor(0.0))


def _additive(allowed: Tensor) -> Tensor:
    """bool [B, S, S] → float [B, 1, S, S], 0 where allowed."""
    return torch.where(allowed, torch.tensor(0.0), torch.tensor(MASKED))[:, None]
