"""A job of the Hub, and the webhook that runs it again: the lines that a person would type, the same by the client."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from huggingface_hub import HfApi

from pipeline.core.errors import PublishError
from pipeline.release.hub import Hub


@dataclass(frozen=True, kw_only=True)
class Job:
    """A container of `image` that runs `command` on a machine `flavor`, by its name among the jobs of `owner`.

    Whenever the repository of the model `watched` changes, if one is, it runs again.
    """

    image: str
    command: Sequence[str]
    flavor: str
    timeout: str
    name: str
    owner: str
    watched: str

    @property
    def digest(self) -> dict[str, str]:
        """What its papers say of the image: one can't know its own digest."""
        return {"IMAGE_DIGEST": self.image.split("@")[1]}

    def lines(self) -> list[str]:
        """The commands of `hf`; the second takes the id that the first prints."""
        flags = ["--name", self.name, "--namespace", self.owner, "--flavor", self.flavor, "--timeout", self.timeout]
        flags += [word for name, value in self.digest.items() for word in ("--env", f"{name}={value}")]
        run = shlex.join(["hf", "jobs", "run", *flags, "--secrets", "HF_TOKEN", "--detach", self.image, *self.command])
        hook = ["hf", "webhooks", "create", "--watch", f"model:{self.watched}", "--domain", "repo"]
        return [run, *([f"{shlex.join(hook)} --secrets HF_TOKEN --job-id JOB"] if self.watched else [])]

    def submit(self, hub: Hub, api: HfApi, refused: Callable[[Exception], PublishError], token: str) -> Iterator[str]:
        """Submit it, and then the webhook; what there is of each in words.

        Raises:
            PublishError: the Hub refuses one of them.
        """
        run = partial(
            api.run_job, image=self.image, command=list(self.command), secrets={"HF_TOKEN": token}, token=token
        )
        run = partial(run, env=self.digest, flavor=self.flavor, timeout=self.timeout)
        submitted = hub.patiently(partial(run, name=self.name, namespace=self.owner), refused)
        yield f"submitted: {submitted.url}"
        if self.watched:
            watch = partial(api.create_webhook, job_id=submitted.id, watched=[{"type": "model", "name": self.watched}])
            # The job's own secrets are not the webhook's.
            hook = hub.patiently(partial(watch, domains=["repo"], secrets={"HF_TOKEN": token}, token=token), refused)
            yield f"webhook {hook.id}: the job runs again when {self.watched} changes"


def refused(hub: Hub, repository: str, error: Exception) -> PublishError:
    """What the Hub says of a job that can't be had."""
    said = hub.explain(error, repository, "")
    return PublishError(f"the Hub's jobs can't be had: {said}", cause=said.cause, remedy=said.remedy)
