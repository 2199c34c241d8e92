"""A LoRA adapter as PEFT saves it: which base it is for, what it changes there, and what can't be merged truly.

All is judged from `adapter_config.json` and headers, before anything large moves; `merging` does the arithmetic.
Settings and names are PEFT's (0.21.2). A setting that is not known here and says anything is refused by its name: it
may change what the base's weights mean.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.checkpoint.headers import FLOATS, TensorInfo, listed
from pipeline.checkpoint.names import EMBEDDING, HEAD
from pipeline.checkpoint.packed import INT4
from pipeline.checkpoint.reader import INDEX, SINGLE, read_header
from pipeline.checkpoint.source import Source
from pipeline.core.errors import FetchError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TOKENIZER = re.compile(r"tokenizer[\w.-]*|(special_tokens_map|added_tokens|vocab)\.json|merges\.txt|chat_template\.\w+")
"""What an adapter that has a tokenizer brings instead of its base's: the two were trained together."""
TERMS = re.compile(r"(licen[cs]e|notice|use_policy|usage_policy)[\w.-]*", re.IGNORECASE)
_BNB = re.compile(r"(-unsloth)?-bnb-4bit$")
_PREFIX = "base_model.model."
_ROLES = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "token_adapter.trainable_tokens_delta": "tokens",
    "token_adapter.base_layer.weight": "stored",
    "base_layer.weight": "stored",
}
"""How the name of an adapter's tensor ends → what it is to its module; anything else is a whole tensor."""
_PART = re.compile(rf"\.({'|'.join(map(re.escape, sorted(_ROLES, key=len, reverse=True)))})$")
# Initialisations that leave the base's weights as they are; PEFT's others subtract what they start from.
_KEEP_BASE = (True, False, "gaussian", "eva", "orthogonal")
# Settings that are read here, or that say nothing about the merged weights, or nothing without an initialisation.
_KNOWN = {
    *(
        "peft_type",
        "peft_version",
        "task_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "runtime_config",
    ),
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_pattern", "layers_to_transform", "modules_to_save"),
    *("trainable_token_indices", "ensure_weight_tying", "init_lora_weights", "bias"),
    *("eva_config", "corda_config", "lora_ga_config", "loftq_config", "qalora_group_size"),
    *("megatron_config", "megatron_core"),
    "fan_in_fan_out",  # PEFT takes it back for every layer of these models: all are stored [out, in]
}
_MERGE = (
    "merge it where it was trained: `PeftModel.from_pretrained(base, ADAPTER).merge_and_unload()"
    ".save_pretrained(FOLDER)`, save the tokenizer there too, then MODEL_ID=FOLDER"
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `adapter_config.json` says of the merged weights; `tokens` are rows by the end of a module's name."""

    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rslora: bool
    dora: bool
    saved: tuple[str, ...]
    keeps_tie: bool
    tokens: Mapping[str, tuple[int, ...]]

    def scale(self, module: str) -> float:
        """alpha / r of a module, or alpha / √r where the adapter is rank-stabilised."""
        rank = self.rank_of(module)
        alpha = _own(self.alphas, module, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def rank_of(self, module: str) -> int:
        """r of a module."""
        return int(_own(self.ranks, module, self.rank))

    def rows(self, module: str) -> tuple[int, ...]:
        """The token ids whose rows of `module` were trained, in the order in which they are stored."""
        return next((rows for end, rows in self.tokens.items() if module.endswith(end)), ())


@dataclass(frozen=True, kw_only=True)
class Part:
    """One change to a tensor: names of the adapter's tensors by role, and the module's scale.

    Roles: `whole` alone (the tensor itself), `tokens` alone (its `rows`), or `A` and `B`, with `magnitude` for DoRA;
    `embedding`: A and B are of a table, whose rows are tokens.
    """

    names: Mapping[str, str]
    scale: float = 1.0
    rows: tuple[int, ...] = ()
    embedding: bool = False


@dataclass(frozen=True, kw_only=True)
class Change:
    """A tensor of the merged checkpoint: the base's tensor that it begins as, and what happens to it, in order."""

    base: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter by its configuration and its header; `base` and `revision` as it names them."""

    where: str
    base: str
    revision: str
    settings: Settings
    tensors: Mapping[str, TensorInfo]


@dataclass(frozen=True, kw_only=True)
class Changes:
    """All that an adapter changes, by the name in the merged checkpoint; `left_out` are modules outside the text.

    `tokens` are the rows of the token embedding afterwards.
    """

    changed: Mapping[str, Change]
    left_out: tuple[str, ...]
    tokens: int

    def text(self, adapter: str, base: str) -> str:
        """What happened, for people."""
        more = f"; left out, as towers are: {listed(self.left_out, 3)}" if self.left_out else ""
        return f"{adapter} merged into {base}: {len(self.changed)} tensors changed{more}"


def is_adapter(source: Source) -> bool:
    """Whether `source` holds an adapter and no model."""
    return CONFIG in source.sizes and not {SINGLE, INDEX} & source.sizes.keys()


def sixteen_bit(model: str) -> str:
    """The 16-bit original of a Hub id that ends in `-bnb-4bit` or `-unsloth-bnb-4bit`; any other id as it is.

    Such a base was rounded for training only: the adapter belongs to the original as well.
    """
    return _BNB.sub("", model)


def open_adapter(source: Source) -> Adapter:
    """Read an adapter's configuration and header.

    Raises:
        FetchError: it is of a kind that can't be merged truly; names the setting.
        IntegrityError: a file is not what it should be.
    """
    table, where = source.json(CONFIG), source.where
    settings = _settings(table, where)
    if WEIGHTS not in source.sizes:
        raise FetchError(
            f"{where} is an adapter without {WEIGHTS}",
            cause="it was saved as a pickle (.bin), which is never opened here, or the copy is incomplete",
            remedy="save it again with `model.save_pretrained(FOLDER)` of a present PEFT, which writes safetensors",
        )
    return Adapter(
        where=where,
        base=str(table.get("base_model_name_or_path") or ""),
        revision=str(table.get("revision") or ""),
        settings=settings,
        tensors=read_header(WEIGHTS, source.sizes[WEIGHTS], source.read),
    )


def overlay(base: Source, adapter: Source) -> Source:
    """Base and adapter as the one checkpoint that they will be, but for the weights, which are still the base's."""
    own = {name for name in adapter.sizes if brought(name, adapter.sizes)}
    replaced = {name for name in base.sizes if any(map(TOKENIZER.fullmatch, own)) and TOKENIZER.fullmatch(name)}
    kept = {name: size for name, size in base.sizes.items() if name not in replaced and name != "README.md"}
    return Source(
        where=f"{base.where} with {adapter.where}",
        sizes={**kept, **{name: adapter.sizes[name] for name in own}},
        read=lambda name, *part: (adapter if name in own else base).read(name, *part),
        remote=base.remote,
    )


def brought(name: str, names: Mapping[str, int]) -> bool:
    """Whether the adapter's file `name`, one of `names`, goes into the merged checkpoint: tokenizer, card, terms."""
    speaks = bool({"tokenizer.json", "tokenizer.model"} & names.keys())
    return name == "README.md" or bool(TERMS.fullmatch(name)) or (speaks and bool(TOKENIZER.fullmatch(name)))


def changes(
    adapter: Adapter, base: Mapping[str, TensorInfo], canonical: Callable[[str], str | None], where: str
) -> Changes:
    """What an adapter changes in its base.

    A tied head follows the embedding, as it does in `merge_and_unload`, but where either was saved whole (PEFT's
    `modules_to_save`): then the merged checkpoint has a head of its own.

    Args:
        adapter: from `open_adapter`.
        base: the base's tensors.
        canonical: the canonical name of a tensor, or None for what the text model leaves out.
        where: the base, for messages.

    Raises:
        FetchError: the adapter does not fit the base, or leaves out a table that must follow.
    """
    if whole := [name for name, info in base.items() if info.dtype == INT4]:
        raise _misfit(adapter, where, f"{whole[0]} is stored as 4-bit integers there, which an adapter can't change")
    stored = {canonical(name): name for name in base}
    tied = HEAD not in stored
    parts_of: dict[str, list[Part]] = {}
    left_out: list[str] = []
    modules = _modules(adapter)
    # The head after all else, as PEFT walks through a model: tied, both may change the same matrix.
    for module in sorted(modules, key=lambda module: canonical(f"{module}.weight") == HEAD):
        target = canonical(f"{module}.weight")
        own = _is_saved(adapter.settings, module) and not adapter.settings.keeps_tie
        if target is None:
            left_out.append(module)
            continue
        if target not in (*stored, HEAD):
            raise _misfit(adapter, where, f"that has no {module}")
        if tied and own and target in (EMBEDDING, HEAD):
            parts_of.setdefault(HEAD, [])
        if tied and not own and target == HEAD:
            target = EMBEDDING  # one matrix, changed in place
        parts_of.setdefault(target, []).extend(_parts(adapter, module, modules[module]))
    changed = {}
    for target, parts in parts_of.items():
        parts.sort(key=lambda part: "whole" not in part.names)  # loaded before anything is merged
        name = stored.get(target, HEAD)
        begins = stored[EMBEDDING] if target == HEAD and tied else name
        shape = _fit(adapter, where, name, base[begins], parts, resizable=target in (EMBEDDING, HEAD))
        changed[name] = Change(base=begins, shape=shape, parts=tuple(parts))
    shapes = {**{name: info.shape for name, info in base.items()}, **{n: one.shape for n, one in changed.items()}}
    _check_tables(adapter, shapes[stored[EMBEDDING]], shapes.get(stored.get(HEAD, HEAD)))
    if not changed:
        raise _misfit(adapter, where, "nothing of it belongs to the text model")
    return Changes(changed=changed, left_out=tuple(sorted(left_out)), tokens=shapes[stored[EMBEDDING]][0])


def check_tokens(adapter: Source, base: Source, tokens: int) -> None:
    """Refuse an adapter whose tokenizer has tokens that its base's has not, and that have none of the `tokens` rows.

    Raises:
        FetchError: names them.
    """
    lost = {token: text for token, text in _added(adapter).items() if token >= tokens}
    strange = sorted(lost[token] for token in lost.keys() - (_added(base) if lost else {}).keys())
    if strange:
        raise FetchError(
            f"{adapter.where} was trained with new tokens, but has no embedding of theirs: {listed(strange)}",
            cause=f"the embedding was resized beyond its {tokens} rows and not saved with the adapter",
            remedy="save it too: modules_to_save=['embed_tokens', 'lm_head']; or " + _MERGE,
        )


def _added(source: Source) -> dict[int, str]:
    """The tokens that were added to a tokenizer, by id."""
    rows = source.json("tokenizer.json").get("added_tokens")
    return {int(row["id"]): str(row["content"]) for row in rows} if isinstance(rows, list) else {}


def _settings(table: Mapping[str, Any], where: str) -> Settings:
    """What an `adapter_config.json` says, if it can be merged."""
    if "peft_type" not in table:
        raise FetchError(
            f"{where} is an adapter, but none of PEFT's: its {CONFIG} has no peft_type",
            cause="mlx-lm and other trainers have formats of their own",
            remedy="let the trainer merge it (`mlx_lm.fuse --dequantize`, older: `--de-quantize`), then MODEL_ID= the "
            "fused folder",
        )
    if table["peft_type"] != "LORA":
        raise _refused(where, "peft_type", table["peft_type"])
    start = table.get("init_lora_weights", True)
    if start not in _KEEP_BASE:
        raise FetchError(
            f"{where} was trained from init_lora_weights = {start!r}, which changes the base as well",
            cause="such an adapter belongs to what training left of the base, not to the base itself",
            remedy="save it converted, `save_pretrained(FOLDER, path_initial_model_for_weight_conversion=START)`, or "
            + _MERGE,
        )
    if table.get("bias", "none") != "none":
        raise _refused(where, "bias", table["bias"])
    for key, value in table.items():
        if key not in _KNOWN and not key.startswith("_") and value not in (None, False, "", [], {}):
            raise _refused(where, key, value)
    try:
        return Settings(
            rank=int(table["r"]),
            alpha=float(table["lora_alpha"]),
            ranks={key: int(value) for key, value in (table.get("rank_pattern") or {}).items() if re.compile(key)},
            alphas={key: float(value) for key, value in (table.get("alpha_pattern") or {}).items() if re.compile(key)},
            rslora=bool(table.get("use_rslora")),
            dora=bool(table.get("use_dora")),
            saved=tuple(map(str, table.get("modules_to_save") or ())),
            keeps_tie=bool(table.get("ensure_weight_tying")),
            tokens=_tokens(table.get("trainable_token_indices")),
        )
    except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
        raise FetchError(
            f"{CONFIG} of {where} can't be understood: {type(error).__name__}: {error}",
            cause="it was edited, or another tool wrote it",
            remedy="save the adapter again with PEFT",
        ) from error


def _tokens(given: dict[str, Sequence[int]] | Sequence[int] | None) -> dict[str, tuple[int, ...]]:
    """Rows by the end of a module's name; a list alone is the token embedding's."""
    if not given:
        return {}
    table = given if isinstance(given, dict) else {"embed_tokens": given}
    return {str(end): tuple(int(row) for row in rows) for end, rows in table.items()}


def _modules(adapter: Adapter) -> dict[str, dict[str, str]]:
    """The adapter's tensors by module and role."""
    modules: dict[str, dict[str, str]] = {}
    for key in adapter.tensors:
        name = key.removeprefix(_PREFIX)
        if match := _PART.search(name):
            module, role = name[: match.start()], _ROLES[match[1]]
        elif name.endswith(".weight"):
            module, role = name.removesuffix(".weight"), "whole"
        else:
            raise _refused(adapter.where, "a tensor called", key)
        modules.setdefault(module, {})[role] = key
    return modules


def _parts(adapter: Adapter, module: str, names: Mapping[str, str]) -> list[Part]:
    """What happens to a module's matrix, in order."""
    parts = [Part(names={"whole": names[role]}) for role in ("stored", "whole") if role in names]
    if "tokens" in names:
        parts.append(Part(names={"tokens": names["tokens"]}, rows=adapter.settings.rows(module)))
    pair = {role: names[role] for role in ("A", "B", "magnitude") if role in names}
    if pair:
        if not {"A", "B"} <= pair.keys() or ("magnitude" in pair) != adapter.settings.dora:
            raise _misfit(adapter, adapter.where, f"{module} has {listed(pair)} alone")
        table = "lora_embedding_A" in pair["A"]
        if table and adapter.settings.dora:
            raise _refused(adapter.where, "use_dora on", module)
        parts.append(Part(names=pair, scale=adapter.settings.scale(module), embedding=table))
        rank, held = adapter.settings.rank_of(module), adapter.tensors[pair["A"]].shape
        if len(held) != 2 or held[0] != rank:
            raise _misfit(adapter, adapter.where, f"{module} has rank {held[0]}, {CONFIG} says {rank}")
    return parts


def _fit(
    adapter: Adapter, where: str, name: str, base: TensorInfo, parts: list[Part], *, resizable: bool
) -> tuple[int, ...]:
    """The shape of a tensor once `parts` happened to it; a `resizable` one may have got other rows.

    Raises:
        FetchError: one of them is of another shape.
    """
    shape = base.shape
    for part in parts:
        held = {role: adapter.tensors[key].shape for role, key in part.names.items()}
        if odd := [key for key in part.names.values() if adapter.tensors[key].dtype not in FLOATS]:
            raise _misfit(adapter, where, f"{odd[0]} has type {adapter.tensors[odd[0]].dtype}")
        rows, columns = (*shape, 1, 1)[:2]
        if "whole" in held:
            fits = held["whole"] == shape or (resizable and held["whole"][1:] == shape[1:])
            if not fits:
                raise _misfit(adapter, where, f"{name} is {list(shape)} there, {list(held['whole'])} in the adapter")
            shape = held["whole"]
        elif "tokens" in held:
            fits = held["tokens"] == (len(part.rows), columns) and all(0 <= row < rows for row in part.rows)
        elif part.embedding:
            fits = held["A"][1:] == (rows,) and held["B"][:1] == (columns,) and held["A"][0] == held["B"][1]
        else:
            fits = len(shape) == 2 and held["A"][1:] == (columns,) and held["B"] == (rows, held["A"][0])
            fits = fits and held.get("magnitude", (rows,)) == (rows,)
        if not fits:
            kinds = ", ".join(f"{role} {list(one)}" for role, one in held.items())
            raise _misfit(adapter, where, f"{name} is {list(shape)} there, the adapter's is {kinds}")
    return shape


def _check_tables(adapter: Adapter, embedding: tuple[int, ...], head: tuple[int, ...] | None) -> None:
    """Refuse a resized embedding whose own head did not follow, or the other way round.

    Raises:
        FetchError: the two have different numbers of rows.
    """
    if head is not None and head[0] != embedding[0]:
        raise FetchError(
            f"with {adapter.where} the token embedding has {embedding[0]} rows, the output head {head[0]}",
            cause="the vocabulary was resized, and the adapter holds one of the two tables alone",
            remedy="save both: modules_to_save=['embed_tokens', 'lm_head']; or " + _MERGE,
        )


def _is_saved(settings: Settings, module: str) -> bool:
    """Whether PEFT kept a trained copy of the whole module beside the original (`modules_to_save`)."""
    return any(f".{name}." in f".{module}." for name in settings.saved)


def _own(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The value for a module; patterns as PEFT matches them: the whole name, or its end after a dot."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _refused(where: str, key: str, value: object) -> FetchError:
    return FetchError(
        f"{where} is an adapter with {key} = {value!r}, which can't be merged truly here",
        cause="that changes more than W + s · B A of the base's matrices, or does so in its own way",
        remedy=_MERGE,
    )


def _misfit(adapter: Adapter, where: str, fault: str) -> FetchError:
    return FetchError(
        f"the adapter {adapter.where} does not fit {where}: {fault}",
        cause="it was trained on another base, or on one whose vocabulary had been resized",
        remedy="say the model that it was trained on, BASE=owner/name or a folder; or " + _MERGE,
    )
