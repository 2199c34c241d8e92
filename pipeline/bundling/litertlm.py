"""Writing the on-device bundle: one `.litertlm` file with metadata, tokenizer and TFLite sections.

The same sections give the same bytes: litert-lm-builder's random identifier and clock are replaced by a hash of the
content and SOURCE_DATE_EPOCH, and stop tokens are sorted. Sections are streamed from file to file.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import BinaryIO

from google.protobuf.message import DecodeError
from litert_lm_builder import litertlm_builder, litertlm_core, litertlm_peek
from litert_lm_builder.runtime.proto import (
    executor_metadata_pb2,
    llm_metadata_pb2,
    llm_model_type_pb2,
    sampler_params_pb2,
)

from pipeline.bundling import towers
from pipeline.bundling.metadata import SENSES, Metadata, Picture, Sound
from pipeline.checkpoint.sound import FRAME4, RATE4
from pipeline.core import log
from pipeline.core.errors import BundleError
from pipeline.core.facts import Patches, Section
from pipeline.core.manifest import FileRecord
from pipeline.core.recipe import SECTION_LIMIT
from pipeline.runtime.picture import Sight
from pipeline.runtime.sound import Hearing
from pipeline.tflite import external
from pipeline.tflite.graph import Graph

BUILDER = "0.18.1"
"""The litert-lm-builder that the replacement of its system metadata was written for."""
JUDGED_WITH = "0.18.1"
"""The LiteRT-LM that bundles are judged with; an older one warns that it may not run them."""
MODEL, WEIGHTS, METADATA, EXECUTOR = "TFLiteModel", "TFLiteWeights", "LlmMetadataProto", "ExecutorMetadataProto"
"""Kinds of sections, as litert-lm-builder names them."""
_NAMESPACE = uuid.UUID("6f6c1a52-3a3f-5d0e-9c1b-0f4f2f3f7b61")
_DEFAULT_EPOCH = 315532800  # 1980-01-01, what the Makefile uses outside git
_TFLITE = b"TFL3"  # bytes 4 to 8 of every TFLite file
_COPIED_PER_SECOND = 4e8
_CHUNK = 1 << 20
_THOUGHTS = "thought"
"""The channel of what a model thinks, as Google's own bundles call it."""


def write(
    metadata: Metadata,
    tokenizer: str,
    models: Mapping[str, Path],
    out: Path,
    limit: int = SECTION_LIMIT,
    *,
    must: bool = False,
) -> list[Section]:
    """Write a bundle and check it.

    Args:
        metadata: from `describe`.
        tokenizer: from `tokenizer_json`.
        models: the TFLite file of each of the metadata's sections.
        out: the bundle; it is whole or absent.
        limit: bytes of a section. Of a larger model some weights stand in a section of their own, where that helps.
        must: whether a bundle is refused where it does not; else that model is left whole.

    Returns:
        Its sections with their places.

    Raises:
        BundleError: a section is missing, no TFLite file, or too large for any division; or what was written is not
            what was given.
    """
    _check_models(models, metadata)
    towers.check(models, metadata)
    # A name that no stage looks for, in the same folder: only so is the rename at the end one step.
    partial = out.with_name(out.name + ".partial")
    try:
        with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
            parts = _divided(models, limit, Path(scratch), must=must)
            described = _described(metadata, tokenizer, models[_DECODER], Path(scratch))
            _build(described, parts, metadata.activation_type, partial)
            sections = read_sections(partial)
            _check(partial, sections, metadata, tokenizer, parts, described)
        for part in parts:
            if part.kind == WEIGHTS:
                _check_joined(partial, sections, part.model, models[part.model])
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return sections


@dataclass(frozen=True)
class _Part:
    """A section of the model `model`: itself, or weights of it."""

    model: str
    file: Path
    kind: str = MODEL

    @property
    def name(self) -> str:
        return self.model if self.kind == MODEL else f"{self.model}_weights"


_DECODER = "decoder"
MODEL_KINDS = {
    _DECODER: litertlm_builder.TfLiteModelType.PREFILL_DECODE,
    "embedder": litertlm_builder.TfLiteModelType.EMBEDDER,
    "per_layer_embedder": litertlm_builder.TfLiteModelType.PER_LAYER_EMBEDDER,
    "vision_encoder": litertlm_builder.TfLiteModelType.VISION_ENCODER,
    "vision_adapter": litertlm_builder.TfLiteModelType.VISION_ADAPTER,
    "end_of_vision": litertlm_builder.TfLiteModelType.END_OF_VISION,
    "audio_encoder": litertlm_builder.TfLiteModelType.AUDIO_ENCODER_HW,
    "audio_adapter": litertlm_builder.TfLiteModelType.AUDIO_ADAPTER,
    "end_of_audio": litertlm_builder.TfLiteModelType.END_OF_AUDIO,
}
"""Models by the project's names, in the order in which they stand in the file; the runtime finds them by kind."""


