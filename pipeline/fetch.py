"""Stage fetch: the pinned checkpoint, refused before the download if it is not one that can be converted.

The configuration and the safetensors headers are read first (by range from a server), and whatever is wrong with the
model is said before anything large moves. Downloads wait in `artifacts/<model>/.download/<commit>/`, so that a killed
run goes on where it stopped, and become hard links in `fetch/checkpoint/`. A local folder becomes links to its files.
A LoRA adapter is merged into its base on the way: what comes out is a checkpoint like any other.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path

from pipeline.checkpoint.headers import listed
from pipeline.checkpoint.preflight import Plan, plan
from pipeline.checkpoint.reader import CONFIG
from pipeline.checkpoint.source import Source
from pipeline.core import facts, log, options
from pipeline.core.errors import FetchError
from pipeline.core.graph import towers_in
from pipeline.core.stage import Context, Outcome, Stage, main
from pipeline.models import architecture_for, expected
from pipeline.release import licence, origin
from pipeline.release.joining import join
from pipeline.release.origin import Asked, OnHub


@dataclass(frozen=True, kw_only=True)
class Options(options.Options):
    """Which state of a repository on the Hub, and of an adapter which base."""

    revision: str = field(default="", metadata={"help": "branch, tag or commit on the Hub (default: the main branch)"})
    base: str = field(default="", metadata={"help": "of an adapter: owner/name, owner/name@revision or a folder"})
    template: Path | None = field(
        default=None, metadata={"metavar": "FILE", "help": "a chat template in place of the checkpoint's own"}
    )


def work(context: Context) -> Outcome:
    """Fetch what `--model-id`, `--revision`, `--base` and `--template` name into `fetch/checkpoint/`."""
    target = context.folder / "checkpoint"
    target.mkdir()
    said = context.chosen(Options)
    asked = origin.ask(context.model_id, said.revision, said.base)
    chosen = plan(asked.source, partial(expected, context.recipe, context.towers))
    origin.drop_downloads(context.root, asked.origins)
    made = _merge(context, asked, chosen, target) if asked.adapter else _take(context, asked, chosen, target)
    if not said.template:
        return made
    text, place = said.template.read_bytes(), target / "chat_template.jinja"  # it counts before any other
    place.unlink(missing_ok=True)
    place.write_bytes(text)
    assert isinstance(made.facts, facts.Fetch)
    return dataclasses.replace(made, facts=dataclasses.replace(made.facts, template=sha256(text).hexdigest()))


def _take(context: Context, asked: Asked, chosen: Plan, target: Path) -> Outcome:
    """Put the needed files in place."""
    found = asked.origin
    there = found.obtain(chosen.names, context.root)
    for name in chosen.names:
        found.put(there / name, target / name)
    if isinstance(found, OnHub):  # what was read by ranges is looked at again, whole
        chosen = _plan_again(context, target, asked)
    card = licence.read_card(target, asked.card if isinstance(found, OnHub) else None)
    told = facts.Fetch(**vars(chosen.facts), **vars(card))
    return Outcome(model=found.model, revision=found.revision(chosen.names, context.known), facts=told)


def _merge(context: Context, asked: Asked, chosen: Plan, target: Path) -> Outcome:
    """Merge the adapter into its base. Both are pinned, and the terms of both come along."""
    own, base = asked.origin, asked.base
    assert asked.adapter and base
    canonical = architecture_for(asked.source.json(CONFIG)).canonical
    made = join(asked, chosen.names, canonical, context.root, target, context.known)
    if towers_in(context.towers) and made.changes.left_out:
        raise FetchError(
            f"the adapter changes {listed(made.changes.left_out, 3)}, outside the text model",
            cause="adapters are merged into the text model alone, so its towers would be the base's",
            remedy="merge it with peft: `model.merge_and_unload().save_pretrained(FOLDER)`, then MODEL_ID=FOLDER; or "
            "say TOWERS=none",
        )
    judged = _plan_again(context, target, asked).facts
    log.step(made.changes.text(own.model, base.model))
    card = licence.read_card(target, asked.card, (asked.adapter.base, base.model))
    merged = facts.Merged(base=base.model, base_revision=made.base_revision, changed=len(made.changes.changed))
    told = facts.Fetch(**vars(judged), **vars(card), adapter=merged)
    return Outcome(model=own.model, revision=made.revision, facts=told)


def _plan_again(context: Context, target: Path, asked: Asked) -> Plan:
    source = dataclasses.replace(Source.of_folder(target), where=asked.source.where)
    return plan(source, partial(expected, context.recipe, context.towers))


def _tidy(context: Context) -> None:
    origin.drop_downloads(context.root)


STAGE = Stage(
    name="fetch",
    summary="Fetch a checkpoint from the Hugging Face Hub or a folder, checked before and after.",
    work=work,
    options=Options,
    after=_tidy,
)

if __name__ == "__main__":
    sys.exit(main(STAGE))
