"""Whether a checkpoint can be converted, judged from its configuration and headers before anything large is read.

Every refusal says what the thing is, why it can't be used, and what to do instead.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from pipeline.checkpoint import headers, heads, kinds, packed, sound
from pipeline.checkpoint import names as names_
from pipeline.checkpoint.headers import FLOATS, TensorInfo, listed, parse_index
from pipeline.checkpoint.layout import Needed, lay_out, lay_out_tower
from pipeline.checkpoint.names import EMBEDDING, outer
from pipeline.checkpoint.reader import CONFIG, INDEX, SINGLE, float_type, read_tensors
from pipeline.checkpoint.source import Source
from pipeline.core import log
from pipeline.core.errors import FetchError
from pipeline.core.facts import Checkpoint as Facts
from pipeline.core.facts import LeftOut, Taken

_TOKENIZER_CONFIG = "tokenizer_config.json"
# Beside the weights: configuration, tokenizer, templates, and what the licence asks to pass on.
_WANTED = re.compile(
    r"(config|generation_config|special_tokens_map|added_tokens|vocab)\.json|merges\.txt|tokenizer[\w.-]*"
    r"|chat_template\.(jinja|json)|(licen[cs]e|notice|readme|use_policy|usage_policy)[\w.-]*",
    re.IGNORECASE,
)
_MLX = "mlx"
_UNFUSED = (
    "fuse your adapter with `mlx_lm.fuse --dequantize` (older: `--de-quantize`), or on the full-precision model, and "
    "give that folder"
)
_QUANTISED = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")

_UNQUANTISED = re.compile(r"q4_0-unquantized", re.IGNORECASE)

Expected = Callable[[Mapping[str, object]], Needed]


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
        expected: from a configuration, what the model needs of a checkpoint.

    Raises:
        FetchError: it is not one that can be converted; says why and what to do.
        IntegrityError: a file is missing, truncated, or not what its header or the index says.
    """
    names, where = source.sizes.keys(), source.where
    kinds.check(source)
    config = source.json(CONFIG)
    check_own_code(config, CONFIG, where)
    check_own_code(source.json(_TOKENIZER_CONFIG), _TOKENIZER_CONFIG, where)
    needed = expected(config)
    check_tokenizer(names, where)
    tensors = read_tensors(names, source.sizes, source.read, where)
    packed.check(config, tensors, where)
    tied = heads.is_tied(
        outer(tensors), tensors, lambda name, *part: source.rows(tensors[name], *part), sampled=source.remote
    )
    try:
        layout = lay_out(tensors, needed, where, tied=tied)
    except FetchError as error:
        check_left_overs(tensors, config, names, where)
        raise _explained(error, tensors, needed, names, config) from error
    towers = {tower: lay_out_tower(tensors, shapes, tower, where) for tower, shapes in needed.towers.items()}
    if towers:
        sound.check(names, where)
    taken = {stored for names_of in towers.values() for stored in names_of.values()}
    left_out = names_.towers(name for name in tensors if needed.used_as(name) is None and name not in taken)
    _say_what_is_odd(source, tensors, config, left_out, needed)
    weights = headers.files(tensors.values())
    index = [] if SINGLE in names else [INDEX]
    small = sorted(name for name in names if _WANTED.fullmatch(name) or (towers and name in sound.PREPROCESSOR))
    parameters = sum(math.prod(tensors[name].shape) for name in layout.values())
    facts = Facts(
        model_type=str(config["model_type"]),
        parameters=parameters,
        dtype=float_type(tensors[name] for name in layout.values()),
        shards=len(weights),
        tied=tied,
        left_out=tuple(LeftOut(part=part, tensors=count) for part, count in left_out.items()),
        towers=tuple(
            Taken(tower=tower, parameters=sum(math.prod(tensors[name].shape) for name in own.values()))
            for tower, own in towers.items()
        ),
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


def check_left_overs(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, object], names: Collection[str], where: str
) -> None:
    """Refuse weights that are no whole model's: quantised already, or an adapter that was not merged.

    Raises:
        FetchError: names the method and a tensor, and says what to give instead.
    """
    unmerged = [name for name in tensors if names_.UNMERGED.search(name)]
    if unmerged:
        raise FetchError(
            f"{where} holds an adapter that was not merged ({listed(unmerged, 1)})",
            cause="the training wrapper was saved, not the model in it",
            remedy="merge it with peft: `model.merge_and_unload().save_pretrained(FOLDER)`, then MODEL_ID=FOLDER",
        )
    whole = [name for name, tensor in tensors.items() if tensor.dtype not in FLOATS]
    if (method := quantised(config, names)) and whole:
        raise FetchError(
            f"{where} is quantised already ({method}; {whole[0]} is {tensors[whole[0]].dtype})",
            cause="its weights were rounded once; to round them again would lose more than the recipe allows",
            remedy=_UNFUSED
            if method == _MLX
            else "give the full-precision checkpoint that it was made from (`base_model` in its README)",
        )


