"""A licence is passed on as it is, or publishing stops with the reason: never a wrong claim in between."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.errors import PublishError, UsageError
from pipeline.release import licence
from pipeline.release.licence import Ancestor, Claim, Licence

GEMMA = Claim(
    model="google/gemma-3n-E2B-it", model_type="gemma3n", terms="gemma", licence="gemma", base_models=(), tags=()
)
OWN = Claim(
    model="tiny-gemma3n",
    model_type="gemma3n_text",
    terms="gemma",
    licence="cc0-1.0",
    base_models=(),
    tags=("litert", "trained-from-scratch"),
)
FINE_TUNE = Claim(
    model="someone/gemma-3n-poet",
    model_type="gemma3n",
    terms="gemma",
    licence="apache-2.0",
    base_models=("someone/gemma-3n-base", "google/gemma-3n-E2B-it"),
    tags=(),
)


@pytest.mark.parametrize("name", ["gemma", "Gemma", "gemma-terms-of-use", "Gemma Terms of Use"])
def test_gemma_stays_gemma(name: str) -> None:
    found = licence.resolve(dataclasses.replace(GEMMA, licence=name))
    assert (found.identifier, found.link) == ("gemma", "https://ai.google.dev/gemma/terms")


def test_a_fine_tune_that_keeps_the_terms_passes() -> None:
    assert licence.resolve(dataclasses.replace(FINE_TUNE, licence="gemma")).identifier == "gemma"


ROOT = Ancestor(model="a/root", known=True, licence="mit", base_models=(), from_scratch=True)
MIDDLE = Ancestor(model="a/middle", known=True, licence="mit", base_models=("a/root",), from_scratch=False)


def test_a_chain_that_ends_in_a_model_trained_from_nothing_keeps_its_licence() -> None:
    claim = dataclasses.replace(OWN, base_models=("a/middle",), tags=(), lineage=(MIDDLE, ROOT))
    assert licence.resolve(claim).identifier == "cc0-1.0"


@pytest.mark.parametrize(
    "lineage",
    [
        (),
        (MIDDLE, dataclasses.replace(ROOT, from_scratch=False)),
        (MIDDLE, dataclasses.replace(ROOT, known=False, licence="")),
        (MIDDLE, dataclasses.replace(ROOT, licence="Gemma-Terms")),
    ],
    ids=["not followed", "of unknown origin", "not to be seen", "Gemma's"],
)
def test_a_chain_that_may_end_in_gemma_is_refused(lineage: tuple[Ancestor, ...]) -> None:
    with pytest.raises(PublishError, match="a/middle"):
        licence.resolve(dataclasses.replace(OWN, base_models=("a/middle",), lineage=lineage))


def test_a_circle_of_cards_ends() -> None:
    cards = {"a/b": {"base_model": "c/d"}, "c/d": {"base_model": ["a/b", "e/f"]}}
    assert [one.model for one in licence.trace(["a/b"], cards.get)] == ["a/b", "c/d", "e/f"]


def test_a_model_trained_from_nothing_is_its_makers_own() -> None:
    assert licence.resolve(OWN).identifier == "cc0-1.0"


def test_another_architecture_keeps_its_licence() -> None:
    claim = dataclasses.replace(FINE_TUNE, model_type="llama", terms="", base_models=("a/b",))
    assert licence.resolve(claim).name.startswith("Ap")


def test_gemma_4_is_what_its_card_says_whatever_its_name() -> None:
    claim = Claim(
        model="google/gemma-4-E2B-it", model_type="gemma4", terms="", licence="apache-2.0", base_models=(), tags=()
    )
    assert licence.resolve(claim).identifier == "apache-2.0"
    tuned = dataclasses.replace(claim, model="someone/poet", base_models=("google/gemma-4-E2B-it",))
    assert licence.resolve(tuned).identifier == "apache-2.0"


@pytest.mark.parametrize(
    ("claim", "what", "cause"),
    [
        (dataclasses.replace(GEMMA, licence=""), "names no licence", "no `license:`"),
        (dataclasses.replace(GEMMA, licence="  "), "names no licence", "no `license:`"),
        (dataclasses.replace(OWN, licence="my-own-rules"), "'my-own-rules', is not one of gemma", "derivatives"),
        (dataclasses.replace(OWN, licence="cc-by-nd-4.0"), "'cc-by-nd-4.0', is not one of", "derivatives"),
        (
            FINE_TUNE,
            "someone/gemma-3n-poet from someone/gemma-3n-base from google/gemma-3n-E2B-it: the card claims apache-2.0, "
            "but google/gemma-3n-E2B-it is under the Gemma Terms of Use",
            "base_model chain",
        ),
        (dataclasses.replace(GEMMA, licence="mit"), "but google/gemma-3n-E2B-it is under", "base_model chain"),
        (
            dataclasses.replace(FINE_TUNE, base_models=("someone/else",)),
            "claims apache-2.0 for a model of type gemma3n",
            "terms are not known here",
        ),
        (
            dataclasses.replace(FINE_TUNE, base_models=()),
            "does not say what it was made from",
            "usually come from Gemma",
        ),
        (
            dataclasses.replace(OWN, base_models=("google/gemma-3n-E4B",)),
            "but google/gemma-3n-E4B is under",
            "base_model chain",
        ),
        (dataclasses.replace(OWN, base_models=("someone/else",)), "claims cc0-1.0", "terms are not known here"),
        (dataclasses.replace(OWN, tags=("litert",)), "does not say what it was made from", "usually come from Gemma"),
    ],
)
def test_refusals_say_what_and_why_and_what_to_do(claim: Claim, what: str, cause: str) -> None:
    with pytest.raises(PublishError) as caught:
        licence.resolve(claim)
    assert what in caught.value.what
    assert cause in caught.value.cause
    assert caught.value.remedy
    assert caught.value.exit_code == 9


@given(
    st.builds(
        Claim,
        model=st.sampled_from(["google/gemma-3n-E2B", "someone/poet", "tiny"]),
        model_type=st.sampled_from(["gemma3n", "gemma3n_text"]),
        terms=st.just("gemma"),
        licence=st.sampled_from(["gemma", "apache-2.0", "mit", "cc0-1.0", "other", ""]),
        base_models=st.lists(st.sampled_from(["google/gemma-3n-E4B-it", "someone/else"]), max_size=2).map(tuple),
        tags=st.sampled_from([(), ("trained-from-scratch",)]),
    )
)
def test_no_gemma_model_leaves_under_other_terms_unless_it_is_nobodys_derivative(claim: Claim) -> None:
    try:
        found = licence.resolve(claim)
    except PublishError:
        return
    own = claim.tags and not claim.base_models and not claim.model.startswith("google/gemma")
    assert found.identifier == "gemma" or own


def test_the_gemma_notice_has_the_required_sentence_and_says_that_files_were_modified() -> None:
    text = licence.notice_text(licence.resolve(GEMMA), "google/gemma-3n-E2B-it", "weights were quantised.")
    sentence = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
    assert text.splitlines()[0] == sentence
    assert "are modified" in text
    assert "google/gemma-3n-E2B-it: weights were quantised." in text


def test_the_gemma_licence_points_to_terms_and_policy_and_names_what_is_carried_along() -> None:
    text = licence.licence_text(licence.resolve(GEMMA), ("checkpoint/LICENSE",))
    assert "https://ai.google.dev/gemma/terms" in text
    assert "https://ai.google.dev/gemma/prohibited_use_policy" in text
    assert "checkpoint/LICENSE" in text


def test_another_licence_names_itself_and_not_gemma() -> None:
    found = licence.resolve(OWN)
    text = licence.licence_text(found, ())
    assert found.name in text and found.link in text
    assert "passed on with it" not in text
    assert "Gemma" not in text + licence.notice_text(found, "tiny", "converted.")


def test_every_licence_in_the_table_can_be_resolved_and_written() -> None:
    for identifier in ("gemma", "apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0"):
        found = licence.resolve(dataclasses.replace(OWN, licence=identifier))
        assert isinstance(found, Licence)
        assert found.link.startswith("https://") and found.link in licence.licence_text(found, ())


@pytest.mark.parametrize("claim", [FINE_TUNE, dataclasses.replace(FINE_TUNE, licence=""), OWN])
@pytest.mark.parametrize("name", ["gemma", "apache-2.0"])
def test_an_override_goes_on_and_is_said(claim: Claim, name: str) -> None:
    found = licence.resolve(claim, f" {name.upper()} :  the owner said so:\n by mail ")
    assert (found.identifier, found.overrides, found.reason) == (name, claim.licence, "the owner said so: by mail")
    said = licence.licence_text(found, ())
    assert f"says {claim.licence or 'nothing'}; whoever published" in said
    assert f"says {name}: the owner said so: by mail" in said


@pytest.mark.parametrize("override", ["apache-2.0", "apache-2.0:", " : because", "apache-2.0:  "])
def test_an_override_without_licence_or_reason_is_none(override: str) -> None:
    with pytest.raises(UsageError, match="no licence with a reason"):
        licence.resolve(FINE_TUNE, override)


def test_an_override_to_an_unread_licence_is_refused_and_without_one_nothing_is_said() -> None:
    with pytest.raises(PublishError, match="is not one of gemma"):
        licence.resolve(FINE_TUNE, "home-made: I like it")
    assert "whoever published" not in licence.licence_text(licence.resolve(GEMMA), ())


def test_a_refusal_names_the_override() -> None:
    for claim in (FINE_TUNE, dataclasses.replace(GEMMA, licence="")):
        with pytest.raises(PublishError) as caught:
            licence.resolve(claim)
        assert 'LICENCE_OVERRIDE="identifier: reason"' in caught.value.remedy