def _check_models(models: Mapping[str, Path], metadata: Metadata) -> None:
    for name in metadata.sections:
        if name not in models or not models[name].is_file():
            raise BundleError(
                f"a {metadata.model_type} bundle needs the section {name}, which is missing",
                file=models.get(name),
            )
    for name, file in models.items():
        if name not in metadata.sections:
            raise BundleError(f"a {metadata.model_type} bundle has no section {name}", remedy="leave that section out")
        with file.open("rb") as stream:
            if stream.read(8)[4:] != _TFLITE:
                raise BundleError(
                    f"{file} is not a TFLite file",
                    cause="it was truncated or replaced after it was made",
                    file=file,
                )


def _divided(models: Mapping[str, Path], limit: int, scratch: Path, *, must: bool) -> list[_Part]:
    """The sections of all models in the order in which they are written, those of weights behind their models."""
    parts = []
    for name in MODEL_KINDS:
        if name not in models:
            continue
        own = [_Part(name, models[name])]
        if (size := own[0].file.stat().st_size) > limit:
            graph = Graph.read(models[name])
            sizes = external.split(graph, size, limit)
            if max(sizes.model, sizes.weights) <= limit:
                own = [_Part(name, scratch / f"{name}.tflite"), _Part(name, scratch / f"{name}.weights", WEIGHTS)]
                external.write(graph, sizes.moved, *(part.file for part in own))
            elif must:
                raise BundleError(
                    f"{models[name]} has {log.human_bytes(size)}, too much for two sections of "
                    f"{log.human_bytes(limit)} each",
                    cause="LiteRT-LM takes one section of a model and one of weights beside it, and a matrix is whole",
                    remedy="leave this precision out of `bundle.precisions`, or raise `bundle.section_limit`",
                )
        parts += own
    return parts


def _described(metadata: Metadata, tokenizer: str, decoder: Path, scratch: Path) -> dict[str, Path]:
    """The sections that are no model's, as files by name."""
    llm, packed = scratch / "metadata.pb", scratch / "tokenizer.zlib"
    # Protocol buffers promise no order of bytes without it.
    llm.write_bytes(_message(metadata).SerializeToString(deterministic=True))
    packed.write_bytes(_pack(tokenizer))
    found = {"metadata": llm, "tokenizer": packed}
    if metadata.picture and metadata.picture.whole:
        found["executor"] = scratch / "executor.pb"
        found["executor"].write_bytes(seeing_whole(decoder))
    return found


def seeing_whole(decoder: Path) -> bytes:
    """What LiteRT-LM is told so that soft tokens of a picture see each other: how it masks, and the `decoder`'s cache.

    Without a list of all parts of the cache it does not open such a bundle (0.18.1). A sliding layer's ring is a local
    one: as a global one it would end a conversation where the ring ends.
    """
    message = executor_metadata_pb2.ExecutorMetadata()
    told = message.llm_executor_metadata
    told.attention_mask_settings.attention_mask_type = (
        executor_metadata_pb2.AttentionMaskType.ATTENTION_MASK_TYPE_VISION_BIDIRECTIONAL
    )
    kinds = executor_metadata_pb2.StateBuffer
    graph = Graph.read(decoder)
    shapes = {str(port.name): graph.shape(int(port.tensorIndex)) for port in graph.ports()}
    longest = shapes["mask"][-1]
    for name in sorted(name for name in shapes if name.startswith("kv_cache_")):
        keys = name.startswith("kv_cache_k_")
        whole = shapes[name][2 if keys else 3] == longest
        told.state_buffers.add(
            prefill_input_name=name,
            prefill_output_name=name,
            decode_input_name=name,
            decode_output_name=name,
            type={
                (True, True): kinds.TYPE_GLOBAL_KEY_CACHE,
                (False, True): kinds.TYPE_GLOBAL_VALUE_CACHE,
                (True, False): kinds.TYPE_LOCAL_KEY_CACHE,
                (False, False): kinds.TYPE_LOCAL_VALUE_CACHE,
            }[keys, whole],
            sequence_axis=2 if keys else 3,
        )
    data: bytes = message.SerializeToString(deterministic=True)
    return data


