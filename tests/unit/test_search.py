"""Searching [int8] and [int4]: groups, patterns, the greedy path, halving, the frontier, the recipe that is written."""

from __future__ import annotations

import re
import tomllib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.core.errors import UsageError
from pipeline.core.recipe import PROJECT
from pipeline.core.recipe import parse as parse_recipe
from pipeline.quantize.rows import keeper, layer_name
from pipeline.search import candidates, halving, rewrite
from pipeline.search.candidates import INT4, INT8, Candidate, Contribution, Knob
from pipeline.search.groups import Layer, group, kind_of, patterns
from pipeline.search.halving import Point
from pipeline.tflite.graph import Graph

RECIPES = sorted((PROJECT / "pipeline" / "recipes").glob("*.toml"))
LAYERS = 6
KNOBS = (
    Knob(key="int8x2", lessens={"activations": 1.0}, work=1.0),
    Knob(
        key="keep_float",
        lessens={"weights": 1.0, "activations": 1.0},
        size=3.0,
        work=2.0,
        spares=("int8x2",),
        tables=True,
    ),
)
"""Two of the search space, which may change."""
SPACE = replace(INT8, knobs=KNOBS)


def model() -> list[Layer]:
    """A table tied to the head, and per layer q and k of one input, o, and two more that end in numbers."""
    made = [Layer(name="embed_tokens;1", reads=-1, weight=0, elements=4000, products=0)]
    for number in range(LAYERS):
        for place, kind in enumerate(("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj", "mlp.experts.1")):
            reads = 10 * number + max(place, 1)
            name = f"layers.{number}.{kind};{number % 2 or ''}"
            made.append(Layer(name=name, reads=reads, weight=10 * number + place + 1, elements=100, products=100))
    return [*made, Layer(name="head;", reads=999, weight=0, elements=4000, products=4000)]


GROUPS = group(model(), 2)


def test_kinds_that_share_an_input_or_weights_are_one_group() -> None:
    assert kind_of("layers.3.mlp.up_proj;1") == "layers.*.mlp.up_proj"
    assert kind_of("altup_projections.0;") == "altup_projections.*"
    assert [each.name for each in GROUPS] == [
        "embed_tokens + head",
        *("self_attn.q_proj + self_attn.k_proj 0–2", "self_attn.q_proj + self_attn.k_proj 3–5"),
        *("mlp.down_proj 0–2", "mlp.down_proj 3–5"),
        *("mlp.experts.* 0–2", "mlp.experts.* 3–5"),
    ]
    assert (GROUPS[0].elements, GROUPS[0].products) == (4000, 4000)
    assert (GROUPS[1].elements, GROUPS[1].products) == (600, 600)


@given(st.sets(st.sampled_from([each.name for each in GROUPS])), st.integers(1, 7))
def test_patterns_find_the_layers_of_the_groups_and_no_others(names: set[str], parts: int) -> None:
    groups = group(model(), parts)
    chosen = {each.name for each in groups if each.name in names or each.name.split(" ")[0] in names}
    found = {layer.name for layer in model() if keeper(patterns(chosen, groups))(layer.name)}
    wanted = {
        layer.name
        for layer in model()
        for each in groups
        if each.name in chosen
        and kind_of(layer.name) in each.kinds
        and (not each.numbers or int(layer.name.split(".")[1]) in each.numbers)
    }
    assert found == wanted


def test_the_head_has_one_name_whatever_a_graph_calls_it() -> None:
    found = patterns(["embed_tokens + head"], GROUPS)
    assert "head" in found
    names = ("head;", "embed_tokens;2", "layers.0.mlp.head;", "embed_tokens_per_layer;1")
    assert list(map(keeper(found), names)) == [True, True, False, False]
    names = ("head;", "logits", "layers.0.self_attn.head_mix;", "lm_head;", "embed_tokens;")
    assert list(map(keeper(["down_proj", "head"]), names)) == [True, False, False, False, False]


