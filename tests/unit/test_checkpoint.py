"""Checkpoints: strict headers, shards against their index, rows in float32 without the model in memory, refusals."""

from __future__ import annotations

import json
import math
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from pipeline.checkpoint import headers, kinds, preflight, reader
from pipeline.checkpoint.headers import TensorInfo
from pipeline.checkpoint.layout import Needed, lay_out
from pipeline.checkpoint.reader import open_checkpoint
from pipeline.checkpoint.source import Source
from pipeline.core.errors import FetchError, IntegrityError

Entry = dict[str, Any]
FILE = "model.safetensors"


def file_of(table: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header."""
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: object, begin: object, end: object, dtype: object = "F32") -> Entry:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def parse(data: bytes) -> dict[str, TensorInfo]:
    length = headers.header_length(data[:8], len(data), FILE)
    return headers.parse_header(data[8 : 8 + length], len(data), FILE)


GOOD = file_of({"__metadata__": {"format": "pt"}, "a": entry([2, 3], 0, 24), "b": entry([], 24, 28)}, bytes(28))


# ---- headers


def test_good_header() -> None:
    tensors = parse(GOOD)
    base = len(GOOD) - 28
    assert tensors == {
        "a": TensorInfo(shape=(2, 3), dtype="F32", file=FILE, offset=base, size=24),
        "b": TensorInfo(shape=(), dtype="F32", file=FILE, offset=base + 24, size=4),
    }


def test_padded_header_and_empty_tensor_are_fine() -> None:
    text = json.dumps({"a": entry([0, 3], 0, 0), "b": entry([1], 0, 4)}).encode() + b"    "
    assert list(parse(file_of(text, bytes(4)))) == ["a", "b"]


BAD: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "has only 0 bytes"),
    "seven bytes": (GOOD[:7], "has only 7 bytes"),
    "no header": (struct.pack("<Q", 0), "does not start with {"),
    "length beyond the format": (file_of({}, length=headers.LONGEST_HEADER + 1), "more than the format allows"),
    "length beyond the file": (file_of({}, length=3), "its header alone needs 11"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "not JSON": (file_of(b"{nonsense}"), "not valid JSON"),
    "cut JSON": (file_of(b'{"a": {'), "not valid JSON"),
    "an array": (file_of([]), "does not start with {"),
    "byte order mark": (file_of(b"\xef\xbb\xbf{}"), "does not start with {"),
    "UTF-16": (file_of("{}".encode("utf-16-le")), "not valid JSON"),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "not valid JSON"),
    "lone surrogate": (file_of(b'{"\\ud800": 1}'), "not valid JSON"),
    "not a number": (file_of(b'{"a": NaN}'), "NaN is no JSON"),
    "same name twice": (file_of(b'{"a": 1, "a": 1}'), "a key appears twice"),
    "nested deeply": (file_of(b'{"a":' + b"[" * 100_000), "not valid JSON"),
    "huge number": (file_of(b'{"a":' + b"9" * 10_000 + b"}"), "not valid JSON"),
    "metadata not text": (file_of({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata no table": (file_of({"__metadata__": []}), "__metadata__"),
    "entry no table": (file_of({"a": []}), "without dtype, shape and data_offsets alone"),
    "entry without shape": (file_of({"a": {"dtype": "F32", "data_offsets": [0, 4]}}), "without dtype, shape"),
    "entry with more": (file_of({"a": {**entry([1], 0, 4), "x": 1}}, bytes(4)), "without dtype, shape"),
    "unknown dtype": (file_of({"a": entry([1], 0, 4, "F33")}, bytes(4)), "a dtype that the format does not have"),
    "dtype no text": (file_of({"a": entry([1], 0, 4, ["F32"])}, bytes(4)), "a dtype that the format does not have"),
    "negative shape": (file_of({"a": entry([-1, -1], 0, 4)}, bytes(4)), "a shape that is none"),
    "fractional shape": (file_of({"a": entry([1.0], 0, 4)}, bytes(4)), "a shape that is none"),
    "boolean shape": (file_of({"a": entry([True], 0, 4)}, bytes(4)), "a shape that is none"),
    "too many dimensions": (file_of({"a": entry([1] * 65, 0, 4)}, bytes(4)), "a shape that is none"),
    "three offsets": (file_of({"a": {**entry([1], 0, 4), "data_offsets": [0, 4, 4]}}, bytes(4)), "data_offsets"),
    "negative offset": (file_of({"a": entry([1], -4, 0)}), "data_offsets that are none"),
    "reversed offsets": (file_of({"a": entry([1], 4, 0)}, bytes(4)), "-4 bytes"),
    "size against shape": (file_of({"a": entry([2], 0, 4)}, bytes(4)), "4 bytes, its shape and dtype need 8"),
    "size against dtype": (file_of({"a": entry([2], 0, 8, "BF16")}, bytes(8)), "8 bytes, its shape and dtype need 4"),
    "overlap": (file_of({"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, bytes(8)), "overlaps the tensor before it"),
    "same place": (file_of({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, bytes(4)), "overlaps the tensor before it"),
    "gap": (file_of({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)), "leaves a gap before it"),
    "gap at the start": (file_of({"a": entry([1], 4, 8)}, bytes(8)), "leaves a gap before it"),
    "truncated": (GOOD[:-1], "is truncated"),
    "header only": (GOOD[:-28], "is truncated"),
    "trailing bytes": (GOOD + b"\0", "has 1 bytes after its last tensor"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_header_is_refused(name: str) -> None:
    data, phrase = BAD[name]
    with pytest.raises(IntegrityError) as caught:
        parse(data)
    assert phrase in caught.value.what and FILE in caught.value.what
    assert caught.value.remedy


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
SHAPES = st.lists(st.integers(0, 3), max_size=3)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A good file with a few tensors."""
    tensors = draw(st.dictionaries(NAMES.filter(lambda name: name != "__metadata__"), SHAPES, max_size=4))
    kinds = st.sampled_from([np.float32, np.float16, np.int8])
    return save({name: np.zeros(shape, draw(kinds)) for name, shape in tensors.items()})


@st.composite
def damaged(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A good file, and the same with something done to its header or its length."""
    good = draw(files())
    end = 8 + int.from_bytes(good[:8], "little")
    start, stop = sorted((draw(st.integers(0, end)), draw(st.integers(0, end))))
    piece = draw(
        st.binary(max_size=8) | st.sampled_from([b"0", b"9", b"-", b"{", b"}", b"[", b"]", b",", b'"', b"1e9"])
    )
    return good, good[:start] + piece + good[min(stop, start + 12) :]


@given(damaged())
@example((GOOD, GOOD.replace(b"[2, 3]", b"[3, 2]")))
def test_whatever_is_done_to_a_header_it_is_refused_or_describes_the_file_exactly(pair: tuple[bytes, bytes]) -> None:
    _, data = pair
    try:
        tensors = parse(data)
    except IntegrityError:
        return
    deserialize(data)  # what passes here passes the reference reader
    base = 8 + int.from_bytes(data[:8], "little")
    assert sum(tensor.size for tensor in tensors.values()) == len(data) - base
    for tensor in tensors.values():
        assert base <= tensor.offset <= tensor.offset + tensor.size <= len(data)


@given(files(), st.integers(1, 40), st.booleans(), st.binary(min_size=40, max_size=40))
def test_a_file_of_another_length_never_passes(data: bytes, count: int, cut: bool, more: bytes) -> None:
    with pytest.raises(IntegrityError):
        parse(data[: max(0, len(data) - count)] if cut else data + more[:count])


@given(files(), st.data())
def test_moved_tensors_never_pass(data: bytes, draw: st.DataObject) -> None:
    end = 8 + int.from_bytes(data[:8], "little")
    table = json.loads(data[8:end])
    entries = [item for name, item in table.items() if name != "__metadata__"]
    if not entries:
        return
    chosen = draw.draw(st.sampled_from(entries))
    which, by = draw.draw(st.integers(0, 1)), draw.draw(st.integers(-50, 50).filter(bool))
    chosen["data_offsets"][which] += by
    with pytest.raises(IntegrityError):
        parse(file_of(table, data[end:]))


@given(files())
def test_good_files_pass_as_in_the_reference_reader(data: bytes) -> None:
    expected = {name: (tuple(item["shape"]), item["dtype"]) for name, item in deserialize(data)}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in parse(data).items()} == expected


def test_the_reference_reader_refuses_most_of_them_too() -> None:
    """The table above is about the format, not about taste: what the reference lets pass is known by name."""
    passed = set()
    for name, (data, _) in BAD.items():
        try:
            deserialize(data)
        except SafetensorError:
            continue
        passed.add(name)
    assert passed <= {"same name twice", "too many dimensions", "entry with more", "lone surrogate"}


# ---- index and shards


def index(weight_map: object) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": weight_map}).encode()


@pytest.mark.parametrize(
    "text",
    [b"", b"{}", b"[]", index({}), index([1]), index({"a": 1}), index({"a": "../a.safetensors"}), index({"a": "x.bin"}),
     index({"a": "C:\\a.safetensors"}), b'{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}'],
)  # fmt: skip
def test_bad_index_is_refused(text: bytes) -> None:
    with pytest.raises(IntegrityError):
        headers.parse_index(text, reader.INDEX)


def write_shards(folder: Path, parts: dict[str, dict[str, np.ndarray]], weight_map: dict[str, str]) -> None:
    for shard, tensors in parts.items():
        (folder / shard).write_bytes(save(tensors))
    (folder / reader.INDEX).write_bytes(index(weight_map))
    (folder / reader.CONFIG).write_text("{}")


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
A, B = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(4, dtype=np.float32)


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    write_shards(tmp_path, {ONE: {"a": A}, TWO: {"b": B}}, {"a": ONE, "b": TWO})
    opened = open_checkpoint(tmp_path)
    assert opened.files == (ONE, TWO)
    assert np.array_equal(opened.read("a"), A) and np.array_equal(opened.read("b"), B)


@pytest.mark.parametrize(
    ("parts", "weight_map", "phrase"),
    [
        ({ONE: {"a": A}}, {"a": ONE, "b": TWO}, f"lacks 1 of the 2 shards that {reader.INDEX} names: {TWO}"),
        ({ONE: {"a": A, "b": B}, TWO: {"b": B}}, {"a": ONE, "b": TWO}, f"{TWO} holds b, which {ONE} holds too"),
    ],
)
def test_shards_against_index(
    tmp_path: Path, parts: dict[str, dict[str, np.ndarray]], weight_map: dict[str, str], phrase: str
) -> None:
    write_shards(tmp_path, parts, weight_map)
    with pytest.raises(IntegrityError) as caught:
        open_checkpoint(tmp_path)
    assert phrase in caught.value.what


@pytest.mark.parametrize(
    ("parts", "weight_map"),
    [
        ({ONE: {"a": A}, TWO: {"b": B}}, {"a": ONE, "b": TWO, "lm_head.weight": TWO}),
        ({ONE: {"a": A}, TWO: {"b": B}}, {"a": TWO, "b": ONE}),
        ({ONE: {"a": A, "b": B}, TWO: {}}, {"a": ONE, "x": TWO}),
    ],
)
def test_headers_say_what_there_is_and_the_index_names_files(
    tmp_path: Path, parts: dict[str, dict[str, np.ndarray]], weight_map: dict[str, str]
) -> None:
    write_shards(tmp_path, parts, weight_map)
    opened = open_checkpoint(tmp_path)
    assert np.array_equal(opened.read("a"), A) and np.array_equal(opened.read("b"), B)


def test_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(FetchError):
        open_checkpoint(tmp_path)


def test_configurations(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(save({"a": A}))
    (tmp_path / reader.CONFIG).write_text('{"model_type": "x"}')
    opened = open_checkpoint(tmp_path)
    assert opened.config == {"model_type": "x"}
    assert opened.generation_config == {}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert open_checkpoint(tmp_path).generation_config == {"eos_token_id": [1, 2]}
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(IntegrityError):
        assert open_checkpoint(tmp_path).generation_config


# ---- weights

TYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def write_tensors(folder: Path, tensors: dict[str, np.ndarray], shift: int = 0) -> reader.Checkpoint:
    """Save in the format's own layout, any numpy type; `shift` moves the data off its alignment."""
    codes = {np.dtype(kind): code for code, kind in TYPES.items()} | {np.dtype(np.int8): "I8"}
    table, data = {}, b""
    for name, value in tensors.items():
        raw = value.tobytes()
        table[name] = entry(list(value.shape), len(data), len(data) + len(raw), codes[value.dtype])
        data += raw
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8 + shift)
    (folder / FILE).write_bytes(file_of(text, data))
    (folder / reader.CONFIG).write_text("{}")
    return open_checkpoint(folder)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("code", TYPES)
def test_every_bit_pattern_widens_exactly(tmp_path: Path, code: str, shift: int) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    value = bits.view(TYPES[code]) if code != "F32" else (bits.astype(np.uint32) << 16 | bits).view(np.float32)
    opened = write_tensors(tmp_path, {"first": np.ones(3, np.float32), "a": value.reshape(256, 256)}, shift)
    with np.errstate(invalid="ignore"):
        expected = value.astype(np.float32).reshape(256, 256)
    read = opened.read("a")
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, expected)
    np.testing.assert_array_equal(np.signbit(read), np.signbit(expected))
    np.testing.assert_array_equal(opened.rows("a", 3, 200), expected[3:200])


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    tensors = {
        "s": np.array(2.5, ml_dtypes.bfloat16),
        "e": np.zeros((0, 3), np.float16),
        "w": np.zeros((2, 0), np.float32),
    }
    opened = write_tensors(tmp_path, tensors)
    assert opened.read("s").shape == () and opened.read("s") == 2.5
    assert opened.read("e").shape == (0, 3) and opened.rows("w", 0, 2).shape == (2, 0)
    assert opened.rows("e", 0, 0).shape == (0, 3)
    with pytest.raises(IndexError):
        opened.rows("s", 0, 1)


