"""A recipe is right or is refused with the name of the key; nothing wrong passes, nothing else is raised."""

from __future__ import annotations

import copy
import hashlib
import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.core import graph, recipe
from pipeline.core.errors import UsageError

FILE = recipe.PROJECT / "pipeline" / "recipes" / "gemma3n.toml"
GOOD = tomllib.loads(FILE.read_text(encoding="utf-8"))
Place = tuple[str | int, ...]


def as_toml(value: object) -> str:
    """`value` as TOML's inline syntax, for values that `tomllib` gave or a test put in."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {as_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value)
    return str(value).lower()


def load(folder: Path, table: dict[str, Any]) -> recipe.Recipe:
    file = folder / "recipe.toml"
    text = "".join(f"{json.dumps(key)} = {as_toml(value)}\n" for key, value in table.items())
    file.write_text(text, encoding="utf-8")
    return recipe.load(file)


def places(value: object, at: Place = ()) -> Iterator[Place]:
    """Every key and list index in `value`, as a path from the top."""
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*at, key)
        yield from places(item, (*at, key))


def parent_of(table: Any, place: Place) -> Any:
    for key in place[:-1]:
        table = table[key]
    return table


def is_optional(place: Place) -> bool:
    return (
        place in (("int8", "keep_float"), ("int8", "ladder"), ("bundle", "optional"), ("bundle", "positions"))
        or place[0] in ("int4", "towers")
        or (place[0] == "gates" and len(place) > 1)
    )


PLACES = sorted(places(GOOD), key=str)
REQUIRED = [place for place in PLACES if isinstance(place[-1], str) and not is_optional(place)]
TABLES: list[Place] = [place for place in PLACES if isinstance(parent_of(GOOD, place)[place[-1]], dict)]
in_any_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def refused(folder: Path, table: dict[str, Any]) -> str:
    with pytest.raises(UsageError) as caught:
        load(folder, table)
    assert caught.value.remedy
    return caught.value.what


def test_the_shipped_recipe_loads() -> None:
    loaded = recipe.load(FILE)
    assert loaded.name == "gemma3n"
    assert loaded.sha256 == hashlib.sha256(FILE.read_bytes()).hexdigest()
    assert loaded.shapes.batch == (1, 2, 3, 8)
    assert loaded.graphs == "all"
    assert loaded.bundle.prefill == (32, 128) and loaded.bundle.precisions == ("fp32", "int8")
    assert loaded.bundle.max_tokens == 4096 - 127
    assert loaded.gates["int8-dynamic"].kld == GOOD["gates"]["int8-dynamic"]["kld"]
    assert loaded.gates["fp16"].nmse is None


def test_what_the_test_writes_is_the_same_recipe(tmp_path: Path) -> None:
    assert tomllib.loads("x = " + as_toml(GOOD)) == {"x": GOOD}
    assert load(tmp_path, GOOD).gates == recipe.load(FILE).gates


def test_int4_in_bundles_without_a_word_on_how_it_is_made_is_refused(tmp_path: Path) -> None:
    table = copy.deepcopy(GOOD)
    table["bundle"]["precisions"] = ["fp32", "int4"]
    table["bundle"].pop("optional", None)
    del table["int4"]
    assert "there is no `int4` section" in refused(tmp_path, table)
    table["int4"] = {"keep_int8": ["layers"], "int8_tokens": [[0, 8], [9, 12]]}
    loaded = load(tmp_path, table).int4
    assert loaded is not None and loaded.keep_int8 == ("layers",) and loaded.int8_tokens == ((0, 8), (9, 12))


@pytest.mark.parametrize(
    ("ranges", "said"),
    [
        ([[8, 4]], "not in ascending order"),
        ([[0, 8], [4, 9]], "not in ascending order"),
        ([[1]], "expected 2 values"),
        (["a"], ""),
    ],
)
def test_ranges_of_tokens_that_are_none_are_refused(tmp_path: Path, ranges: object, said: str) -> None:
    table = copy.deepcopy(GOOD)
    table["int4"] = {"int8_tokens": ranges}
    assert said in refused(tmp_path, table)


@pytest.mark.parametrize(
    ("section", "key"),
    [*(("int8", key) for key in ("keep_float", "int8x2", "int8x2_static", "groups", "rotate")), ("int4", "keep_int8")],
)
@pytest.mark.parametrize("pattern", ["(", "*", "[a", "(?P<x", "\\"])
def test_a_pattern_that_is_no_regular_expression_is_refused(
    tmp_path: Path, section: str, key: str, pattern: str
) -> None:
    table = copy.deepcopy(GOOD)
    table[section][key] = ["down_proj", pattern]
    assert f"`recipe.{section}.{key}[1]` is {pattern!r}, no regular expression" in refused(tmp_path, table)


@pytest.mark.parametrize(("section", "size"), [("int8", 3), ("int8", 96), ("int4", 24)])
def test_a_rotation_of_no_power_of_two_is_refused(tmp_path: Path, section: str, size: int) -> None:
    table = copy.deepcopy(GOOD)
    table[section]["rotation"] = size
    assert f"`{section}.rotation` is {size}" in refused(tmp_path, table)


def test_a_whole_number_will_do_for_a_limit(tmp_path: Path) -> None:
    table = copy.deepcopy(GOOD)
    table["gates"]["fp16"]["kld"] = 1
    assert load(tmp_path, table).gates["fp16"].kld == 1.0


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.toml: No such file") as caught:
        recipe.load(tmp_path / "absent.toml")
    assert "RECIPE=" in caught.value.remedy


@pytest.mark.parametrize("data", [b"x = ", b"[a", b"\xff\xfe", b"a = 1\na = 2"])
def test_what_is_not_toml_is_refused(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "recipe.toml"
    file.write_bytes(data)
    with pytest.raises(UsageError, match="not TOML"):
        recipe.load(file)


def test_a_folder_is_not_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Is a directory"):
        recipe.load(tmp_path)


@pytest.mark.parametrize("schema", [0, 2, "1", True, 1.0])
def test_another_schema_is_refused(tmp_path: Path, schema: object) -> None:
    assert "schema = 1" in refused(tmp_path, {**GOOD, "schema": schema})


@pytest.mark.parametrize("place", REQUIRED, ids=lambda place: ".".join(map(str, place)))
def test_a_missing_key_is_named(tmp_path: Path, place: Place) -> None:
    table = copy.deepcopy(GOOD)
    del parent_of(table, place)[place[-1]]
    what = refused(tmp_path, table)
    assert ".".join(map(str, place)) in what or place == ("schema",)


@pytest.mark.parametrize("place", [(), *TABLES], ids=lambda place: ".".join(map(str, place)) or "top")
@pytest.mark.parametrize("key", ["unknown", "sha256", "Kld"])
def test_an_unknown_key_is_named(tmp_path: Path, place: Place, key: str) -> None:
    table = copy.deepcopy(GOOD)
    parent_of(table, (*place, key))[key] = 1
    assert key in refused(tmp_path, table)


def test_what_is_optional_is_built_besides(tmp_path: Path) -> None:
    table = copy.deepcopy(GOOD)
    table["bundle"]["optional"] = ["int8", "int4"]
    assert "`bundle.optional` names int8, which `bundle.precisions` names already" in refused(tmp_path, table)
    table["bundle"]["optional"] = ["int4"]
    loaded = load(tmp_path, table)
    assert loaded.bundle.built == ("fp32", "int8", "int4") == graph.Choice(recipe=loaded, graphs="all").bundles
    assert graph.Choice(recipe=loaded, graphs="all").judged == ("fp32", "fp16", "int8", "int8-static")
    del table["int4"]
    assert "`bundle.optional` names int4, and there is no `int4` section" in refused(tmp_path, table)


@pytest.mark.parametrize(
    ("section", "old", "value", "new"),
    [
        ("int8", "two_rows", ["."], "int8x2"),
        ("int8", "two_tensors", ["."], "int8x2_static"),
        ("int8", "fold", 0.7, "equalize"),
        ("int8", "blocks", ["."], "groups"),
        ("int8", "block", 64, "group_size"),
        ("int4", "wide_tokens", [[0, 8]], "int8_tokens"),
        ("int4", "two_rows", ["."], "int8x2"),
        ("int4", "fold", 0.7, "equalize"),
    ],
)
def test_a_key_of_old_is_refused_with_its_new_name(
    tmp_path: Path, section: str, old: str, value: object, new: str
) -> None:
    table = copy.deepcopy(GOOD)
    table[section][old] = value
    assert f"`recipe.{section}.{old}` is now called `{new}`" in refused(tmp_path, table)
    del table[section][old]
    table[section][new] = value
    load(tmp_path, table)


@pytest.mark.parametrize(
    ("text", "size"), [("2 GiB", 2**31), ("1.5 GB", 1_500_000_000), ("300 kB", 300_000), ("64 MiB", 2**26)]
)
def test_a_size_is_read_with_its_unit(tmp_path: Path, text: str, size: int) -> None:
    table = copy.deepcopy(GOOD)
    table["bundle"]["section_limit"] = text
    assert load(tmp_path, table).bundle.section_limit == size


@pytest.mark.parametrize("value", ["2GiB", "2", "GiB", "-1 GiB", "0 GiB", "1e3 GB", "2 gib", "inf GB", 2048, True])
def test_what_is_no_size_is_refused(tmp_path: Path, value: object) -> None:
    table = copy.deepcopy(GOOD)
    table["bundle"]["section_limit"] = value
    assert "`recipe.bundle.section_limit` is" in refused(tmp_path, table)


@pytest.mark.parametrize(
    ("place", "nearest"),
    [
        (("int8", "keepfloat"), "keep_float"),
        (("int8", "int8_x2"), "int8x2"),
        (("gates", "fp16", "xyz"), None),
        (("grahps",), "graphs"),
    ],
)
def test_the_key_that_is_nearest_to_an_unknown_one_is_named(tmp_path: Path, place: Place, nearest: str | None) -> None:
    table = copy.deepcopy(GOOD)
    parent_of(table, place)[place[-1]] = 1
    what = refused(tmp_path, table)
    assert f"unknown key `recipe.{'.'.join(map(str, place))}`" in what
    assert what.endswith(f"the nearest that there is: `{nearest}`") if nearest else what.endswith("`")


def test_a_misspelt_key_is_named_and_not_the_one_that_is_missing_for_it(tmp_path: Path) -> None:
    table = copy.deepcopy(GOOD)
    table["int8"]["schema"] = table["int8"].pop("scheme")
    assert refused(tmp_path, table).endswith("unknown key `recipe.int8.schema`; the nearest that there is: `scheme`")


SCHEME, SAMPLES = "scheme = 'dynamic'", "calibration_samples = 0x80"
WAYS = {
    "over several lines": [
        "[int8]",
        SCHEME,
        SAMPLES,
        "int8x2 = [",
        '    "down_proj", # why',
        "",
        '    "head",',
        "]",
        r'rotate = ["a\\.b"]',
    ],
    "in single quotes": ["[int8]", SCHEME, SAMPLES, "int8x2 = ['down_proj', 'head']", r"rotate = ['a\.b']"],
    "in three quotes": ["[int8]", SCHEME, SAMPLES, "int8x2 = ['''down_proj''', 'head']", r"rotate = ['''a\.b''']"],
    "indented": [
        "  [int8]",
        f"\t{SCHEME}",
        f"   {SAMPLES}",
        '\tint8x2=["down_proj","head"]',
        r'  rotate   =   ["a\\.b"]',
    ],
    "inline": [rf'int8 = {{ {SCHEME}, {SAMPLES}, int8x2 = ["down_proj", "head"], rotate = ["a\\.b"] }}'],
    "dotted": [f"int8.{SCHEME}", f"int8.{SAMPLES}", 'int8.int8x2 = ["down_proj", "head"]', r"int8.'rotate' = ['a\.b']"],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_toml_may_be_written_in_any_of_its_ways(tmp_path: Path, way: str, end: str) -> None:
    others = [f"{key} = {as_toml(value)}" for key, value in GOOD.items() if key != "int8"]
    file = tmp_path / "recipe.toml"
    file.write_bytes(end.join([*others, *WAYS[way], ""]).encode())
    loaded = recipe.load(file).int8
    assert loaded == recipe.Int8(
        scheme="dynamic", calibration_samples=128, int8x2=("down_proj", "head"), rotate=(r"a\.b",)
    )


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("step", "max_batch"), 0),
        (("step", "max_batch"), -8),
        (("step", "max_batch"), 10**400),
        (("step", "max_batch"), 8.0),
        (("step", "fixed"), ["128"]),
        (("step", "fixed"), ["0x128"]),
        (("step", "fixed"), ["1x128; rm"]),
        (("step", "fixed"), [128]),
        (("step", "fixed"), ["9x128"]),
        (("step", "fixed"), ["1x4096"]),
        (("corpus", "window"), True),
        (("corpus", "verification"), ""),
        (("shapes", "batch"), []),
        (("shapes", "batch", 1), 0),
        (("shapes", "padding", 0), "middle"),
        (("int8", "scheme"), "weight-only"),
        (("graphs",), "decoder"),
        (("bundle", "cache_length"), 0),
        (("bundle", "prefill"), []),
        (("bundle", "prefill", 0), 0),
        (("bundle", "prefill", 1), 8.0),
        (("bundle", "precisions"), []),
        (("bundle", "precisions", 0), "fp16"),
        (("bundle", "decode"), 0),
        (("bundle", "continuation"), True),
        (("model_types",), []),
        (("gates",), {}),
        (("gates", "fp32", "kld"), float("nan")),
        (("gates", "fp32", "kld"), float("inf")),
        (("gates", "fp32", "top1"), -0.5),
        (("gates", "fp32", "top1"), 10**400),
        (("gates", "fp32", "top1"), False),
    ],
)
def test_a_value_that_would_judge_or_build_nothing_is_refused(tmp_path: Path, place: Place, value: object) -> None:
    table = copy.deepcopy(GOOD)
    parent_of(table, place)[place[-1]] = value
    what = refused(tmp_path, table)
    key = next(key for key in reversed(place) if isinstance(key, str))
    assert f"{key}" in what


def with_bundle(**changes: Any) -> dict[str, Any]:
    table = copy.deepcopy(GOOD)
    table["bundle"] |= changes
    return table


@pytest.mark.parametrize(("length", "prefill"), [(127, [32, 128]), (1, [2]), (100, [8, 128, 16])])
def test_a_cache_shorter_than_a_prefill_is_refused(tmp_path: Path, length: int, prefill: list[int]) -> None:
    what = refused(tmp_path, with_bundle(cache_length=length, prefill=prefill))
    assert what.endswith(f"`bundle.cache_length` is {length}, shorter than a prefill of {max(prefill)}")


@pytest.mark.parametrize(("length", "decode"), [(128, 1), (255, 128), (140, 128)])
def test_a_cache_without_room_to_decode_is_refused(tmp_path: Path, length: int, decode: int) -> None:
    what = refused(tmp_path, with_bundle(cache_length=length, prefill=[128], decode=decode))
    assert f"`bundle.decode` is {decode}" in what and f"{length - 127}" in what


@in_any_folder
@given(length=st.integers(1, 400), prefill=st.lists(st.integers(1, 300), min_size=1, max_size=3), decode=st.just(1))
def test_a_prefill_padded_to_the_longest_signature_fits_behind_the_last_token(
    tmp_path: Path, length: int, prefill: list[int], decode: int
) -> None:
    table = with_bundle(cache_length=length, prefill=prefill, decode=decode)
    if length <= max(prefill):
        refused(tmp_path, table)
        return
    bundle = load(tmp_path, table).bundle
    assert bundle.max_tokens - 1 + max(prefill) == bundle.cache_length


OTHER_KINDS: list[Any] = [True, 7, 0.5, "text", ["a", 1], {"a": 1}, [[]]]


@in_any_folder
@given(place=st.sampled_from(PLACES), value=st.sampled_from(OTHER_KINDS))
def test_a_value_of_another_kind_never_passes(tmp_path: Path, place: Place, value: Any) -> None:
    table = copy.deepcopy(GOOD)
    old = parent_of(table, place)[place[-1]]
    number_for_limit = isinstance(old, float) and type(value) is int
    if type(value) is type(old) and not isinstance(value, dict | list) or number_for_limit:
        return
    parent_of(table, place)[place[-1]] = value
    what = refused(tmp_path, table)
    assert any(str(key) in what for key in place)


@in_any_folder
@given(st.data())
def test_any_mixture_of_edits_is_refused_or_loads(tmp_path: Path, data: st.DataObject) -> None:
    table = copy.deepcopy(GOOD)
    for _ in range(data.draw(st.integers(1, 4), label="edits")):
        place = data.draw(st.sampled_from(sorted(places(table), key=str)), label="place")
        parent = parent_of(table, place)
        if data.draw(st.booleans(), label="remove"):
            del parent[place[-1]]
        else:
            parent[place[-1]] = copy.deepcopy(data.draw(st.sampled_from(OTHER_KINDS), label="value"))
        if not table:
            break
    try:
        loaded = load(tmp_path, table)
    except UsageError as error:
        assert error.remedy
    else:
        assert set(table) | {"int4", "towers"} == set(GOOD)  # a recipe need not have these sections
        assert loaded.gates and loaded.shapes.batch


@in_any_folder
@given(st.binary(max_size=60))
def test_any_bytes_raise_nothing_but_usage_errors(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "recipe.toml"
    file.write_bytes(data)
    with pytest.raises(UsageError):
        recipe.load(file)


def test_a_recipe_of_brackets_alone_is_no_fault_of_the_project() -> None:
    with pytest.raises(UsageError, match="is not TOML"):
        recipe.parse(b"a = " + b"[" * 3000, "recipe.toml")


def checkpoint_of(model_type: str, folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def test_the_recipe_is_the_one_for_the_checkpoints_model_type(tmp_path: Path) -> None:
    """In a folder, or where fetch has put one; what is said counts first, and of an unknown one it is Gemma 3n's."""
    root = tmp_path / "out"
    for model_type in ("gemma3_text", "gemma3n", "qwen3"):
        folder = checkpoint_of(model_type, tmp_path / model_type)
        assert model_type in recipe.load(recipe.chosen(None, str(folder), root)).model_types
        assert recipe.chosen(Path("my.toml"), str(folder), root) == Path("my.toml")
    assert recipe.chosen(None, "org/model", root) == recipe.DEFAULT
    assert recipe.chosen(None, str(checkpoint_of("none", tmp_path / "odd")), root) == recipe.DEFAULT
    checkpoint_of("gemma3", root / "fetch" / "checkpoint")
    assert "gemma3" in recipe.load(recipe.chosen(None, "org/model", root)).model_types