def quantised(config: Mapping[str, object], names: Collection[str]) -> str:
    """The method by which configuration or file `names` say that the weights are quantised; empty if they do not."""
    text = config.get("text_config")
    tables = [config, text] if isinstance(text, Mapping) else [config]
    found = [table[key] for table in tables for key in ("quantization_config", "quantization") if table.get(key)]
    found += [{"quant_method": name} for name in _QUANTISED if name in names]
    return _method(found[0]) if found else ""


def _explained(
    error: FetchError,
    tensors: Mapping[str, TensorInfo],
    needed: Needed,
    names: Collection[str],
    config: Mapping[str, object],
) -> FetchError:
    """`error` of a layout with the cause that what lies around it tells."""
    embedding = outer(tensors).get(EMBEDDING, "")
    rows, wanted = (tensors[embedding].shape if embedding else ())[:1], needed.shapes[EMBEDDING][:1]
    if other := kinds.purpose(config):
        error.cause = f"{CONFIG} calls it a {other}: a model that scores or labels text writes none"
        error.remedy = "give a model for generation (…ForCausalLM, …ForConditionalGeneration)"
    elif {SINGLE, INDEX} <= {*names}:
        error.cause = f"{INDEX} and its shards lie beside {SINGLE}, which is read alone, as transformers does"
        error.remedy = (
            f"move {SINGLE} elsewhere if it was left over from an earlier save, else the index and its shards"
        )
    elif rows and rows != wanted and embedding in error.what:
        error.cause = f"the vocabulary was resized or padded to {rows[0]}, {CONFIG} says {wanted[0]}"
        error.remedy = f"correct vocab_size in {CONFIG}; transformers refuses such a checkpoint too"
    return error


def _say_what_is_odd(
    source: Source,
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, object],
    left_out: Mapping[str, int],
    needed: Needed,
) -> None:
    """What is taken all the same, or left out: in words."""
    if left_out:
        parts = ", ".join(f"{count} of {part}" for part, count in left_out.items())
        kind = "" if needed.towers else "text only: "
        other = f"{needed.seeing} takes them" if needed.seeing else "towers of this family can't be converted yet"
        why = "" if needed.converts else f"; {other}"
        log.step(f"{kind}tensors left out: {parts}{why}")
    described = [tower for tower in ("vision", "audio") if config.get(f"{tower}_config")]
    if described and needed.converts and not (needed.towers or left_out):
        log.warn(f"text only: {CONFIG} describes {' and '.join(described)}, and no tensor of that is here")
    given = [tensor for tensor in tensors.values() if tensor.dtype == packed.INT4]
    if given:
        log.step(f"{len(given)} matrices are 4-bit integers already: int4 files take them as they are")
    elif method := quantised(config, source.sizes.keys()):
        log.warn(f"{CONFIG} still names {method}; the weights are not quantised, so it is ignored")
    if _UNQUANTISED.search(source.where):
        log.warn(
            "weights trained for Q4_0 are taken as floats and rounded anew: its scales may be negative, which XNNPACK "
            "refuses; a twin whose name ends in -w4a16-ct goes into an int4 file without loss"
        )
    wrapped = [name for name in tensors if names_.WRAPPERS.match(name)]
    if wrapped:
        wrapper = names_.WRAPPERS.match(wrapped[0])
        log.warn(f"{len(wrapped)} names begin with {wrapper[0] if wrapper else ''}: saved from a wrapper, left out")
    over = [name for name in tensors if names_.LEFT_OVERS.search(name)]
    if over:
        log.warn(f"stored buffers are left out, transformers computes them anew: {listed(over, 2)}")
    if SINGLE not in source.sizes:
        _say_where_the_index_errs(source, tensors)


def _say_where_the_index_errs(source: Source, tensors: Mapping[str, TensorInfo]) -> None:
    weight_map = parse_index(source.read(INDEX, 0, source.sizes[INDEX]), INDEX)
    for kind, found in (
        ("names what no shard holds", weight_map.keys() - tensors.keys()),
        ("does not name", tensors.keys() - weight_map.keys()),
    ):
        if found:
            log.warn(f"{INDEX} {kind}: {listed(found, 2)}; the shards' own headers count")


def _method(table: object) -> str:
    """What a quantisation table calls its method; mlx-lm's and bitsandbytes' of old versions have no name."""
    if not isinstance(table, Mapping):
        return "unknown method"
    guess = "bitsandbytes" if any(str(key).startswith(("load_in_", "bnb_")) for key in table) else "unknown method"
    guess = _MLX if {"group_size", "bits"} <= table.keys() else guess
    return str(table.get("quant_method") or guess)
