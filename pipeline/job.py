"""job: all of it on a machine of the Hub: plan, build, verify and publish in the project's image, by Hugging Face Jobs.

    make job MODEL_ID=owner/name HF_REPO=owner/other [IMAGE=ghcr.io/…@sha256:…] [CONFIRM=yes]

It prints the `hf jobs run …` line, and confirmed it submits that job by the Hub's client. The machine is the cheapest
that the Hub offers with the memory and the disk that the plan asks for, the source a commit, the time twice the plan's.
The job gets HF_TOKEN as a secret: by its name, its value stands in no command line. With WATCH=yes it builds what the
branch has when it runs, and a webhook of the Hub runs it again whenever the model's repository changes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from math import ceil
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi

from pipeline.core import log, options
from pipeline.core.errors import PublishError, UsageError
from pipeline.core.graph import model_name, towers_in
from pipeline.core.recipe import PROJECT, load
from pipeline.core.stage import Common, guard
from pipeline.planning import machine
from pipeline.planning.model import look
from pipeline.release import images, jobs
from pipeline.release.hub import Hub


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Which checkpoint, exactly, where it goes, and in which image."""

    repository: str = field(metadata={"help": "owner/name that the job publishes to"})
    image: str = field(
        metadata={"help": "the project's image in a registry, by its digest; empty: the one that is published"}
    )
    revision: str = field(default="", metadata={"help": "branch, tag or commit on the Hub (default: the main branch)"})
    tag: str = field(default="", metadata={"help": "tag of the upload"})
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata={"help": "cuda: a machine with a GPU"})
    watch: Literal["", "yes"] = field(default="", metadata={"help": "yes: and again whenever the model changes"})
    confirm: Literal["", "yes"] = field(default="", metadata={"help": "yes: submit it; HF_TOKEN in the environment"})


def work(given: Options) -> None:
    """Print the job, and submit it if that is confirmed.

    Raises:
        UsageError: a folder, a recipe of one's own, an image without a digest: a machine of the Hub has none of them.
        ResourceError: no machine is large enough.
        PublishError: there is no token for it, or the Hub refuses it.
    """
    _check(given)
    image = images.pulled(given.image, "cuda" if given.device == "cuda" else "cpu")
    token = os.environ.get("HF_TOKEN", "")
    if given.confirm and not token:
        raise PublishError("a job needs a token that may write", remedy="set HF_TOKEN, which it gets as a secret")
    recipe, hub = load(given.recipe_file), Hub(waits=())  # asked again after a cut, a job might run twice
    model = look(given.model_id, given.revision, "", recipe, given.graphs or recipe.graphs, given.towers)
    commit = Hub().resolve(given.model_id, given.revision).revision
    revision = given.revision or "main" if given.watch else commit
    want, api = machine.asked(model), HfApi(endpoint=hub.endpoint)

    refused = partial(jobs.refused, hub, given.repository)
    chosen = machine.cheapest(hub.patiently(api.list_jobs_hardware, refused), want, gpu=given.device == "cuda")
    log.line(f"job · {given.model_id} · {machine.said(chosen)}; {log.human_seconds(want.seconds)} on two cores")
    job = jobs.Job(
        image=image,
        command=_command(given, revision, left_out=bool(model.facts.left_out)),
        flavor=chosen.name,
        timeout=f"{ceil(2 * want.seconds / 3600 + 0.5)}h",
        name=model_name(given.model_id),
        owner=given.repository.split("/")[0],
        watched=given.model_id if given.watch else "",
    )
    sys.stdout.write("".join(f"{line}\n" for line in job.lines()))
    if given.confirm:
        for said in job.submit(hub, api, refused, token):
            log.line(said)


def _check(given: Options) -> None:
    """Refuse what a machine of the Hub could not get."""
    if Path(given.model_id).is_dir():
        raise UsageError(f"MODEL_ID={given.model_id} is a folder, which a machine of the Hub does not have")
    if not given.recipe_file.resolve().is_relative_to(PROJECT / "pipeline"):
        raise UsageError(f"RECIPE={given.recipe_file} is not in the image", remedy="name one of pipeline/recipes/")
    if not given.repository:
        raise UsageError("a job publishes, and HF_REPO does not say where to", remedy="HF_REPO=owner/name")


def _command(given: Options, revision: str, *, left_out: bool) -> list[str]:
    """The words of the container; settings without a value are left out."""
    words = {"MODEL_ID": given.model_id, "REVISION": revision, "GRAPHS": given.graphs, "DEVICE": given.device}
    words["TOWERS"] = ",".join(towers_in(given.towers)) or ("none" if left_out else "")
    words["RECIPE"] = str(given.recipe_file.resolve().relative_to(PROJECT))
    # Nothing is mounted under /tmp.
    words |= {"HF_REPO": given.repository, "TAG": given.tag, "CONFIRM": "yes", "ARTIFACTS": "/tmp"}
    return ["/app/tools/entry.sh", "publish", *(f"{name}={value}" for name, value in words.items() if value)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line and return the exit code."""
    summary = "Print, or submit, the job that builds and publishes on a machine of the Hub."
    given = options.read("job", summary, Options, argv)
    return guard(lambda: work(given))


if __name__ == "__main__":
    sys.exit(main())