def test_what_has_to_be_said_for_a_recipe(tmp_path: Path) -> None:
    """Nothing for the one that a model's type finds, with CONTEXT= too; else its place, if it is shipped."""
    first, other = recipe.RECIPES / "gemma3.toml", recipe.RECIPES / "gemma3_vision.toml"
    own = tmp_path / "own.toml"
    assert recipe.asked_for(recipe.load(first), "gemma3") == ""
    assert recipe.asked_for(recipe.load(other), "gemma3") == "pipeline/recipes/gemma3_vision.toml"
    own.write_text(recipe.with_context(first, "256"), encoding="utf-8")
    assert recipe.asked_for(recipe.load(own), "gemma3") == ""
    own.write_text(recipe.with_context(other, "8192"), encoding="utf-8")
    assert recipe.asked_for(recipe.load(own), "gemma3") == "pipeline/recipes/gemma3_vision.toml"
    own.write_text(first.read_text(encoding="utf-8").replace("equalize = 0.7", "equalize = 0.6"))
    assert recipe.asked_for(recipe.load(own), "gemma3") == "path/to/gemma3.toml"


def test_a_snapshot_in_the_cache_of_the_hub_is_called_by_its_model(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("a" * 40)
    other = tmp_path / "models--org--name" / "refs" / "main"
    for folder, name in {snapshot: "org--name", other: "main"}.items():
        folder.mkdir(parents=True)
        assert graph.model_name(str(folder)) == name


@pytest.mark.parametrize("file", sorted(recipe.RECIPES.glob("*.toml")), ids=lambda file: file.stem)
def test_bundles_are_judged_on_as_many_positions_as_their_limits_need(file: Path) -> None:
    """Of a KLD of 0.003 nats n positions give the perplexity ratio to 2 √(0.006 / n), 0.0077 of the conversations'."""
    loaded = recipe.load(file)
    gate = loaded.gates["bundle-int8"]
    assert gate.perplexity_ratio_max
    judged = 3 * loaded.bundle.decode + loaded.bundle.positions
    assert 2 * (2 * 0.003 / judged) ** 0.5 < 0.5 * (gate.perplexity_ratio_max - 1)