@pytest.mark.parametrize("matrix", ["embed_tokens.weight", "lm_head.weight"])
def test_a_graph_knows_its_head_by_the_matrix(matrix: str) -> None:
    graph = Graph.empty()
    table, other = (graph.add_constant(np.ones((9, 4), np.float32), name) for name in (matrix, "up"))
    x, logits, rows = (graph.add_tensor(name, "FLOAT32", (4,)) for name in ("x", "decode_logits_output", "embed;"))
    product, lookup = (
        graph.operator("FULLY_CONNECTED", [x, table, -1], [logits]),
        graph.operator("EMBEDDING_LOOKUP", [x, table], [rows]),
    )
    assert layer_name(graph, product) == "head;" and layer_name(graph, lookup) == "embed;"
    other = graph.add_constant(np.ones((9, 4), np.float32), "up")
    assert layer_name(graph, graph.operator("FULLY_CONNECTED", [x, other, -1], [logits])) == "decode_logits_output"


def test_every_group_is_said_with_one_pattern() -> None:
    assert patterns([each.name for each in GROUPS], GROUPS) == (".",)
    assert patterns([], GROUPS) == ()
    assert patterns(["mlp.down_proj 3–5", "mlp.down_proj 0–2"], GROUPS) == (r"^layers\.\d+\.mlp\.down_proj;",)


figures = st.fixed_dictionaries(
    {
        each.name: st.builds(Contribution, weights=st.floats(-1e-3, 1), activations=st.floats(-1e-3, 1))
        for each in GROUPS
    }
)


def path(found: dict[str, Contribution], most: float) -> list[Candidate]:
    return candidates.path(candidates.plain(SPACE), GROUPS, found, most, SPACE)


@given(figures, st.sampled_from([1.0, 1.08, 2.0, 9.0]))
def test_the_path_begins_plain_grows_and_keeps_the_size(found: dict[str, Contribution], most: float) -> None:
    made = path(found, most)
    assert made[0] == candidates.plain(SPACE)
    assert made == path(dict(reversed(found.items())), most)
    assert all(each.size <= most - 1 + 1e-9 for each in made)
    assert all(one.size <= two.size and one.work < two.work for one, two in zip(made, made[1:], strict=False))
    assert len({repr(each.values) for each in made}) == len(made)
    gained = sum(max(each.activations, 0) > 0 or max(each.weights, 0) > 0 for each in found.values())
    if most == 9.0:  # nothing holds it up: every group that costs anything ends in float
        assert made[-1].values["keep_float"] or not gained


@given(figures)
def test_a_recipe_is_priced_as_the_path_is(found: dict[str, Contribution]) -> None:
    for each in path(found, 9.0):
        priced = candidates.priced(each.name, each.values, model(), SPACE)
        assert (priced.size, priced.work) == pytest.approx((each.size, each.work))


def test_the_cheapest_gain_comes_first() -> None:
    found = {each.name: Contribution(weights=0.0, activations=0.0) for each in GROUPS}
    found["embed_tokens + head"] = Contribution(weights=0.0, activations=0.5)
    found["mlp.down_proj 3–5"] = Contribution(weights=0.0, activations=0.4)
    made = path(found, 1.08)
    assert [each.name for each in made[1:3]] == ["+ int8x2 mlp.down_proj 3–5", "+ int8x2 embed_tokens + head"]
    assert made[1].values == {"int8x2": [r"^layers\.(3|4|5)\.mlp\.down_proj;"], "keep_float": []}


def test_a_layer_in_float_needs_no_second_row() -> None:
    found = {"mlp.down_proj 0–2": Contribution(weights=0.1, activations=1.0)}
    last = path(found, 9.0)[-1]
    assert last.values["int8x2"] == [] and last.values["keep_float"] == [r"^layers\.(0|1|2)\.mlp\.down_proj;"]


def test_what_is_only_looked_up_has_no_input_to_prepare() -> None:
    table = group([Layer(name="rows;", reads=-8, weight=7, elements=500, products=0)], 1)
    groups, found = [*GROUPS, *table], {"rows": Contribution(weights=1.0, activations=0.0)}
    moved = {
        key: [each.name for each in candidates.path(candidates.plain(space), groups, found, 9.0, space)[1:]]
        for key, knob in (("rotate", INT8.knobs[1]), ("keep_float", KNOBS[1]))
        for space in [replace(SPACE, knobs=(knob,))]
    }
    assert moved == {"rotate": [], "keep_float": ["+ keep_float rows"]}


