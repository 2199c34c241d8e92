"""Writing the on-device bundle: one `.litertlm` file with metadata, tokenizer and TFLite sections.

The same sections give the same bytes: litert-lm-builder's random identifier and clock are replaced by a hash of the
content and SOURCE_DATE_EPOCH, and stop tokens are sorted. Sections are streamed from file to file.

The tokenizer goes in as Hugging Face's own backend writes it. A SentencePiece model would load faster (0.06 s, not
1.2 s, for Gemma's 262,144 tokens; the size is the same), but gives other ids than transformers for some texts: it reads
control tokens such as `<eos>` as ordinary text and can't tell U+2581 from a space.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from google.protobuf.message import DecodeError
from litert_lm_builder import litertlm_builder, litertlm_core, litertlm_peek
from litert_lm_builder.runtime.proto import llm_metadata_pb2, llm_model_type_pb2, sampler_params_pb2

from pipeline.convert import template
from pipeline.core import log
from pipeline.core.errors import BundleError
from pipeline.core.manifest import Fact, Facts, FileRecord

_NEEDED = {"gemma3": ("decoder",), "gemma3n": ("decoder", "embedder", "per_layer_embedder")}
"""Sections by the kind of model as LiteRT-LM names it: another kind there means another way to treat prompts."""
_OPTIONAL = {"gemma3": ("embedder",), "gemma3n": ()}
"""A decoder that takes token ids looks embeddings up itself."""
BUILDER = "0.18.1"
"""The litert-lm-builder that the replacement of its system metadata was written for."""
_NAMESPACE = uuid.UUID("6f6c1a52-3a3f-5d0e-9c1b-0f4f2f3f7b61")
_DEFAULT_EPOCH = 315532800  # 1980-01-01, what the Makefile uses outside git
_TFLITE = b"TFL3"  # bytes 4 to 8 of every TFLite file
_COPIED_PER_SECOND = 4e8
_CHUNK = 1 << 20
_DEFAULT_TOP_K, _DEFAULT_TOP_P, _DEFAULT_TEMPERATURE = 50, 1.0, 1.0
"""What transformers samples with where generation_config.json says no more than `do_sample`."""


class Tokenizer(template.Renderer, Protocol):
    """The part of a transformers tokenizer that a bundle is made from."""

    chat_template: Any
    backend_tokenizer: Any
    bos_token_id: int | None
    eos_token_id: int | None
    all_special_ids: Sequence[int]

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Any:
        """A mapping with `input_ids`, a list of token ids."""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How the runtime samples if nobody says otherwise; `top_k` 1 is greedy."""

    top_k: int = 1
    top_p: float = 1.0
    temperature: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """What the runtime has to know. `start` is put in front of the first prompt; `stop` token ids end an answer.

    `max_tokens` bounds prompt and answer together. `chat_template` is empty for a base model.
    """

    model_type: str
    start: int | None
    stop: tuple[int, ...]
    max_tokens: int
    chat_template: str = ""
    sampler: Sampler = Sampler()


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section of a bundle: `kind` as litert-lm-peek names it, `offset` and `size` in bytes."""

    kind: str
    model_type: str
    offset: int
    size: int


# What the checkpoint says


def describe(checkpoint: Path, tokenizer: Tokenizer, *, model_type: str, vocabulary: int, max_tokens: int) -> Metadata:
    """The metadata of a bundle.

    Args:
        checkpoint: the folder with `generation_config.json` and `config.json`.
        tokenizer: the checkpoint's, as transformers loads it.
        model_type: `gemma3` or `gemma3n`.
        vocabulary: how many tokens the embedding table holds.
        max_tokens: the length of the KV cache.

    Raises:
        BundleError: the model type is unknown, the template fails, or a token is not in the vocabulary.
    """
    if model_type not in _NEEDED:
        raise BundleError(
            f"LiteRT-LM model type {model_type!r} is unknown here", remedy=f"use one of {', '.join(_NEEDED)}"
        )
    generation, config = (_read_json(checkpoint / name) for name in ("generation_config.json", "config.json"))
    source = _template_source(tokenizer.chat_template)
    chat = template.prepare(source, tokenizer) if source else None
    stop = set(_eos(generation, config, tokenizer))
    if chat:
        stop |= _turn_end(chat.after_reply, tokenizer)
    _check_tokens(stop, "stop token", vocabulary)
    if chat:
        _check_tokens(_prompt_tokens(source, tokenizer), "token of the chat template", vocabulary)
    return Metadata(
        model_type=model_type,
        start=tokenizer.bos_token_id if _starts_with_bos(chat, tokenizer) else None,
        stop=tuple(sorted(stop)),
        max_tokens=max_tokens,
        chat_template=chat.source if chat else "",
        sampler=_sampler(generation),
    )


def _read_json(file: Path) -> Mapping[str, Any]:
    """The object in `file`; empty if there is no such file."""
    try:
        table = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if not isinstance(table, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise BundleError(f"{file} is not JSON: {error}", remedy="get the checkpoint anew") from error
    return table


def _template_source(templates: Any) -> str:
    """The template that `apply_chat_template` takes by default; some checkpoints have several, by name."""
    if isinstance(templates, Mapping):
        return str(templates.get("default", ""))
    return str(templates or "")


def _eos(generation: Mapping[str, Any], config: Mapping[str, Any], tokenizer: Tokenizer) -> list[int]:
    """The eos ids of the first source that has any, as `generate` looks for them."""
    text_config = config.get("text_config") or {}
    for value in (*(table.get("eos_token_id") for table in (generation, config, text_config)), tokenizer.eos_token_id):
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            if not ids or not all(type(item) is int for item in ids):
                raise BundleError(
                    f"eos_token_id is {value!r}, expected token ids", remedy="correct generation_config.json"
                )
            return ids
    raise BundleError(
        "neither generation_config.json, config.json nor the tokenizer names an eos token",
        cause="without one the model would never stop",
        remedy="add `eos_token_id` to generation_config.json",
    )


def _turn_end(after_reply: str, tokenizer: Tokenizer) -> set[int]:
    """The special token that ends the model's turn in the template, if one does."""
    ids = tokenizer(after_reply, add_special_tokens=False)["input_ids"]
    return set([token for token in ids if token in tokenizer.all_special_ids][:1])