def _message(metadata: Metadata) -> llm_metadata_pb2.LlmMetadata:
    """The metadata as LiteRT-LM's protocol buffer."""
    message = llm_metadata_pb2.LlmMetadata(
        max_num_tokens=metadata.max_tokens,
        min_runtime_version=JUDGED_WITH,
        supports_thinking=metadata.thoughts is not None,
        supports_function_calling=metadata.tools,
        llm_model_type=llm_model_type_pb2.LlmModelType(),
    )
    # The type is which field of a union is set.
    kind = getattr(message.llm_model_type, metadata.model_type)
    kind.SetInParent()
    for name, text in metadata.calls.items():
        setattr(kind, name, text)
    # A family's own type has the places of its media built in.
    if metadata.model_type == SENSES and (metadata.picture or metadata.sound):
        _says_where(kind, [told.place for told in (metadata.picture, metadata.sound) if told])
    if metadata.picture and metadata.picture.patches:
        _sees_patches(kind, metadata.picture, metadata.picture.patches)
    elif metadata.picture:
        _sees(kind, metadata.picture)
    if metadata.sound:
        (_hears_apart if metadata.sound.apart else _hears)(kind, metadata.sound)
    if metadata.thoughts:
        start, end = metadata.thoughts
        message.channels.add(channel_name=_THOUGHTS, start=start, end=end)
    if metadata.start is not None:
        message.start_token.token_ids.ids.append(metadata.start)
    if metadata.pad is not None:
        message.pad_token.token_ids.ids.append(metadata.pad)
    for token in metadata.stop:
        # A stop sequence of one token each: several ids in one entry would have to come one after the other.
        message.stop_tokens.add().token_ids.ids.append(token)
    if metadata.chat_template:
        message.jinja_prompt_template = metadata.chat_template
    # The runtime has no other sampler than this one: types GREEDY and TOP_K fail at the first token (0.18.1).
    message.sampler_params.type = sampler_params_pb2.SamplerParameters.TOP_P
    message.sampler_params.k = metadata.sampler.top_k
    message.sampler_params.p = metadata.sampler.top_p
    message.sampler_params.temperature = metadata.sampler.temperature
    return message


def _says_where(kind: llm_model_type_pb2.GenericModel, places: Sequence[str]) -> None:
    """Say at which tokens a prompt is cut."""
    kind.delimiter_regex = f"({'|'.join(map(re.escape, places))})"


def _sees(kind: llm_model_type_pb2.GenericModel, picture: Picture) -> None:
    """Say how a picture goes in: pixels in 0 … 1; between lines of their own, as the processors have it.

    What ends a picture is the last row of the adapter. Where soft tokens see the whole picture it is text: as a row it
    would be seen by them.
    """
    kind.image_enabled = True
    kind.image_token_regex = re.escape(picture.place)
    kind.image_tensor_height = kind.image_tensor_width = picture.size
    kind.start_of_image_token.token_str, kind.end_of_image_token.token_str = picture.start, picture.end
    behind = f"{picture.end}\n\n" if picture.whole else "\n\n"
    kind.image_prefix, kind.image_suffix, kind.add_image_end = "\n\n", behind, False


def _sees_patches(kind: llm_model_type_pb2.Gemma4, picture: Picture, patches: Patches) -> None:
    """Say how a picture that keeps its proportions goes in; where its place is, the type itself says.

    The section end_of_vision is the token behind it.
    """
    kind.start_of_image_token.token_str, kind.end_of_image_token.token_str = picture.start, picture.end
    kind.patch_width = kind.patch_height = patches.size
    kind.max_num_patches, kind.pooling_kernel_size = patches.count, patches.pool


def _hears(kind: llm_model_type_pb2.GenericModel, sound: Sound) -> None:
    """Say how sound goes in: as samples, of which the encoder makes the spectrogram; between lines of their own."""
    kind.audio_enabled = True
    kind.audio_token_regex = re.escape(sound.place)
    kind.start_of_audio_token.token_str, kind.end_of_audio_token.token_str = sound.start, sound.end
    # As `Gemma3nProcessor` of transformers has it; the section end_of_audio is the token behind a sound.
    kind.audio_prefix, kind.audio_suffix, kind.add_audio_end = "\n\n", "\n\n", True
    kind.skip_mel_spectrogram_extraction = True
    kind.audio_sample_rate_hz, kind.audio_num_channels = sound.rate, 1
    kind.audio_frame_length, kind.audio_hop_length, kind.audio_input_scale = sound.frame, sound.hop, 1.0


