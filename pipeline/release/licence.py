"""Under which licence a converted model may be passed on, and the LICENSE and NOTICE that go with it.

A conversion is a derivative of its checkpoint, and a checkpoint of its base models. The licence that a checkpoint's
card claims is believed only where it does not contradict that chain, which is followed on the Hub from card to card:
weights that come from Gemma 1 to 3n stay under the Gemma Terms of Use whatever a fine-tune's card says. A model of
Gemma's architecture that was trained from nothing is its makers' own; its card says so with the tag
`trained-from-scratch`. Whoever knows better can override this, with a reason that is published.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import Template

import yaml
from huggingface_hub import ModelCard

from pipeline.core import log
from pipeline.core.errors import PublishError, UsageError
from pipeline.core.facts import Ancestor, Card

GEMMA = "gemma"
FROM_SCRATCH = "trained-from-scratch"
# Sentence that section 3.1 of the Gemma Terms of Use asks for in a NOTICE file.
GEMMA_NOTICE = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
_GEMMA_ALIASES = ("gemma-terms-of-use", "gemma-terms", "gemma terms of use")
_OVERRIDE = 'if you know better, say so with LICENCE_OVERRIDE="identifier: reason": both are published'
_HERE = Path(__file__).parent
# A chain is a few models long; a card could name more than anybody wants to ask for.
_MOST_ANCESTORS = 32


@dataclass(frozen=True, kw_only=True)
class Said:
    """What the front matter of a card says, empty where it says nothing."""

    licence: str = ""
    base_models: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a checkpoint says of itself: Hub id or folder name, `model_type`, and its card's licence, bases and tags.

    `terms` is the licence that all weights of its family carry on, empty where the card alone says. `lineage` are its
    bases and theirs, as far as the Hub knows them; empty for one that came from a folder.
    """

    model: str
    model_type: str
    terms: str
    licence: str
    base_models: tuple[str, ...]
    tags: tuple[str, ...]
    lineage: tuple[Ancestor, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Licence:
    """A licence by the Hub's identifier, with its name and the address of its text.

    If it was overridden, `overrides` is what the checkpoint's card claims, and `reason` why that does not count.
    """

    identifier: str
    name: str
    link: str
    overrides: str = ""
    reason: str = ""

    @property
    def remark(self) -> str:
        """The sentence about an override, or nothing."""
        if not self.reason:
            return ""
        claimed = f"The checkpoint's card says {self.overrides or 'nothing'}"
        return f"{claimed}; whoever published these files says {self.identifier}: {self.reason}"


def claimed(card: str) -> Said:
    """What `card`, the text of a README.md, says in its front matter."""
    if not card.startswith("---"):
        return Said()
    try:
        data: dict[str, object] = ModelCard(card, ignore_metadata_errors=True).data.to_dict()  # type: ignore[no-untyped-call]
    except (ValueError, yaml.YAMLError):
        log.warn("the front matter of README.md can't be read: licence and base model are unknown")
        return Said()
    return _said(data)


def trace(bases: Sequence[str], read: Callable[[str], Mapping[str, object] | None]) -> tuple[Ancestor, ...]:
    """The models that `bases` and their cards name as their base, nearest first, each once.

    `read` gives the front matter of a model's card, or None where there is no such model or nobody may look.
    """
    ancestors: dict[str, Ancestor] = {}
    # Nearest first: the bases of a merge before the bases of those.
    waiting = list(bases)
    while waiting and len(ancestors) < _MOST_ANCESTORS:
        model = waiting.pop(0)
        # Cards may name each other in a circle.
        if model in ancestors:
            continue
        card = read(model)
        claims = _said(card or {})
        ancestors[model] = Ancestor(
            model=model,
            known=card is not None,
            licence=claims.licence,
            base_models=claims.base_models,
            from_scratch=FROM_SCRATCH in claims.tags,
        )
        waiting += claims.base_models
    return tuple(ancestors.values())


def read_card(
    folder: Path, read: Callable[[str], Mapping[str, object] | None] | None = None, base: tuple[str, str] | None = None
) -> Card:
    """What the checkpoint's own card says of its licence and base models, and what theirs say, which `read` gets.

    `base` is what an adapter calls its base, and what was taken: that is a base, whatever the card says.
    """
    file = folder / "README.md"
    said = claimed(file.read_text(encoding="utf-8", errors="replace") if file.is_file() else "")
    named = said.base_models
    if base:
        named = tuple(dict.fromkeys((base[1], *(one for one in named if one != base[0]))))
    lineage = trace(named, read) if read else ()
    if strangers := [one.model for one in lineage if not one.known]:
        log.warn(f"not to be seen on the Hub, so that nobody knows their terms: {', '.join(strangers)}")
    return Card(licence=said.licence, base_models=named, lineage=lineage)


def _said(data: Mapping[str, object]) -> Said:
    """What front matter says."""
    licence, name = (str(data.get(key) or "") for key in ("license", "license_name"))
    return Said(
        # The Hub's word for a licence outside its list, whose name stands beside it.
        licence=name if name and licence == "other" else licence,
        base_models=texts(data.get("base_model")),
        tags=texts(data.get("tags")),
    )


def texts(value: object) -> tuple[str, ...]:
    """A list of texts, where one alone may stand without its list."""
    return tuple(map(str, value)) if isinstance(value, list) else (str(value),) if value else ()


def resolve(claim: Claim, override: str = "") -> Licence:
    """The licence under which the converted files may be passed on.

    Args:
        claim: what the checkpoint says.
        override: `identifier: reason`, from someone who knows better than the checkpoint's card.

    Raises:
        PublishError: none is named, it is not a known one, or it contradicts what the model was made from.
        UsageError: the override names no licence, or no reason.
    """
    if override:
        return _overridden(claim, override)
    name = claim.licence.strip().lower()
    if not name:
        raise PublishError(
            f"the card of {claim.model} names no licence",
            cause="its README.md is missing or has no `license:` in its front matter",
            remedy="find out the licence, write it into the checkpoint's README.md, and start again from `make fetch`; "
            + _OVERRIDE,
        )
    licence = _known(name, claim.model)
    # One chain of comparisons: the family carries Gemma's terms, and the card says another licence.
    if claim.terms == GEMMA != licence.identifier:
        _refuse_unless_own(claim, licence)
    return licence


def _overridden(claim: Claim, override: str) -> Licence:
    name, _, reason = (part.strip() for part in override.partition(":"))
    if not name or not reason:
        raise UsageError(
            f"LICENCE_OVERRIDE={override!r} is no licence with a reason",
            remedy='write LICENCE_OVERRIDE="identifier: reason", e.g. "gemma: the fine-tune keeps its base\'s terms"',
        )
    log.warn(f"the licence of {claim.model} is overridden: {name}, because {reason}")
    return replace(_known(name.lower(), claim.model), overrides=claim.licence, reason=" ".join(reason.split()))


def licence_text(licence: Licence, carried: tuple[str, ...]) -> str:
    """The LICENSE file; `carried` are the paths of the checkpoint's own licence files in the same folder."""
    kind = GEMMA if licence.identifier == GEMMA else "other"
    text = Template((_HERE / "notices" / f"LICENSE.{kind}").read_text(encoding="utf-8")).substitute(vars(licence))
    if licence.remark:
        text += f"\n{licence.remark}\n"
    if carried:
        text += f"\nThe checkpoint's own files on the matter are passed on with it: {', '.join(carried)}.\n"
    return text


def notice_text(licence: Licence, origin: str, changes: str) -> str:
    """The NOTICE file: the files' `origin`, that they were modified, and the Gemma sentence where it applies."""
    sentence = f"{GEMMA_NOTICE}\n\n" if licence.identifier == GEMMA else ""
    return f"{sentence}The files in this folder are modified. They were made from {origin}: {changes}\n"


def _identifier(name: str) -> str:
    """The Hub's identifier of a licence that a card calls `name`."""
    name = name.strip().lower()
    return GEMMA if name in _GEMMA_ALIASES else name


def _known(name: str, model: str) -> Licence:
    identifier = _identifier(name)
    with (_HERE / "licences.toml").open("rb") as stream:
        table = tomllib.load(stream)
    if identifier not in table:
        raise PublishError(
            f"the licence of {model}, {name!r}, is not one of {', '.join(table)}",
            cause="it forbids derivatives, or nobody has read yet whether it allows them",
            remedy="read it; if it allows passing on a converted model, add it to pipeline/release/licences.toml",
        )
    return Licence(identifier=identifier, **table[identifier])


def _refuse_unless_own(claim: Claim, licence: Licence) -> None:
    """A model of Gemma's architecture under another licence: fine if trained from nothing, else a contradiction."""
    chain = " from ".join(dict.fromkeys((claim.model, *claim.base_models, *(one.model for one in claim.lineage))))
    remedy = (
        f"if its weights come from Gemma, correct its card to `license: {GEMMA}` and start again from `make fetch`; "
    )
    remedy += _OVERRIDE
    if gemma := _gemma_bases(claim):
        raise PublishError(
            f"{chain}: the card claims {licence.identifier}, but {gemma[-1]} is under the Gemma Terms of Use",
            cause="a licence further down the base_model chain can't set aside the terms of the base",
            remedy=remedy,
        )
    if claim.base_models and not _own_roots(claim):
        raise PublishError(
            f"{chain}: the card claims {licence.identifier} for a model of type {claim.model_type}",
            cause=f"it is made from {', '.join(claim.base_models)}, whose terms are not known here and may be Gemma's",
            remedy=remedy,
        )
    if not claim.base_models and FROM_SCRATCH not in claim.tags:
        raise PublishError(
            f"the card of {claim.model} claims {licence.identifier} for a model of type {claim.model_type} "
            "and does not say what it was made from",
            cause="weights of this architecture usually come from Gemma, whose terms they keep",
            remedy=f"if they were trained from nothing, add the tag `{FROM_SCRATCH}`; {remedy}",
        )


def _gemma_bases(claim: Claim) -> list[str]:
    """The models of the chain that are Google's Gemma, or say that they are under its terms."""
    named = [one for one in (claim.model, *claim.base_models) if one.lower().startswith("google/gemma")]
    return named + [
        one.model
        for one in claim.lineage
        if _identifier(one.licence) == GEMMA or one.model.lower().startswith("google/gemma")
    ]


def _own_roots(claim: Claim) -> bool:
    """Whether the whole chain is known, and each of its ends was trained from nothing."""
    ends = [one for one in claim.lineage if not one.base_models]
    return bool(ends) and all(one.known for one in claim.lineage) and all(one.from_scratch for one in ends)