def _prompt_tokens(source: str, tokenizer: Tokenizer) -> set[int]:
    """The tokens of a rendered conversation."""
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi"}]
    text = tokenizer.apply_chat_template(talk, chat_template=source, tokenize=False, add_generation_prompt=True)
    return set(tokenizer(text, add_special_tokens=False)["input_ids"])


def _check_tokens(ids: set[int], what: str, vocabulary: int) -> None:
    outside = sorted(token for token in ids if not 0 <= token < vocabulary)
    if outside:
        raise BundleError(
            f"{what} {outside[0]} is not in the model's vocabulary of {vocabulary} tokens",
            cause="tokenizer or generation_config.json belong to another model, or got tokens that the model did not",
            remedy="save tokenizer and generation config from the model that was trained, with its embedding resized",
        )


def _starts_with_bos(chat: template.Template | None, tokenizer: Tokenizer) -> bool:
    """Whether prompts begin with bos: what the template renders, or a base model's plain text."""
    if chat:
        return chat.starts_with_bos
    return bool(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])


def _sampler(generation: Mapping[str, Any]) -> Sampler:
    if not generation.get("do_sample"):
        return Sampler()
    names = {"top_k": _DEFAULT_TOP_K, "top_p": _DEFAULT_TOP_P, "temperature": _DEFAULT_TEMPERATURE}
    top_k, top_p, temperature = (
        default if generation.get(name) is None else generation[name] for name, default in names.items()
    )
    return Sampler(top_k=int(top_k), top_p=float(top_p), temperature=float(temperature))


# The tokenizer


def tokenizer_json(tokenizer: Tokenizer, vocabulary: int) -> str:
    """The tokenizer as `tokenizer.json` text, without added tokens that the model has no embedding for.

    Gemma 3's tokenizer has such a token, `<image_soft_token>`, whose id only the multimodal models hold.

    Raises:
        BundleError: it knows more tokens than the model, beside added ones.
    """
    backend = tokenizer.backend_tokenizer
    size = 1 + max(backend.get_vocab(with_added_tokens=False).values())
    if size > vocabulary:
        raise BundleError(
            f"the tokenizer has {size} tokens, the model's vocabulary only {vocabulary}",
            cause="the tokenizer belongs to another model",
            remedy="put the tokenizer files of this model into the checkpoint",
        )
    backend.no_truncation()
    backend.no_padding()
    text = str(backend.to_str())
    place = text.index(key := '"added_tokens":') + len(key)
    added, end = json.JSONDecoder().raw_decode(text, place)
    kept = [token for token in added if token["id"] < vocabulary]
    return text[:place] + json.dumps(kept, ensure_ascii=False, separators=(",", ":")) + text[end:]


# The file