def _hears_apart(kind: llm_model_type_pb2.Gemma4, sound: Sound) -> None:
    """The same of sound in frames side by side: how long they are, and where its place is, the type itself says."""
    kind.start_of_audio_token.token_str, kind.end_of_audio_token.token_str = sound.start, sound.end
    kind.skip_mel_spectrogram_extraction = True


def _pack(tokenizer: str) -> bytes:
    """The tokenizer as its section holds it: length, then zlib data."""
    data = tokenizer.encode("utf-8")
    # The reader sets the text's length aside before it inflates.
    return len(data).to_bytes(8, "little") + zlib.compress(data)


def _build(described: Mapping[str, Path], parts: Sequence[_Part], activation_type: str, out: Path) -> None:
    """Stream all sections into a bundle at `out`; `activation_type` is the decoder's."""
    builder = litertlm_builder.LitertLmFileBuilder()
    builder.add_llm_metadata(str(described["metadata"]))
    builder.add_hf_tokenizer(str(described["tokenizer"]))
    if "executor" in described:
        builder.add_executor_metadata(str(described["executor"]))
    for part in parts:
        kind, preferred = MODEL_KINDS[part.model], activation_type if part.model == _DECODER else None
        if part.kind == WEIGHTS:
            builder.add_tflite_weights(str(part.file), kind)
        else:
            with redirect_stdout(None):  # it says what it was told
                builder.add_tflite_model(str(part.file), kind, prefer_activation_type=preferred)
    files = {**described, **{part.name: part.file for part in parts}}
    label = f"writing {out.name.removesuffix('.partial')}"
    expected = _total(files.values()) / _COPIED_PER_SECOND
    with _system_metadata(_identity(files)), out.open("wb") as stream, log.waiting(label, expected):
        # The builder's own check; `_check` below reads what really stands in the file.
        builder.build(stream, validate_metadata=True)