def test_a_knob_of_the_whole_model_is_one_line_more_and_the_path_keeps_it() -> None:
    knobs = (*KNOBS, Knob(key="equalize", values=(0.0, 0.3, 0.6)), Knob(key="gptq", values=(False, True)))
    space = replace(SPACE, knobs=knobs)
    starts = candidates.starts(space)
    assert [each.name for each in starts[:4]] == ["plain", "gptq true", "equalize 0.3", "equalize 0.3, gptq true"]
    assert starts[0] == candidates.plain(space) and len(starts) == 6
    assert candidates.quiet(starts[1], space).values == {**starts[1].values, "int8x2": ["."]}
    found = {"mlp.down_proj 0–2": Contribution(weights=0.1, activations=1.0)}
    made = candidates.path(starts[3], GROUPS, found, 1.0, space)
    assert [each.name for each in made] == [starts[3].name, f"{starts[3].name} + int8x2 mlp.down_proj 0–2"]
    assert [(each.values["equalize"], each.values["gptq"]) for each in made] == [(0.3, True)] * 2


def test_a_group_alone_is_the_only_one_in_int8() -> None:
    first = candidates.starts(INT8)[-1]
    two, one = candidates.alone(GROUPS[3], GROUPS, first, INT8)
    others = list(patterns([each.name for each in GROUPS if each is not GROUPS[3]], GROUPS))
    assert not keeper(others)("layers.1.mlp.down_proj;")
    assert two.values == {**first.values, "keep_float": others, "int8x2": [r"^layers\.(0|1|2)\.mlp\.down_proj;"]}
    assert one.values == {**first.values, "keep_float": others}


def test_four_bits_begin_everywhere_and_end_where_they_cost_least() -> None:
    first, layers = candidates.starts(INT4)[-1], model()
    assert [each.values["keep_int8"] for each in candidates.alone(GROUPS[0], GROUPS, first, INT4)] == [
        list(patterns([each.name for each in GROUPS[1:]], GROUPS))
    ]
    assert candidates.quiet(first, INT4) == first
    unit = candidates.unit(INT4, layers, first)
    assert unit.size == pytest.approx(0.78) and unit.values == {**first.values, "keep_int8": ["."]}
    assert candidates.unit(INT8, layers, candidates.starts(INT8)[1]) == candidates.starts(INT8)[1]
    found = {each.name: Contribution(weights=each.elements * 1e-6, activations=0.0) for each in GROUPS}
    found["embed_tokens + head"] = Contribution(weights=1e-3, activations=0.0)
    found["mlp.down_proj 3–5"] = Contribution(weights=1e-2, activations=0.0)
    made = candidates.path(first, GROUPS, found, 0.7 * (1 + unit.size), INT4)
    assert made[0] == first and made[1].values["keep_int8"] == [r"^layers\.(3|4|5)\.mlp\.down_proj;"]
    assert all(each.values["gptq"] is True and 1 + each.size <= 0.7 * (1 + unit.size) for each in made)
    assert candidates.path(first, GROUPS, found, 1 + unit.size, INT4)[-1].values["keep_int8"] == ["."]


# --- halving

points = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=3),
    st.builds(Point, st.floats(0, 2), st.floats(1e-6, 1)),
    min_size=1,
    max_size=12,
)


@given(points)
def test_the_frontier_is_monotone_and_beats_the_rest(found: dict[str, Point]) -> None:
    best = [found[name] for name in halving.frontier(found)]
    assert all(a.cost < b.cost and a.kld > b.kld for a, b in zip(best, best[1:], strict=False))
    assert all(any(one.cost <= each.cost and one.kld <= each.kld for one in best) for each in found.values())