def write(metadata: Metadata, tokenizer: str, models: Mapping[str, Path], out: Path) -> Facts:
    """Write a bundle and check it.

    Args:
        metadata: from `describe`.
        tokenizer: from `tokenizer_json`.
        models: `decoder` and, where it does not look them up itself, `embedder` and `per_layer_embedder` → TFLite file.
        out: the bundle; it is whole or absent.

    Returns:
        What the bundle holds: sections with their places, model type, tokens, limits.

    Raises:
        BundleError: a section is missing or no TFLite file, or what was written is not what was given.
    """
    _check_models(models, metadata.model_type)
    partial = out.with_name(out.name + ".partial")
    try:
        with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
            _build(_files(metadata, tokenizer, models, Path(scratch)), partial)
        sections = read_sections(partial)
        _check(partial, sections, metadata, tokenizer, models)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return _facts(metadata, sections)


_MODEL_KINDS = {
    "decoder": litertlm_builder.TfLiteModelType.PREFILL_DECODE,
    "embedder": litertlm_builder.TfLiteModelType.EMBEDDER,
    "per_layer_embedder": litertlm_builder.TfLiteModelType.PER_LAYER_EMBEDDER,
}


def _check_models(models: Mapping[str, Path], model_type: str) -> None:
    for name in _NEEDED[model_type]:
        if name not in models or not models[name].is_file():
            raise BundleError(
                f"a {model_type} bundle needs the section {name}, which is missing",
                remedy="remove the folder of that precision and run make again",
            )
    for name, file in models.items():
        if name not in (*_NEEDED[model_type], *_OPTIONAL[model_type]):
            raise BundleError(f"a {model_type} bundle has no section {name}", remedy="leave that section out")
        with file.open("rb") as stream:
            if stream.read(8)[4:] != _TFLITE:
                raise BundleError(
                    f"{file} is not a TFLite file",
                    cause="it was truncated or replaced after it was made",
                    remedy="remove its folder and run make again",
                )


def _files(metadata: Metadata, tokenizer: str, models: Mapping[str, Path], scratch: Path) -> dict[str, Path]:
    """All sections as files, by name in the order in which they are written."""
    llm, packed = scratch / "metadata.pb", scratch / "tokenizer.zlib"
    llm.write_bytes(_message(metadata).SerializeToString(deterministic=True))
    packed.write_bytes(_pack(tokenizer))
    return {"metadata": llm, "tokenizer": packed, **{name: models[name] for name in _MODEL_KINDS if name in models}}


def _message(metadata: Metadata) -> Any:
    """The metadata as LiteRT-LM's protocol buffer."""
    message = llm_metadata_pb2.LlmMetadata(
        max_num_tokens=metadata.max_tokens,
        supports_thinking=False,
        supports_function_calling=False,
        llm_model_type=llm_model_type_pb2.LlmModelType(),
    )
    getattr(message.llm_model_type, metadata.model_type).SetInParent()
    if metadata.start is not None:
        message.start_token.token_ids.ids.append(metadata.start)
    for token in metadata.stop:
        message.stop_tokens.add().token_ids.ids.append(token)
    if metadata.chat_template:
        message.jinja_prompt_template = metadata.chat_template
    # The runtime has no other sampler than this one: types GREEDY and TOP_K fail at the first token (0.18.1).
    message.sampler_params.type = sampler_params_pb2.SamplerParameters.TOP_P
    message.sampler_params.k = metadata.sampler.top_k
    message.sampler_params.p = metadata.sampler.top_p
    message.sampler_params.temperature = metadata.sampler.temperature
    return message


def _pack(tokenizer: str) -> bytes:
    """The tokenizer as its section holds it: length, then zlib data."""
    data = tokenizer.encode("utf-8")
    return len(data).to_bytes(8, "little") + zlib.compress(data)


def _build(files: Mapping[str, Path], out: Path) -> None:
    """Stream `files` into a bundle at `out`."""
    builder = litertlm_builder.LitertLmFileBuilder()
    builder.add_llm_metadata(str(files["metadata"]))
    builder.add_hf_tokenizer(str(files["tokenizer"]))
    for name, kind in _MODEL_KINDS.items():
        if name in files:
            builder.add_tflite_model(str(files[name]), kind)
    label = f"writing {out.name.removesuffix('.partial')}"
    expected = _total(files) / _COPIED_PER_SECOND
    with _system_metadata(_identity(files)), out.open("wb") as stream, log.waiting(label, expected):
        builder.build(stream, validate_metadata=True)


def _total(files: Mapping[str, Path]) -> int:
    return sum(file.stat().st_size for file in files.values())


def _identity(files: Mapping[str, Path]) -> dict[str, str]:
    """A bundle's identifier and date, the same for the same content."""
    content = hashlib.sha256()
    with log.progress("hashing sections", _total(files)) as bar:
        for name, file in files.items():
            content.update(f"{name} {FileRecord.of(file, file.parent, bar).sha256}\n".encode())
    date = datetime.fromtimestamp(int(os.environ.get("SOURCE_DATE_EPOCH", _DEFAULT_EPOCH)), tz=UTC)
    return {"uuid": str(uuid.uuid5(_NAMESPACE, content.hexdigest())), "creation_timestamp": date.isoformat()}