@pytest.mark.parametrize(("start", "stop"), [(-1, 1), (0, 3), (2, 1), (5, 5)])
def test_rows_outside_are_an_error(tmp_path: Path, start: int, stop: int) -> None:
    opened = write_tensors(tmp_path, {"a": A})
    with pytest.raises(IndexError):
        opened.rows("a", start, stop)


def test_integers_are_no_weights(tmp_path: Path) -> None:
    opened = write_tensors(tmp_path, {"a": np.ones(3, np.int8)})
    with pytest.raises(IntegrityError, match="dtype I8"):
        opened.read("a")
    with pytest.raises(KeyError):
        opened.read("b")


def anonymous() -> int:
    rows = Path("/proc/self/status").read_text().splitlines()
    return next(int(row.split()[1]) * 1024 for row in rows if row.startswith("RssAnon"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of anonymous memory")
def test_rows_of_a_large_table_take_the_memory_of_these_rows(tmp_path: Path) -> None:
    rows, width = 1 << 17, 1024  # 256 MB as stored, 512 MB in float32; sparse on the disk
    text = json.dumps({"table": entry([rows, width], 0, 2 * rows * width, "BF16")}).encode()
    with (tmp_path / FILE).open("wb") as stream:
        stream.write(file_of(text))
        stream.truncate(8 + len(text) + 2 * rows * width)
    (tmp_path / reader.CONFIG).write_text("{}")
    opened = open_checkpoint(tmp_path)
    peak, stop = anonymous(), threading.Event()
    before = peak

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.002):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    step = 2048  # 8 MB in float32
    total = sum(float(opened.rows("table", start, start + step)[0, 0]) for start in range(0, rows, step))
    stop.set()
    watcher.join()
    assert total == 0
    assert peak - before < 40 << 20


# ---- against an architecture


def info(*shape: int, dtype: str = "BF16") -> TensorInfo:
    return TensorInfo(shape=shape, dtype=dtype, file=FILE, offset=0, size=2 * math.prod(shape))


def canonical(name: str) -> str | None:
    return None if name.startswith("vision.") else name.removeprefix("model.")


NEEDED = Needed(shapes={"norm.weight": (4,), "embed.weight": (9, 4)}, canonical=canonical)
STORED = {"model.norm.weight": info(4), "model.embed.weight": info(9, 4), "vision.x": info(3, dtype="I8")}


def test_match_maps_needed_names_to_stored_ones() -> None:
    assert lay_out(STORED, NEEDED, "it", tied=True) == {
        "norm.weight": "model.norm.weight",
        "embed.weight": "model.embed.weight",
    }


Change = Callable[[dict[str, TensorInfo]], object]


@pytest.mark.parametrize(
    ("change", "phrases"),
    [
        (lambda t: t.pop("model.norm.weight"), ["1 tensor is missing: norm.weight"]),
        (lambda t: t.clear(), ["2 tensors are missing: embed.weight, norm.weight"]),
        (lambda t: t.update({"model.x": info(1)}), ["1 tensor is extra: model.x"]),
        (
            lambda t: t.update({f"model.x{i}": info(1) for i in range(7)}),
            ["7 tensors are extra: model.x0,", "and 2 more"],
        ),
        (lambda t: t.update({"norm.weight": info(4)}), ["stored twice: model.norm.weight = norm.weight"]),
        (lambda t: t.update({"model.norm.weight": info(5)}), ["another shape: model.norm.weight [5] instead of [4]"]),
        (
            lambda t: t.update({"model.norm.weight": info(4, dtype="F8_E4M3")}),
            ["not float: model.norm.weight (F8_E4M3)"],
        ),
    ],
)
def test_match_names_what_is_wrong(change: Change, phrases: list[str]) -> None:
    tensors = dict(STORED)
    change(tensors)
    with pytest.raises(FetchError) as caught:
        lay_out(tensors, NEEDED, "org/tiny", tied=True)
    assert "org/tiny does not hold the model that its config.json describes" in caught.value.what
    for phrase in phrases:
        assert phrase in caught.value.what


def test_float_type_is_that_of_most_parameters() -> None:
    assert reader.float_type([info(9), info(4, dtype="F32"), info(4, dtype="F32")]) == "bfloat16"
    assert reader.float_type([info(9), info(10, dtype="F32")]) == "float32"


# ---- kinds that are refused (over HTTP in tests/stages/test_fetch.py)


@pytest.mark.parametrize(
    ("names", "phrase"),
    [
        ({"config.json", "pytorch_model-00001-of-00002.bin"}, "pickle files only"),
        ({"config.json", "training_args.bin", "optimizer.pt"}, "it holds no model"),
        ({"config.json", "tf_model.h5"}, "another format (tf_model.h5)"),
        ({"config.json", "consolidated.safetensors"}, "another format (consolidated.safetensors)"),
        ({"config.json", ONE}, "has shards but no"),
        ({FILE}, "has no config.json"),
    ],
)
def test_kinds(names: set[str], phrase: str) -> None:
    with pytest.raises(FetchError) as caught:
        kinds.check(holding(names))
    assert phrase in "\n".join(caught.value.lines())


def holding(names: set[str], *below: str, remote: bool = False) -> Source:
    """What has files of these names, each an empty JSON object."""
    return Source(where="it", sizes=dict.fromkeys(names, 2), read=lambda *_: b"{}", remote=remote, below=lambda: below)


def test_a_whole_model_may_have_an_adapter_beside() -> None:
    kinds.check(holding({FILE, "config.json", "adapter_config.json", "adapter_model.safetensors"}))


def test_of_checkpoints_in_subfolders_the_last_is_named() -> None:
    """By number: 1000 comes after 90. On the Hub a subfolder has to be downloaded first."""
    below = [f"checkpoint-{steps}/model.safetensors" for steps in (90, 1000, 500)]
    for remote, remedy in ((False, "MODEL_ID=it/checkpoint-1000"), (True, "--include 'checkpoint-1000/*'")):
        with pytest.raises(FetchError) as caught:
            kinds.check(holding({"README.md"}, *below, remote=remote))
        assert "one in each of checkpoint-90, checkpoint-500, checkpoint-1000" in caught.value.what
        assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"text_config": {"quantization_config": {"load_in_4bit": True}}}, "bitsandbytes"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "mlx"),
        ({"quantization_config": "int4"}, "unknown method"),
    ],
)
def test_quantised(config: dict[str, Any], method: str) -> None:
    """Weights decide: only with a tensor that is no float the table is believed."""
    with pytest.raises(FetchError) as caught:
        preflight.check_left_overs({"a": info(9), "b.weight": info(4, dtype="U8")}, config, {FILE}, "it")
    assert f"is quantised already ({method}; b.weight is U8)" in caught.value.what
    preflight.check_left_overs({"a": info(9)}, config, {FILE}, "it")
    assert preflight.quantised({"text_config": {"hidden_size": 8}, "quantization_config": None}, {FILE}) == ""
