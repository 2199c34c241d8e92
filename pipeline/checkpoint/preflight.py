"""Whether a checkpoint can be converted, judged from its configuration and headers before anything large is read.

Every refusal says what the thing is, why it can't be used, and what to do instead.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.checkpoint.headers import TensorInfo, listed
from pipeline.checkpoint.reader import (
    CONFIG,
    FLOATS,
    INDEX,
    SINGLE,
    Float32,
    float_type,
    item_size,
    parse_json,
    read_part,
    read_tensors,
    widen,
)
from pipeline.core.errors import FetchError
from pipeline.core.facts import Checkpoint as Facts

_TOKENIZER_CONFIG = "tokenizer_config.json"
# Beside the weights: configuration, tokenizer, templates, and what the licence asks to pass on.
_WANTED = re.compile(
    r"(config|generation_config|special_tokens_map|added_tokens|vocab)\.json|merges\.txt|tokenizer[\w.-]*"
    r"|chat_template\.(jinja|json)|(licen[cs]e|notice|readme|use_policy|usage_policy)[\w.-]*",
    re.IGNORECASE,
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state")
_QUANTISED = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_LARGEST_JSON = 100 << 20  # bytes

HEAD = "lm_head.weight"
"""Canonical name of an output head that is stored beside the embedding."""
HEADS = (HEAD, "language_model.lm_head.weight")
"""What a checkpoint may call it."""
EMBEDDING = "embed_tokens.weight"
"""Canonical name of the token embedding, which a tied model uses as its head as well."""
_BLOCK = 4 << 20
"""Elements of the head that are compared at a time (16 MiB in float32)."""
_SAMPLE = (9, 1 << 15)
"""Blocks of a remote head that are compared before the download, the first and the last among them; their elements."""

Canonical = Callable[[str], "str | None"]
Expected = Callable[[Mapping[str, object]], "tuple[Mapping[str, tuple[int, ...]], Canonical]"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a checkpoint lies: `sizes` of its top files in bytes, and how to `read` bytes `start` to `stop` of one.

    Of a `remote` one little is read: what takes whole tensors to know is looked at again once they are here.
    """

    where: str
    sizes: Mapping[str, int]
    read: Callable[[str, int, int], bytes]
    remote: bool = False

    @classmethod
    def of_folder(cls, folder: Path) -> Source:
        """A local folder."""
        sizes = {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()}
        return cls(where=str(folder), sizes=sizes, read=lambda *part: read_part(folder, *part))

    def json(self, name: str) -> dict[str, object]:
        """A whole JSON file, empty if it is absent.

        Raises:
            IntegrityError: it is not JSON.
        """
        if name not in self.sizes:
            return {}
        return parse_json(self.read(name, 0, min(self.sizes[name], _LARGEST_JSON)), name)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to fetch (`names`, the small files first), and what is known of the model by then."""

    names: tuple[str, ...]
    parameters: int
    facts: Facts


def plan(source: Source, expected: Expected) -> Plan:
    """Judge a checkpoint by its configuration and headers, and choose the files that are needed.

    Args:
        source: where it lies.
        expected: from a configuration, the tensors that the model needs and how stored names map to theirs.

    Raises:
        FetchError: it is not one that can be converted; says why and what to do.
        IntegrityError: a file is missing, truncated, or not what its header or the index says.
    """
    names, where = source.sizes.keys(), source.where
    check_kind(names, where)
    config = source.json(CONFIG)
    check_own_code(config, CONFIG, where)
    check_own_code(source.json(_TOKENIZER_CONFIG), _TOKENIZER_CONFIG, where)
    check_precision(config, names, where)
    needed, canonical = expected(config)
    check_tokenizer(names, where)
    tensors = read_tensors(names, source.sizes, source.read, where)
    found = match(tensors, needed, canonical, where)
    check_head(source, tensors, tensors[found[EMBEDDING]], [name for name in tensors if canonical(name) == HEAD])
    weights = sorted({tensor.file for tensor in tensors.values()})
    index = [] if SINGLE in names else [INDEX]
    small = sorted(name for name in names if _WANTED.fullmatch(name))
    parameters = sum(math.prod(shape) for shape in needed.values())
    facts = Facts(
        model_type=str(config["model_type"]),
        parameters=parameters,
        dtype=float_type(tensors[name] for name in found.values()),
        shards=len(weights),
    )
    return Plan(names=(*small, *index, *weights), parameters=parameters, facts=facts)


def check_tokenizer(names: Collection[str], where: str) -> None:
    """Refuse a checkpoint without a tokenizer.

    Raises:
        FetchError: it has none.
    """
    if not {"tokenizer.json", "tokenizer.model"} & set(names):
        raise FetchError(
            f"{where} has no tokenizer (tokenizer.json or tokenizer.model)",
            cause="only the model was saved",
            remedy="save the tokenizer beside it: `AutoTokenizer.from_pretrained(BASE).save_pretrained(FOLDER)`",
        )


def check_kind(names: Collection[str], where: str) -> None:
    """Refuse a set of files that is no plain safetensors checkpoint; `names` are those at the top of `where`.

    Raises:
        FetchError: says what it is instead (pickle, another format) and what to do.
    """
    if INDEX in names or SINGLE in names:
        if CONFIG not in names:
            raise FetchError(f"{where} has no {CONFIG}", cause="it is not a whole Hugging Face checkpoint")
        return
    if any(name.endswith(".safetensors") and "-of-" in name for name in names):
        raise FetchError(
            f"{where} has shards but no {INDEX}", cause="the copy is incomplete", remedy="copy or upload the index too"
        )
    pickles = [name for name in names if name.endswith(_PICKLES) and not name.startswith(_NO_WEIGHTS)]
    if pickles:
        raise FetchError(
            f"{where} has its weights as pickle files only ({listed(pickles, 3)})",
            cause="pickle files can run code when they are opened, so they are never opened here",
            remedy="in a place where that does no harm, save it again as safetensors:"
            " `AutoModelForCausalLM.from_pretrained(MODEL_ID).save_pretrained(FOLDER)`, then MODEL_ID=FOLDER",
        )
    others = [
        name for name in names if name.endswith((".gguf", ".safetensors", ".litertlm", ".tflite", ".onnx", ".h5"))
    ]
    raise FetchError(
        f"{where} has neither {SINGLE} nor {INDEX}",
        cause=f"its weights are in another format ({listed(others, 3)})" if others else "it holds no model",
        remedy="give the Hugging Face checkpoint that it was made from",
    )


def check_own_code(table: Mapping[str, object], file: str, where: str) -> None:
    """Refuse a checkpoint whose configuration `table`, read from `file`, asks for code of its own.

    Raises:
        FetchError: it does.
    """
    if table.get("auto_map"):
        raise FetchError(
            f"{where} needs code of its own (`auto_map` in {file}, trust_remote_code)",
            cause="code from a model repository is never run here",
            remedy="use a version of the model that transformers supports itself",
        )


def check_precision(config: Mapping[str, object], names: Collection[str], where: str) -> None:
    """Refuse a checkpoint that is quantised already.

    Raises:
        FetchError: names the method, and says what to give instead.
    """
    text = config.get("text_config")
    tables = [config, text] if isinstance(text, Mapping) else [config]
    found = [table[key] for table in tables for key in ("quantization_config", "quantization") if table.get(key)]
    found += [{"quant_method": name} for name in _QUANTISED if name in names]
    if found:
        raise FetchError(
            f"{where} is quantised already ({_method(found[0])})",
            cause="its weights were rounded once; to round them again would lose more than the recipe allows",
            remedy="give the full-precision checkpoint that it was made from (`base_model` in its README)",
        )


def _method(table: object) -> str:
    """What a quantisation table calls its method; bitsandbytes tables of old versions have no name."""
    if not isinstance(table, Mapping):
        return "unknown method"
    guess = "bitsandbytes" if any(str(key).startswith(("load_in_", "bnb_")) for key in table) else "unknown method"
    return str(table.get("quant_method") or guess)


def match(
    tensors: Mapping[str, TensorInfo],
    expected: Mapping[str, tuple[int, ...]],
    canonical: Callable[[str], str | None],
    where: str,
) -> dict[str, str]:
    """Hold the stored tensors against an architecture, both ways by name.

    Args:
        tensors: what the checkpoint holds.
        expected: canonical name → shape of every tensor that the model needs.
        canonical: the canonical name of a stored tensor, or None if it is knowingly not used.
        where: the checkpoint, for messages.

    Returns:
        Canonical name → name in the checkpoint, for every tensor that the model needs.

    Raises:
        FetchError: names the tensors that are missing, extra, stored twice, of another shape, or not float.
    """
    used: dict[str, list[str]] = {}
    for name in tensors:
        target = canonical(name)
        if target is not None and (target != HEAD or HEAD in expected):
            used.setdefault(target, []).append(name)
    first = {name: used[name][0] for name in expected if name in used}
    faults = [
        _fault("missing", [name for name in expected if name not in used]),
        _fault("extra", [name for target, names in used.items() if target not in expected for name in names]),
        _fault("stored twice", [" = ".join(used[target]) for target in first if len(used[target]) > 1]),
        _fault("of another shape", _wrong_shapes(first, tensors, expected)),
        _fault("not float", [f"{n} ({tensors[n].dtype})" for n in first.values() if tensors[n].dtype not in FLOATS]),
    ]
    if any(faults):
        raise FetchError(
            f"{where} does not hold the model that its {CONFIG} describes: {'; '.join(filter(None, faults))}",
            cause=f"the weights and {CONFIG} belong to different models, or a tool renamed or dropped tensors",
            remedy="get the checkpoint from its author anew, or save it again with `save_pretrained` of transformers",
        )
    return first


def check_head(source: Source, tensors: Mapping[str, TensorInfo], table: TensorInfo, heads: Collection[str]) -> None:
    """Refuse output heads that are stored beside the token embedding and aren't equal to it.

    Whatever `tie_word_embeddings` says, transformers (5.23.0) computes with a head that is stored and differs, as
    adapters with `modules_to_save` have it once they are merged; the graphs here have one matrix for both.

    Args:
        source: where the checkpoint lies. Of a remote one a few blocks are compared, of a folder all.
        tensors: what it holds.
        table: the token embedding.
        heads: names of the heads among `tensors`.

    Raises:
        FetchError: names the head and the first row that differs.
    """
    for name in heads:
        head = tensors[name]
        row = _first_difference(source, head, table)
        if row is not None:
            where = f"in row {row}" if row >= 0 else f"{head.dtype} {list(head.shape)}, not {list(table.shape)}"
            raise FetchError(
                f"{source.where} has an output head of its own: {name} differs from the token embedding ({where})",
                cause=f"whatever {CONFIG} says of tying, the head was trained (a LoRA with it in modules_to_save)"
                " or comes from another model; transformers would use it, the files made here would not",
                remedy="train without lm_head among the saved modules; or, if the head is a left-over that must not"
                f" count, remove {name} from the checkpoint",
            )


def _first_difference(source: Source, head: TensorInfo, table: TensorInfo) -> int | None:
    """The first row looked at in which two tensors differ; -1 where they can't be compared, None if there is none."""
    if head.shape != table.shape or head.dtype not in FLOATS:
        return -1
    if not math.prod(table.shape):
        return None
    for start, stop in _row_blocks(*table.shape, remote=source.remote):
        left, right = (_rows(source, tensor, start, stop) for tensor in (head, table))
        # Bit patterns would take -0.0 for another number; a NaN is refused when weights are read.
        unequal = np.flatnonzero((left != right).any(axis=1))
        if unequal.size:
            return start + int(unequal[0])
    return None