@contextmanager
def _system_metadata(entries: Mapping[str, str]) -> Iterator[None]:
    """Let the builder write `entries` where it would write a random identifier and the present time.

    It offers no way to set them (0.18.1); `tests/unit/test_litertlm.py` fails when it has another version.
    """
    items = [
        litertlm_builder.Metadata(key=key, value=value, dtype=litertlm_builder.DType.STRING)
        for key, value in entries.items()
    ]
    original = litertlm_builder.populate_system_metadata
    litertlm_builder.populate_system_metadata = lambda given: [*given, *items]
    try:
        yield
    finally:
        litertlm_builder.populate_system_metadata = original


# Reading back


def read_sections(bundle: Path) -> list[Section]:
    """The sections of a bundle, in the order of the file.

    Raises:
        BundleError: the header is not one.
    """
    try:
        table = litertlm_peek.read_litertlm_header(str(bundle), StringIO()).SectionMetadata()
        objects = [table.Objects(index) for index in range(table.ObjectsLength())]
        return [
            Section(
                kind=litertlm_core.any_section_data_type_to_string(item.DataType()),
                model_type=litertlm_peek.get_model_type(item) or "",
                offset=item.BeginOffset(),
                size=item.EndOffset() - item.BeginOffset(),
            )
            for item in objects
        ]
    except Exception as error:  # flatbuffers raises whatever reading at a wrong offset leads to
        raise BundleError(
            f"{bundle} has no readable bundle header: {type(error).__name__}: {error}",
            remedy="remove its folder and run make again",
        ) from error


def _check(
    bundle: Path, sections: Sequence[Section], metadata: Metadata, tokenizer: str, models: Mapping[str, Path]
) -> None:
    """Hold what is in the file against what was given."""
    expected = [("LlmMetadataProto", ""), ("HF_Tokenizer_Zlib", "")]
    expected += [("TFLiteModel", kind.value) for name, kind in _MODEL_KINDS.items() if name in models]
    kinds = [(section.kind, section.model_type) for section in sections]
    if kinds != expected:
        _refuse(bundle, f"has the sections {kinds} instead of {expected}")
    try:
        if llm_metadata_pb2.LlmMetadata.FromString(read(bundle, sections[0])) != _message(metadata):
            _refuse(bundle, "has other metadata than was given")
        if zlib.decompress(read(bundle, sections[1])[8:]).decode("utf-8") != tokenizer:
            _refuse(bundle, "has another tokenizer than was given")
    except (DecodeError, zlib.error, UnicodeDecodeError) as error:
        _refuse(bundle, f"has an unreadable section ({error})")
    given = [models[name] for name in _MODEL_KINDS if name in models]
    with log.progress("comparing sections", _total(models)) as bar:
        for section, file in zip(sections[2:], given, strict=True):
            with file.open("rb") as source, bundle.open("rb") as stream:
                stream.seek(section.offset)
                if section.size != file.stat().st_size or not _same(source, stream, section.size, bar):
                    _refuse(bundle, f"has another {section.model_type} than {file}")


def read(bundle: Path, section: Section) -> bytes:
    """The bytes of a section."""
    with bundle.open("rb") as stream:
        stream.seek(section.offset)
        return stream.read(section.size)


def _same(left: BinaryIO, right: BinaryIO, size: int, bar: log.Progress) -> bool:
    """Whether the next `size` bytes of two streams are the same."""
    for start in range(0, size, _CHUNK):
        count = min(_CHUNK, size - start)
        if left.read(count) != right.read(count):
            return False
        bar.advance(count)
    return True


def _refuse(bundle: Path, fault: str) -> None:
    raise BundleError(
        f"{bundle.name} {fault}",
        cause="the disk failed, or litert-lm-builder has changed",
        remedy=f"use litert-lm-builder {BUILDER}, as the lock says, and run make again",
    )


def _facts(metadata: Metadata, sections: Sequence[Section]) -> Facts:
    places: list[Fact] = [
        {"kind": item.kind, "model_type": item.model_type, "offset": item.offset, "size": item.size}
        for item in sections
    ]
    return {
        "sections": places,
        "model_type": metadata.model_type,
        "start_token": metadata.start,
        "stop_tokens": list(metadata.stop),
        "max_tokens": metadata.max_tokens,
        "chat_template": bool(metadata.chat_template),
        "top_k": metadata.sampler.top_k,
    }