def _total(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _identity(files: Mapping[str, Path]) -> dict[str, str]:
    """A bundle's identifier and date, the same for the same content."""
    content = hashlib.sha256()
    with log.progress("hashing sections", _total(files.values())) as bar:
        for name, file in files.items():
            # Of hashes, not of the files one after another: a byte that moved from one to the next would not show.
            content.update(f"{name} {FileRecord.of(file, file.parent, bar).sha256}\n".encode())
    # The reproducible-builds convention; the Makefile sets it to the commit's time.
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
    # The entries that were asked for stay; only the two of the builder's own are ours.
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
        # It prints what it finds into the stream that it is given.
        table = litertlm_peek.read_litertlm_header(str(bundle), StringIO()).SectionMetadata()
        objects = [table.Objects(index) for index in range(table.ObjectsLength())]
        return [
            Section(
                kind=litertlm_core.any_section_data_type_to_string(item.DataType()),
                model_type=litertlm_peek.get_model_type(item) or "",
                offset=item.BeginOffset(),
                size=item.EndOffset() - item.BeginOffset(),
                activation_type=_told(item, "prefer_activation_type"),
            )
            for item in objects
        ]
    except Exception as error:  # flatbuffers raises whatever reading at a wrong offset leads to
        raise BundleError(
            f"{bundle} has no readable bundle header: {type(error).__name__}: {error}", file=bundle
        ) from error


def _told(item: litertlm_peek.schema.SectionObject, key: str) -> str:
    """The text of a section's metadata by its name; empty where it has none. The library reads one key alone."""
    for entry in (item.Items(place) for place in range(item.ItemsLength())):
        table = entry.Value() if entry and entry.Key() == key.encode() else None
        if table and entry.ValueType() == litertlm_peek.schema.VData.StringValue:
            text = litertlm_peek.schema.StringValue()
            text.Init(table.Bytes, table.Pos)
            return (text.Value() or b"").decode("utf-8")
    return ""


def _check(
    bundle: Path,
    sections: Sequence[Section],
    metadata: Metadata,
    tokenizer: str,
    parts: Sequence[_Part],
    described: Mapping[str, Path],
) -> None:
    """Hold what is in the file against what was given."""
    told = {(_DECODER, MODEL): metadata.activation_type}
    expected = [(METADATA, "", ""), ("HF_Tokenizer_Zlib", "", "")]
    expected += [(EXECUTOR, "", "")] if "executor" in described else []
    expected += [(part.kind, MODEL_KINDS[part.model].value, told.get((part.model, part.kind), "")) for part in parts]
    kinds = [(section.kind, section.model_type, section.activation_type) for section in sections]
    if kinds != expected:
        _refuse(bundle, f"has the sections {kinds} instead of {expected}")
    try:
        if llm_metadata_pb2.LlmMetadata.FromString(read(bundle, sections[0])) != _message(metadata):
            _refuse(bundle, "has other metadata than was given")
        # Behind the 8 bytes of the length.
        if zlib.decompress(read(bundle, sections[1])[8:]).decode("utf-8") != tokenizer:
            _refuse(bundle, "has another tokenizer than was given")
        if "executor" in described and read(bundle, sections[2]) != described["executor"].read_bytes():
            _refuse(bundle, "has another executor's metadata than was given")
    except (DecodeError, zlib.error, UnicodeDecodeError) as error:
        _refuse(bundle, f"has an unreadable section ({error})")
    with log.progress("comparing sections", _total(part.file for part in parts)) as bar:
        for section, file in zip(sections[len(described) :], (part.file for part in parts), strict=True):
            with file.open("rb") as source, bundle.open("rb") as stream:
                stream.seek(section.offset)
                if section.size != file.stat().st_size or not _same(source, stream, section.size, bar):
                    _refuse(bundle, f"has another {section.model_type} than {file}")


def _check_joined(bundle: Path, sections: Sequence[Section], name: str, file: Path) -> None:
    """Hold a divided model against `file`, of which it was made: the same tensors with the same values."""
    found = read_model(bundle, sections, MODEL_KINDS[name].value)
    for ours, given in zip(found.all_views(), Graph.read(file).all_views(), strict=True):
        for tensor in range(len(given.main.tensors)):
            held = [view.mapped(tensor).data if view.is_constant(tensor) else None for view in (ours, given)]
            if ours.name(tensor) != given.name(tensor) or held[0] != held[1]:
                _refuse(bundle, f"has other values for {given.name(tensor)} than {file}")


def read_model(bundle: Path, sections: Sequence[Section], model_type: str) -> Graph:
    """A model of a bundle, with the weights that stand in a section of their own."""
    own = {section.kind: section for section in sections if section.model_type == model_type}
    graph = Graph.read(bundle, own[MODEL].offset, own[MODEL].size)
    if WEIGHTS in own:
        external.join(graph, bundle, own[WEIGHTS].offset)
    return graph


def thoughts(bundle: Path) -> tuple[str, str] | None:
    """The texts around what the model of a bundle thinks, if it says so.

    Raises:
        BundleError: the header is not one.
    """
    message = _said(bundle)
    found = [channel for channel in message.channels if channel.channel_name == _THOUGHTS]
    return (found[0].start, found[0].end) if found else None


def hears(bundle: Path) -> Hearing | None:
    """How a bundle hears, if it does; raises as `thoughts`."""
    told = _said(bundle).llm_model_type
    if told.gemma4.skip_mel_spectrogram_extraction:
        return Hearing(rate=RATE4, frame=FRAME4, hop=FRAME4)
    kind = told.generic_model
    if not kind.audio_enabled:
        return None
    return Hearing(rate=kind.audio_sample_rate_hz, frame=kind.audio_frame_length, hop=kind.audio_hop_length)


def sees(bundle: Path) -> Sight | None:
    """How a bundle sees, if it does; raises as `thoughts`."""
    told = _said(bundle).llm_model_type
    kind, own = told.generic_model, told.gemma4
    if count := own.max_num_patches:
        # Zero is what a field gives that nobody set.
        pool = own.pooling_kernel_size or 1
        return Sight(patches=Patches(size=own.patch_width, pool=pool, tokens=count // pool**2))
    return Sight(size=kind.image_tensor_height) if kind.image_enabled else None


def _said(bundle: Path) -> llm_metadata_pb2.LlmMetadata:
    """The metadata of a bundle; empty if it has none."""
    held = [section for section in read_sections(bundle) if section.kind == METADATA]
    return llm_metadata_pb2.LlmMetadata.FromString(read(bundle, held[0])) if held else llm_metadata_pb2.LlmMetadata()


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
