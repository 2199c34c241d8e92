"""The ladder of int8: which rungs there are, when one is taken, and what is said where none is good enough."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.checkpoint.reader import open_checkpoint
from pipeline.core import facts
from pipeline.core.errors import UsageError
from pipeline.core.recipe import PROJECT, RECIPES, Gate, Int8, load
from pipeline.core.stage import DEFAULT_MODEL
from pipeline.core.toml import Pattern
from pipeline.judge import metrics, screening
from pipeline.judge.corpus import Tokens
from pipeline.judge.reference import Floats, Head
from pipeline.quantize import hessians
from pipeline.search import ladder
from pipeline.search.ladder import Limit

PLAIN = Int8(scheme="dynamic", calibration_samples=8)


def summary(kld: float, *, spread: float = 0.1, wrong: int = 0, loss: float = 0.0) -> ladder.Figures:
    """Figures of 16 windows of 16 positions: mean KLD, `wrong` tokens in as many windows, mean `loss` in nats.

    Loss and KLD differ from window to window, by factors of `spread`.
    """
    random = np.random.default_rng(0)
    level = np.repeat(random.lognormal(0, spread, 16), 16)
    level /= level.mean()  # what is asked for is what comes out
    none, place = np.zeros(256), np.arange(256)
    missed = (place % 16) * 16 + place // 16
    scores = metrics.Scores(
        kld=kld * level,
        top1=(missed >= wrong).astype(float),
        top5=none + 1,
        tie=none,
        margin=none,
        nll=1 + loss * level,
        reference_nll=none + 1,
        squared_error=none,
        squared_reference=none + 1,
        max_abs=none,
    )
    return ladder.Figures.of(scores, place // 16)


def limit(kld: float = 0.01, positions: int = 2048, **gate: float) -> Limit:
    return Limit(gate=Gate(kld=kld, **gate), kld=kld, positions=positions)


def test_the_first_rung_is_the_recipe_and_each_adds_to_the_one_before() -> None:
    found = ladder.rungs(PLAIN)
    assert tuple(rung.name for rung in found) == ladder.NAMES
    assert found[0].section == PLAIN
    assert [rung.section.equalize for rung in found] == [0, 0.5, 0.5, 0.5, 0.5]
    assert [bool(rung.section.rotate) for rung in found] == [False, False, True, True, True]
    assert found[3].section.int8x2 == ("down_proj", "head") and found[4].section.int8x2 == (".",)


def test_what_a_recipe_does_already_is_no_rung() -> None:
    given = replace(PLAIN, equalize=0.7, rotate=(Pattern("."),), int8x2=(Pattern("down_proj"), Pattern("head")))
    assert [rung.name for rung in ladder.rungs(given)] == ["recipe", "int8x2-all"]
    assert [rung.name for rung in ladder.rungs(replace(given, int8x2=(Pattern("."),)))] == ["recipe"]
    kept = replace(PLAIN, gptq=True, groups=(Pattern("head"),), equalize=0.7)
    assert all(
        rung.section.gptq and rung.section.groups and rung.section.equalize == 0.7 for rung in ladder.rungs(kept)
    )


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.toml")), ids=lambda file: file.stem)
def test_every_shipped_recipe_has_rungs_and_limits_to_climb_by(file: Path) -> None:
    recipe = load(file)
    assert recipe.int8.ladder and (len(ladder.rungs(recipe.int8)) > 1 or recipe.int8.int8x2 == (Pattern("."),))
    for graphs, count in (("all", 2), ("step", 1), ("bundle", 1)):
        found = ladder.limits(recipe, graphs)  # type: ignore[arg-type]
        assert len(found) == count and all(each.positions >= 512 or graphs != "step" for each in found)


def test_a_recorded_rung_is_found_and_an_unknown_one_is_refused() -> None:
    assert ladder.named(PLAIN, "rotate") == ladder.rungs(PLAIN)[2].section
    with pytest.raises(UsageError, match="no rung 'int4' on its ladder; there are recipe, equalize"):
        ladder.named(PLAIN, "int4")


@pytest.mark.parametrize(
    ("found", "given", "kept"),
    [
        (summary(0.001), limit(), True),
        (summary(0.02), limit(), False),
        (summary(0.01), limit(), None),
        (summary(math.nan), limit(), False),
        (summary(0.001, wrong=40), limit(top1=0.96), False),
        (summary(0.001, wrong=8), limit(top1=0.96), None),
        (summary(0.001, wrong=1), limit(top1=0.96), True),
        (summary(0.001, loss=0.02), limit(perplexity_ratio_max=1.01), False),
        (summary(0.001, loss=0.01), limit(perplexity_ratio_max=1.0101), None),
        (summary(0.001), limit(perplexity_ratio_min=1.1), False),
    ],
)
def test_a_rung_is_judged_by_its_intervals(found: ladder.Figures, given: Limit, kept: bool | None) -> None:
    assert given.kept(found) is kept


@pytest.mark.parametrize(
    ("near", "beyond", "given"),
    [
        ({"kld": 0.0085}, {"kld": 0.0101}, {}),
        ({"wrong": 8}, {"wrong": 11}, {"top1": 0.96}),
        ({"loss": 0.0085}, {"loss": 0.0102}, {"perplexity_ratio_max": 1.01}),
    ],
)
def test_what_intervals_do_not_tell_is_decided_as_the_gate_will(
    near: dict[str, float], beyond: dict[str, float], given: dict[str, float]
) -> None:
    found = summary(**{"kld": 0.001, "spread": 1.0, **near})  # type: ignore[arg-type]
    for positions, expected in ((100_000, True), (found.positions, False)):  # much text has hardly any interval
        told = limit(positions=positions, **given)
        assert told.kept(found) is None and told.likely(found) is expected
    assert not limit(positions=100_000, **given).likely(summary(**{"kld": 0.001, "spread": 1.0, **beyond}))  # type: ignore[arg-type]


def test_a_shortfall_says_how_far_the_closest_rung_is_and_what_would_help() -> None:
    def rung(name: str, kld: float | None) -> facts.Rung:
        return facts.Rung(
            rung=name,
            kept=False,
            positions=256,
            kld=kld,
            kld_low=kld,
            kld_high=kld,
            top1=None if kld is None else 0.9,
            perplexity_ratio=None if kld is None else 1.0,
        )

    told = facts.Ladder(rung="rotate", limit=0.01, judged=(rung("recipe", None), rung("rotate", 0.025)))
    assert "rotate comes closest: KLD 0.025" in told.shortfall and "2.5 times the limit of 0.01" in told.shortfall
    assert "`gptq = true`" in told.shortfall
    assert "not finite" in facts.Ladder(rung="recipe", limit=0.01, judged=(rung("recipe", None),)).shortfall
    assert not facts.Ladder(rung="rotate").shortfall  # told: its evidence is elsewhere
    kept = replace(rung("rotate", 0.001), kept=True)
    assert not facts.Ladder(rung="rotate", limit=0.01, judged=(rung("recipe", 0.1), kept)).shortfall


def test_lots_of_text_are_disjoint_and_spread() -> None:
    windows = np.arange(50 * 4, dtype=np.int32).reshape(50, 4)
    text = ladder.Text(windows=windows, lots=(16, 16, 16), hidden=None, head=None)  # type: ignore[arg-type]
    rows = [text.rows(lot)[:, 0] for lot in range(3)]
    assert sorted(np.concatenate(rows).tolist()) == windows[:, 0].tolist()
    assert all(np.diff(row).max() == 12 for row in rows)


def test_large_models_are_judged_on_fewer_lots() -> None:
    found = {
        size: screening.lots(size, 128) for size in (2 * 10**6, 268 * 10**6, 1_700 * 10**6, 4_460 * 10**6, 7 * 10**9)
    }
    assert [len(lots) for lots in found.values()] == [4, 4, 2, 1, 1] and all(
        set(lots) == {16} for lots in found.values()
    )


def test_what_stage_moments_read_is_judged_by_its_own_states(tmp_path: Path) -> None:
    windows = np.arange(90 * 4, dtype=np.int32).reshape(90, 4)
    np.save(tmp_path / hessians.WINDOWS, windows)
    np.save(tmp_path / hessians.STATES, np.repeat(windows[..., None], 2, axis=2).astype(np.float32))
    told = facts.Moments(tokens=360, files=1, largest_activation=1.0, final_logit_softcapping=None, device="cpu")
    text = ladder.Text.kept(tmp_path, told, open_checkpoint(PROJECT / DEFAULT_MODEL), parameters=10)
    assert len(text.windows) == sum(text.lots) == 64, "spread over the text, as many as such a model is judged on"
    assert np.array_equal(np.unique(np.diff(text.windows[:, 0])), [4, 8])
    for lot in range(len(text.lots)):
        positions, states = text.expected(lot)
        assert np.array_equal(states[:, 0], text.rows(lot)[positions.window, positions.length - 1])


def test_windows_that_were_watched_are_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    windows, read = np.arange(16 * 4, dtype=np.int32).reshape(16, 4), list[int]()
    monkeypatch.setattr(ladder, "_STATES", 5 * 4 * 2)

    def hidden(ids: Tokens) -> Floats:
        read.append(len(ids))
        return np.repeat(ids[..., None], 2, axis=2).astype(np.float32)

    head = Head(weight=np.zeros((8, 2), np.float32), cap=None)
    begun = ladder.Text(windows=windows, lots=(16,), hidden=hidden, head=head)
    begun.begin()
    assert read == [5]
    positions, states = begun.expected(0)
    assert read == [5, 5, 5, 1]
    assert np.array_equal(states[:, 0], windows[positions.window, positions.length - 1])