def _row_blocks(rows: int, width: int, *, remote: bool) -> Iterator[tuple[int, int]]:
    """Ranges of rows: all of them, or of a remote tensor a few that are spread over it."""
    if not remote:
        step = max(1, _BLOCK // width)
        return ((start, min(start + step, rows)) for start in range(0, rows, step))
    count, elements = _SAMPLE
    step = min(rows, max(1, elements // width))
    return ((start, start + step) for start in sorted({(rows - step) * i // (count - 1) for i in range(count)}))


def _rows(source: Source, tensor: TensorInfo, start: int, stop: int) -> Float32:
    """Rows `start` to `stop` of a matrix, float32 [rows, width]."""
    row = tensor.shape[1] * item_size(tensor)
    data = source.read(tensor.file, tensor.offset + start * row, tensor.offset + stop * row)
    return widen(np.frombuffer(data, dtype=np.uint8), tensor.dtype).reshape(stop - start, -1)


def _fault(kind: str, names: Collection[str]) -> str:
    verb = "is" if len(names) == 1 else "are"
    return f"{len(names)} tensor{'' if len(names) == 1 else 's'} {verb} {kind}: {listed(names)}" if names else ""


def _wrong_shapes(
    first: Mapping[str, str], tensors: Mapping[str, TensorInfo], expected: Mapping[str, tuple[int, ...]]
) -> list[str]:
    return [
        f"{name} {list(tensors[name].shape)} instead of {list(expected[target])}"
        for target, name in first.items()
        if tensors[name].shape != tuple(expected[target])
    ]
