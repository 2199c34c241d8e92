"""Putting a folder into a repository of the Hub: in one commit on a known parent, read back, tagged.

Every step can be taken again: what storage holds already is not sent again, a commit that came through although its
answer was lost is found, and a tag that is right stays. So a cut, a kill or a refusal costs nothing but time.

Files go by the Git LFS protocol, not by Xet, although the client would prefer that: storage then checks each file's
sha256 by itself, and the same requests can be tried here against a small server. The token is the client's affair
(HF_TOKEN, its own store, or HF_OIDC_RESOURCE in CI); nothing here touches it, and no error quotes it.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import httpx2
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    set_client_factory,
)
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]  # public, not in its __all__
from huggingface_hub.utils._http import default_client_factory

from pipeline.core import log
from pipeline.core.errors import FetchError, IntegrityError, PublishError, UsageError
from pipeline.core.manifest import FileRecord
from pipeline.release import hub
from pipeline.release.hub import Hub, Kind, RemoteFile, Repository

TIMEOUT = httpx2.Timeout(30.0, read=300.0, write=120.0, pool=None)
"""Seconds; the client itself would wait for ever. Storage takes its time to put the parts of a large file together."""
BRANCH = "main"
KEPT = frozenset({".gitattributes"})
"""The Hub's own file, which says what is stored how."""
_MOVED_ON = (409, 412)
_AGAIN = "run the same command again: files that have arrived are not sent again"
_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_ID_TOKEN", "ACTIONS_ID_TOKEN_REQUEST_TOKEN")
_STOPPED = threading.Event()
_T = TypeVar("_T")
_REPO = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_TAG = re.compile(r"\w[\w.-]*", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Diff:
    """What a commit of the folder does to a repository, by path."""

    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    unchanged: tuple[str, ...]

    @property
    def empty(self) -> bool:
        """Whether there is nothing to commit."""
        return not (self.added or self.changed or self.removed)

    @property
    def counts(self) -> str:
        """How many files of each kind, in words."""
        return ", ".join(f"{len(names)} {kind}" for kind, names in vars(self).items())


@dataclass(frozen=True, kw_only=True)
class Target:
    """A folder's way into a repository: `files` are the folder's by path, `tag` names them in the repository.

    It is a repository of a `kind` of the Hub's.
    """

    hub: Hub
    repo: str
    folder: Path
    files: Mapping[str, FileRecord]
    tag: str
    kind: Kind = "model"

    @property
    def setting(self) -> str:
        """The setting of Make that names it."""
        return {"model": "HF_REPO", "space": "SPACE"}[self.kind]

    @property
    def page(self) -> str:
        """The repository's address."""
        return self.hub.page(self.repo, self.kind)

    def head(self) -> Repository:
        """The repository as it is now.

        Raises:
            PublishError: there is no such repository, no access or no connection.
        """
        return self._resolve("")

    def tagged(self) -> Repository | None:
        """The repository at the tag, if there is one.

        Raises:
            PublishError: as `head`; the tag is there and holds other files.
        """
        refs = self._patiently(lambda: self._api().list_repo_refs(self.repo, repo_type=self.kind))
        # Of the list and not by asking for the tag: a branch of that name would answer too.
        commits = [ref.target_commit for ref in refs.tags if ref.name == self.tag]
        if not commits:
            return None
        found = self._resolve(commits[0])
        if not self.diff(found).empty:
            raise PublishError(
                f"{self.repo} has a tag {self.tag} already, at commit {found.revision} with other files",
                cause="the same checkpoint and recipe were published before, and no two reports have the same timings",
                remedy="choose another name with TAG=, or publish the folder that was published then",
            )
        return found

    def diff(self, repository: Repository) -> Diff:
        """The folder against `repository`."""
        there = {name: file for name, file in repository.files.items() if name not in KEPT}
        both = sorted(self.files.keys() & there.keys())
        unchanged = [name for name in both if self._same(self.files[name], there[name])]
        return Diff(
            added=tuple(sorted(self.files.keys() - there.keys())),
            changed=tuple(name for name in both if name not in unchanged),
            removed=tuple(sorted(there.keys() - self.files.keys())),
            unchanged=tuple(unchanged),
        )

    def commit(self, parent: str) -> Repository:
        """Bring the main branch, which must be at commit `parent`, to the folder's files; return it as it is then.

        Raises:
            PublishError: the branch has moved on, or the Hub refuses.
            IntegrityError: the Hub lists other files than were sent, or a file changed while it was sent.
        """
        with log.progress("upload", 0) as bar:
            return self._patiently(lambda: self._commit(parent, bar))

    def check(self, repository: Repository) -> None:
        """Read every file back and compare its sha256; a file that differs is read a second time.

        Raises:
            IntegrityError: names the file that differs.
            PublishError: as `head`.
        """
        with log.progress("reading back", sum(record.size for record in self.files.values())) as bar:
            for name, record in self.files.items():
                if self._sha256(repository, name, bar) != record.sha256:
                    log.warn(f"{name} came back with other bytes: reading it again")
                    bar.advance(-record.size)
                    if self._sha256(repository, name, bar) != record.sha256:
                        raise _damaged(self.repo, name, repository.revision)

    def mark(self, commit: str) -> None:
        """Tag `commit`, unless it has that tag.

        Raises:
            PublishError: as `tagged`, or the Hub refuses.
        """

        def create() -> None:
            try:
                if self.tagged() is None:
                    self._api().create_tag(self.repo, tag=self.tag, revision=commit, repo_type=self.kind)
            except HfHubHTTPError as error:  # 409: it was made in between
                if error.response.status_code != 409 or self.tagged() is None:
                    raise

        self._patiently(create)

    def _commit(self, parent: str, bar: log.Progress) -> Repository:
        """One try: looks first whether an earlier one came through."""
        head = self.head()
        diff = self.diff(head)
        if diff.empty:
            return head
        if head.revision != parent:
            raise self._moved_on(parent, head.revision)
        # What an earlier version had and this one has not would otherwise stay, unlisted in SHA256SUMS.
        operations = [CommitOperationDelete(path_in_repo=name, is_folder=False) for name in diff.removed]
        sent = [*diff.changed, *diff.added]
        bar.total, bar.done = sum(self.files[name].size for name in sent), 0
        additions = [self._addition(name, bar) for name in sent]
        commit = self._api().create_commit(
            self.repo,
            [*operations, *additions],
            commit_message=f"Publish {self.tag}",
            revision=BRANCH,
            repo_type=self.kind,
            # The Hub refuses if the branch has moved: the one check that nobody can slip in behind.
            parent_commit=parent,
        )
        found = self._resolve(commit.oid)
        left = self.diff(found)
        if not left.empty:
            raise _damaged(self.repo, [*left.added, *left.changed, *left.removed][0], found.revision)
        return found

    def _addition(self, name: str, bar: log.Progress) -> CommitOperationAdd:
        """What adds a file to a commit.

        Raises:
            IntegrityError: it is not the one that was cleared.
        """
        addition = _Addition(path_in_repo=name, path_or_fileobj=self.folder / name)
        # The client hashes the file as it is now; what was cleared is what the sums say.
        if addition.upload_info.sha256.hex() != self.files[name].sha256:
            raise IntegrityError(
                f"{self.folder / name} was changed while it was published",
                cause="something else writes to the folder",
                remedy="run the same command again; nothing was committed",
            )
        addition.bar = bar
        return addition

    def _same(self, record: FileRecord, there: RemoteFile) -> bool:
        if record.size != there.size:
            return False
        if there.sha256:
            return record.sha256 == there.sha256
        data = (self.folder / record.path).read_bytes()
        # A blob's name in git; small files have no other hash on the Hub.
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == there.git_sha1

    def _sha256(self, repository: Repository, name: str, bar: log.Progress) -> str:
        return self._reading(lambda: self.hub.sha256(repository, name, bar))

    def _resolve(self, revision: str) -> Repository:
        return self._reading(lambda: self.hub.resolve(self.repo, revision, self.kind))

    def _reading(self, work: Callable[[], _T]) -> _T:
        """The result of `work`, which only reads; what it can't have is why nothing is published."""
        try:
            return work()
        except FetchError as error:
            raise self._as_refusal(error, error.__cause__) from error

    def _as_refusal(self, found: FetchError, error: BaseException | None) -> PublishError:
        """What can't be read is why nothing is published; a repository is made by people, not by a misspelt name."""
        options, place = {"model": ("", "new"), "space": (" --type space --sdk static", "new-space")}[self.kind]
        made = f"`hf repos create {self.repo}{options}`, or {self.hub.endpoint}/{place}"
        create = f"check {self.setting}=; to make it: {made}"
        remedy = create if isinstance(error, RepositoryNotFoundError) else found.remedy
        return PublishError(found.what, cause=found.cause, remedy=remedy)

    def _patiently(self, work: Callable[[], _T]) -> _T:
        """The result of `work`, which calls the client, with new tries and refusals as for the rest of the Hub."""
        return self.hub.patiently(lambda: _unwrapped(work), self._refusal)

    def _refusal(self, error: Exception) -> PublishError:
        """What `error` means for the person who publishes."""
        refusal = self._as_refusal(self.hub.explain(error, self.repo, BRANCH), error)
        if (
            not isinstance(error, HfHubHTTPError)
            or isinstance(error, RepositoryNotFoundError)
            or hub.is_identity(error)
        ):
            return refusal
        status, url = error.response.status_code, error.response.request.url
        if status in _MOVED_ON and "/commit/" in url.path:
            return self._moved_on("the commit that was looked at", "another")
        if status in (401, 403) and str(url).startswith(self.hub.endpoint):
            return self._no_access(status)
        again = _AGAIN if hub.is_passing(error) else refusal.remedy
        return PublishError(f"{refusal.what}{_words(error)}", cause=refusal.cause, remedy=again)

    def _no_access(self, status: int) -> PublishError:
        tokens = f"{self.hub.endpoint}/settings/tokens"
        if status == 401:
            return PublishError(
                "the Hub refuses the token" if hub.has_token() else "there is no token to publish with",
                cause="it is mistyped, expired or revoked" if hub.has_token() else "HF_TOKEN is not set",
                remedy=f"make one at {tokens} that may write to {self.repo}, and set HF_TOKEN",
            )
        return PublishError(
            f"the token may not write to {self.repo}",
            cause="it only reads, or lists other repositories",
            remedy=f"allow it at {tokens}, or as a trusted publisher in the settings of the repository",
        )

    def _moved_on(self, parent: str, head: str) -> PublishError:
        return PublishError(
            f"{self.repo} has moved on: its main branch is not at {parent} but at {head}",
            cause="somebody else committed to it meanwhile",
            remedy=f"look at what that changes (`make publish {self.setting}={self.repo}`), then upload again",
        )

    def _api(self) -> HfApi:
        return HfApi(endpoint=self.hub.endpoint)


class _Addition(CommitOperationAdd):
    """A file that is added, whose way to storage advances `bar` instead of a bar of the client's own.

    It is opened for each sending: of two files with the same content the client sends one twice, at the same time.
    """

    bar: log.Progress | None = None

    @contextmanager
    def as_file(self, with_tqdm: bool = False) -> Iterator[BinaryIO]:
        with _Counted(Path(str(self.path_or_fileobj)), self.bar if with_tqdm else None) as stream:
            yield stream


class _Counted(io.BufferedReader):
    """A file that is sent: `bar` is advanced by what is read for the first time."""

    def __init__(self, file: Path, bar: log.Progress | None) -> None:
        super().__init__(io.FileIO(file))
        self._bar, self._furthest = bar, 0

    def read(self, size: int | None = -1, /) -> bytes:
        if _STOPPED.is_set():
            raise InterruptedError("stopped")
        data = super().read(size)
        if self._bar and (new := self.tell() - self._furthest) > 0:
            self._bar.advance(new)
            self._furthest += new
        return data


class _Relay(logging.Handler):
    """What the client has to say, through the log; without the signatures in storage addresses."""

    def emit(self, record: logging.LogRecord) -> None:
        log.warn(_clean(record.getMessage()))


@contextmanager
def client() -> Iterator[None]:
    """Let the client give up on a silent server, stop when it is told to, and print through the log alone."""

    def session() -> httpx2.Client:
        made = default_client_factory()
        made.timeout = TIMEOUT
        return made

    def show(message: Warning | str, *_: object, **__: object) -> None:
        log.warn(_clean(str(message)))

    set_client_factory(session)
    disable_progress_bars()
    constants.HF_HUB_DISABLE_XET = True
    logger = logging.getLogger("huggingface_hub")
    handlers, logger.handlers = logger.handlers, [_Relay()]
    try:
        with warnings.catch_warnings(), _stopping():
            warnings.showwarning = show
            yield
    finally:
        logger.handlers = handlers
        set_client_factory(default_client_factory)


@contextmanager
def _stopping() -> Iterator[None]:
    """An interrupt ends files that are under way; the client would first send them to their end."""

    def stop(_signal: int, _frame: object) -> None:
        _STOPPED.set()
        raise KeyboardInterrupt

    before = {sent: signal.signal(sent, stop) for sent in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        _STOPPED.clear()
        for sent, handler in before.items():
            signal.signal(sent, handler)


def _unwrapped(work: Callable[[], _T]) -> _T:
    """The result of `work`, with the client's failures as what they are.

    It wraps what happens in its threads, fails to read a proxy's page as JSON, and has plain words for what it refuses.
    """
    try:
        return work()
    except json.JSONDecodeError as error:
        raise httpx2.RemoteProtocolError("the answer is not one of a Hub") from error
    except RuntimeError as error:
        if isinstance(error.__cause__, hub.FAILURES):
            raise error.__cause__ from error
        if error.__cause__ is None:
            raise
        raise PublishError(
            f"{_clean(str(error))} ({type(error.__cause__).__name__})",
            cause="the file was changed or removed while it was sent",
            remedy=_AGAIN,
        ) from error
    except hub.FAILURES:
        raise
    except ValueError as error:
        raise PublishError(
            f"the Hub does not take the files: {_clean(str(error))}",
            cause="the model card or a file is not as the Hub wants it",
            remedy="mend that and run `make publish` again",
        ) from error


def _damaged(repo: str, name: str, commit: str) -> IntegrityError:
    return IntegrityError(
        f"{name} in {repo} at commit {commit} is not the file that was sent",
        cause="it was damaged on the way there or back, or a .gitignore in the repository keeps it out",
        remedy="run the same command again: it is compared anew, and tagged only when every file is right",
    )


def _words(error: HfHubHTTPError) -> str:
    """What the Hub says of its refusal, if anything."""
    said = _clean(error.server_message or "")
    return f": {said}" if said else ""


def _clean(text: str) -> str:
    """One line of `text` without tokens, not even those that a server sends back, and without signed addresses."""
    line = " ".join(text.split())
    for secret in filter(None, map(os.environ.get, _SECRETS)):
        line = line.replace(secret.strip(), "…")
    line = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1?…", line)
    return re.sub(r"hf_[A-Za-z0-9_.-]{4,}|(?i:bearer)\s+\S+", "…", line)[:300]


def check_names(repo: str, tag: str, kind: Kind) -> None:
    """Make sure that `repo` and `tag` can be names on the Hub; an empty tag is the usual one.

    Raises:
        UsageError: one can't.
    """
    if not _REPO.fullmatch(repo):
        setting = "SPACE" if kind == "space" else "HF_REPO"
        raise UsageError(f"{repo!r} is no repository", remedy=f"set {setting}=owner/name")
    if tag and (not _TAG.fullmatch(tag) or ".." in tag or tag.endswith((".", ".lock"))):
        raise UsageError(f"{tag!r} can't be a tag", remedy="use letters, digits, dots, dashes and underscores in TAG=")
