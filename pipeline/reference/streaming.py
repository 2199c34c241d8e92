"""A transformers model that does not fit into memory: a matrix is there while its module runs, and then gone.

The modules are transformers' own and run unchanged; hooks lay the weights out in float32 before a module runs. What
modules of one shape need is laid out in one place, one after the other, so that memory is bounded by the largest matrix
and not by the model. Of an embedding only the rows of the tokens at hand are read, and the head is applied in blocks.

What is read comes from memory-mapped safetensors files: pages of a file that the system may drop at any time.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from pipeline.checkpoint.names import HEAD
from pipeline.checkpoint.reader import Checkpoint
from pipeline.core.errors import IntegrityError
from pipeline.reference.linear import product

KEPT = 1 << 16
"""Elements up to which a matrix stays in memory; norms and other vectors always do."""
_HEAD_BLOCK = 1 << 24
"""Elements of the head that are laid out at a time (64 MiB in float32)."""

Report = Mapping[str, Sequence[object]]


def load(kind: Any, config: PreTrainedConfig, checkpoint: Checkpoint, renamed: Mapping[str, str]) -> tuple[Any, Report]:
    """A model that streams its weights, and what of the checkpoint did not fit, as `from_pretrained` reports it.

    Args:
        kind: the transformers class.
        config: its configuration.
        checkpoint: the checkpoint.
        renamed: regular expressions for stored names → what replaces them in the model's.
    """
    with torch.device("meta"):
        model = kind._from_config(config, attn_implementation="eager", dtype=torch.float32)
    _make_buffers(model)
    model.initialize_weights()
    held = {_model_name(name, renamed): tensor for name, tensor in stored(checkpoint)}
    for head, table in _tied(model).items():  # whichever is stored serves as both, as `tie_weights` has it
        if head in held:
            held.setdefault(table, held[head])
    report = _fit(model, held)
    if not report["missing_keys"] and not report["mismatched_keys"]:
        model.lm_head = Head(held[HEAD if HEAD in held else _tied(model)[HEAD]])
        _stream(model, held)
    return model, report


def load_part(module: Any, weights: Mapping[str, Weight]) -> Any:
    """A part of a model, made on the meta device, that streams its `weights`, by their names in it.

    Raises:
        IntegrityError: one is missing, or has another shape.
    """
    _make_buffers(module)
    if isinstance(module, PreTrainedModel):
        module.initialize_weights()  # type: ignore[no-untyped-call]  # transformers ships no types
    report = _fit_names(module, weights)
    if wrong := [*report["missing_keys"], *report["mismatched_keys"]]:
        raise IntegrityError(f"transformers finds no {wrong[0]} for its {type(module).__name__}")
    _stream(module, weights)
    return module.eval()


def _make_buffers(model: nn.Module) -> None:
    """What transformers computes, here once the meta device is left; those that a checkpoint holds come later."""
    for name, buffer in list(model.named_buffers()):
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        persistent = attribute not in module._non_persistent_buffers_set
        module.register_buffer(attribute, torch.empty_like(buffer, device="cpu"), persistent=persistent)


class Packed:
    """A matrix that is stored as integers and scales, as far as a tensor's interface is used here; float32."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self.shape = torch.Size(checkpoint.tensors[name].shape)
        self.ndim, self._checkpoint, self._name = len(self.shape), checkpoint, name

    def numel(self) -> int:
        """Elements in all."""
        return self.shape.numel()

    def __getitem__(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """Some rows, from `start` to `stop` or by number."""
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(self.shape[0])
            return torch.from_numpy(self._checkpoint.rows(self._name, start, stop))
        return torch.cat([self[row : row + 1] for row in rows.tolist()])


Weight = torch.Tensor | Packed


def stored(checkpoint: Checkpoint) -> Iterator[tuple[str, Weight]]:
    """Every tensor as a view into its file, in the type that it has there."""
    for file in checkpoint.files:
        with safe_open(checkpoint.folder / file, framework="pt") as tensors:
            for name in (name for name in tensors.keys() if name in checkpoint.tensors):  # noqa: SIM118 - not a mapping
                yield name, tensors.get_tensor(name)
    yield from ((name, Packed(checkpoint, name)) for name, tensor in checkpoint.tensors.items() if tensor.scale)


def _model_name(name: str, renamed: Mapping[str, str]) -> str:
    for pattern, new in renamed.items():
        name = re.sub(pattern, new, name, count=1)
    return name


def _tied(model: Any) -> dict[str, str]:
    return model.get_expanded_tied_weights_keys() if model.config.tie_word_embeddings else {}


def _fit(model: nn.Module, stored: Mapping[str, Weight]) -> Report:
    return _fit_names(model, stored, _tied(model).keys())


def _fit_names(model: nn.Module, stored: Mapping[str, Weight], tied: Collection[str] = ()) -> Report:
    needed = dict(model.named_parameters(remove_duplicate=False)) | dict(_stored_buffers(model))
    lost = needed.keys() - stored.keys() - {*tied}
    shapes = [(name, stored[name].shape, needed[name].shape) for name in needed.keys() & stored.keys()]
    return {
        "missing_keys": sorted(lost),
        "unexpected_keys": sorted(stored.keys() - needed.keys()),
        "mismatched_keys": sorted(row for row in shapes if row[1] != row[2]),
    }


def _stored_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Buffers that a checkpoint holds, such as Gemma 4's `layer_scalar`; the others are computed."""
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(path, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer


def _stream(model: nn.Module, stored: Mapping[str, Weight]) -> None:
    """Give every module its weights: small ones for good, large ones by hooks."""
    room: dict[torch.Size, torch.Tensor] = {}
    for name, buffer in _stored_buffers(model):
        buffer.copy_(stored[name][:] if buffer.ndim else stored[name])  # type: ignore[arg-type]  # numbers are floats
    for path, module in model.named_modules():
        for name, empty in module.named_parameters(path, recurse=False):
            weight, attribute = stored[name], name.rpartition(".")[2]
            if isinstance(module, nn.Embedding):
                module.padding_idx = None  # of use in training only, and counted in rows of the whole table
                module.register_forward_pre_hook(_Rows(weight))
            elif weight.ndim < 2 or weight.numel() <= KEPT:
                setattr(module, attribute, _parameter(weight[:].to(torch.float32, copy=True)))
            else:
                module.register_forward_pre_hook(_Laid(attribute, weight, room))
                module.register_forward_hook(_Gone(attribute, empty))


def _parameter(values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


class _Laid:
    """Before a module runs: its matrix in float32, in the room that all of its shape share."""

    def __init__(self, attribute: str, weight: Weight, room: dict[torch.Size, torch.Tensor]) -> None:
        self.attribute, self.weight, self.room = attribute, weight, room

    def __call__(self, module: nn.Module, _inputs: object) -> None:
        shape = self.weight.shape
        if shape not in self.room:
            # Layers of one shape run one after the other, so one room is enough for all of them.
            self.room[shape] = torch.empty(shape)
        setattr(module, self.attribute, _parameter(self.room[shape].copy_(self.weight[:])))


class _Gone:
    """After a module ran: the empty parameter that it was made with."""

    def __init__(self, attribute: str, empty: nn.Parameter) -> None:
        self.attribute, self.empty = attribute, empty

    def __call__(self, module: nn.Module, _inputs: object, _output: object) -> None:
        setattr(module, self.attribute, self.empty)


class _Rows:
    """Before an embedding runs: the rows of the tokens at hand as its table, and tokens as rows of that."""

    def __init__(self, table: Weight) -> None:
        self.table = table

    def __call__(self, module: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        # Rows are read in ascending order, each once: a table of 9 GB is touched at a few hundred places.
        tokens, places = torch.unique(inputs[0], return_inverse=True)
        module.weight = _parameter(self.table[tokens].to(torch.float32))
        return (places,)


class Head(nn.Module):
    """The output projection `x @ weight.T`, a block of the vocabulary at a time."""

    def __init__(self, weight: Weight) -> None:
        super().__init__()
        self.stored = weight  # not a parameter: it stays in its file

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., H] → [..., V]."""
        rows = max(1, _HEAD_BLOCK // self.stored.shape[1])
        # One room for all blocks: memory that is got anew has to be cleared each time.
        room = torch.empty((min(rows, self.stored.shape[0]), self.stored.shape[1]))
        blocks = (self.stored[start : start + rows] for start in range(0, self.stored.shape[0], rows))
        return torch.cat([product(x, room[: len(block)].copy_(block)) for block in blocks], dim=-1)