@given(points, st.integers(1, 6))
@example({"a": Point(0.0, 0.5), "b": Point(1.0, 0.15625)}, 1)
def test_the_better_half_is_a_half_and_never_lies_higher(found: dict[str, Point], fewest: int) -> None:
    kept = halving.better_half(found, fewest)
    assert len(kept) == min(len(found), max(fewest, -(-len(found) // 2)))
    far = halving.regrets(found)
    assert max(far[name] for name in kept) <= min((far[name] for name in found if name not in kept), default=np.inf)
    assert all(distance >= -1e-9 for distance in far.values())
    best = min(found, key=lambda name: (found[name].kld, found[name].cost))
    assert far[best] == pytest.approx(0, abs=1e-9)


def test_costs_that_differ_by_next_to_nothing_are_one() -> None:
    found = {"a": Point(0.0, 1.0), "b": Point(5e-324, 0.5), "c": Point(1e-170, 0.3)}
    assert halving.regrets(found)["c"] == pytest.approx(0, abs=1e-9)


def test_the_most_faithful_one_stays_among_many_on_the_hull() -> None:
    found = {name: Point(0.1 * place, 2.0**-place) for place, name in enumerate("abcd")} | {"e": Point(0.0, 1.0)}
    assert halving.better_half(found, 1) == ["a", "d", "e"]


def test_what_lies_above_the_hull_goes() -> None:
    found = {"plain": Point(0, 0.1), "bad": Point(0.5, 0.09), "good": Point(0.5, 0.01), "dear": Point(1, 0.009)}
    assert halving.better_half(found, 3) == ["plain", "good", "dear"]


def test_a_file_that_gives_no_numbers_goes() -> None:
    assert halving.better_half({"a": Point(0, 0.1), "b": Point(0.1, float("nan"))}, 1) == ["a"]


# --- the written recipe


def is_pattern(text: str) -> bool:
    """Whether a recipe may have it: others are refused when it is read."""
    try:
        re.compile(text)
    except (re.error, OverflowError):
        return False
    return True


def drawn_patterns(letters: st.SearchStrategy[str]) -> st.SearchStrategy[list[str]]:
    return st.lists(letters.filter(is_pattern), max_size=6)


values = st.fixed_dictionaries(
    {},
    optional={
        "keep_float": drawn_patterns(st.text(min_size=1, max_size=40)),
        "int8x2": drawn_patterns(st.text(r"^layers\.\d+(1|2)_proj;'\"#[]é", min_size=1, max_size=40)),
        "calibration_samples": st.integers(1, 10**6),
    },
)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
@given(wanted=values)
def test_a_written_recipe_says_what_it_should_and_loads(file: Any, wanted: dict[str, Any]) -> None:
    text = file.read_text(encoding="utf-8")
    made = rewrite.with_values(text, "int8", wanted, ["a line", "another"])
    loaded = parse_recipe(made.encode(), "x").int8
    assert all(list(getattr(loaded, key)) == value for key, value in wanted.items() if isinstance(value, list))
    before, after = tomllib.loads(text), tomllib.loads(made)
    assert {**before, "int8": None} == {**after, "int8": None}
    again = rewrite.with_values(made, "int8", wanted, ["a line", "another"])
    assert again == made, "written twice, it says so once"


def test_comments_and_layout_stay() -> None:
    text = '# head\n[int8]\nscheme = "x"  # why\nkeep_float = [\n  "a", # one\n  "b",\n]\n\n# next\n[more] # c\nk = 1\n'
    made = rewrite.with_values(text, "int8", {"keep_float": [], "int8x2": ["."]})
    assert made == '# head\n[int8]\nscheme = "x"  # why\nkeep_float = []\nint8x2 = ["."]\n\n# next\n[more] # c\nk = 1\n'
    assert rewrite.with_values(text, "int8", {"keep_float": ["a", "b"], "int8x2": []}) == text
    assert rewrite.with_values(text, "more", {"k": 2}).endswith("[more] # c\nk = 2\n")


def test_a_recipe_without_the_section_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no \[int8\] section"):
        rewrite.with_values("int8.scheme = 'dynamic'\n", "int8", {"keep_float": []})


def test_a_section_in_one_line_becomes_a_table_of_its_own() -> None:
    text = 'name = "x"\nint8 = { scheme = "dynamic", keep_float = ["a.b"], gptq = true }\n\n[more]\nk = 1\n'
    made = rewrite.with_values(text, "int8", {"keep_float": [], "int8x2": ["."]}, ["a line"])
    before, after = tomllib.loads(text), tomllib.loads(made)
    assert after["int8"] == {"scheme": "dynamic", "keep_float": [], "gptq": True, "int8x2": ["."]}
    assert {**before, "int8": None} == {**after, "int8": None} and "# tune: a line\n" in made
    assert rewrite.with_values(made, "int8", {"keep_float": [], "int8x2": ["."]}, ["a line"]) == made


def test_the_line_of_a_long_array_is_broken() -> None:
    made = rewrite.with_values("[int8]\n", "int8", {"int8x2": [rf"^layers\.\d+\.{'x' * 40};"] * 3})
    assert made.count("\n") == 6 and max(map(len, made.splitlines())) <= 120
    assert tomllib.loads(made)["int8"]["int8x2"] == [rf"^layers\.\d+\.{'x' * 40};"] * 3
