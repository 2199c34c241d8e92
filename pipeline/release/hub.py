"""The Hugging Face Hub over HTTP, through the session, headers and errors of huggingface_hub.

What is our own, and why: huggingface_hub 2.4.0 downloads to a file name that is new each time and removes it on
failure, so nothing survives a kill; it retries neither an answer 5xx nor a reset connection in the middle of a file; it
checks no hash; and it has no way to read a part of a file. So files are read by ranges over plain HTTP (which the Hub
also serves for Xet storage), a partial file is continued where it stopped, and a complete one is held against the size
and hash that the Hub lists. The token comes from the environment or from huggingface_hub's own store, goes to the Hub
alone, and is never printed.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Literal, Protocol, TypeVar

import httpx2
from huggingface_hub import HfApi, constants, get_session, get_token, hf_hub_url, hf_raise_for_status
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    OIDCError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # the latter is public, not in its __all__
    _auth,
    build_hf_headers,
)

from pipeline.core import log
from pipeline.core.errors import FetchError, IntegrityError, PipelineError

WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each new try; as many tries as in huggingface_hub
LONGEST_WAIT = 300.0  # seconds; the Hub's rate limits count in windows of five minutes
_ANSWER_SECONDS = 30.0
_PASSING = (408, 429, 500, 502, 503, 504)
FAILURES = (
    HfHubHTTPError,
    httpx2.TransportError,
    httpx2.InvalidURL,
    OfflineModeIsEnabled,
    OIDCError,
    UnicodeError,
)
"""What comes through huggingface_hub when something is wrong with the connection, the Hub or the token."""
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file of a repository: `sha256` if it is in large file storage, else `git_sha1` of its blob."""

    size: int
    sha256: str = ""
    git_sha1: str = ""


Kind = Literal["model", "space"]


@dataclass(frozen=True, kw_only=True)
class Repository:
    """A repository at one commit; `files` are all its files by path."""

    model_id: str
    revision: str
    files: Mapping[str, RemoteFile]
    kind: Kind = "model"


class Sink(Protocol):
    """What a download goes to, in order: a file, or a hash."""

    def write(self, data: bytes, /) -> object: ...
    def tell(self) -> int: ...
    def seek(self, place: int, /) -> object: ...
    def truncate(self, size: int, /) -> object: ...


class Hash:
    """A `Sink` that keeps the sha256 of what is written; it can be emptied, not shortened."""

    def __init__(self) -> None:
        self._digest, self._size = hashlib.sha256(), 0

    def write(self, data: bytes, /) -> None:
        self._digest.update(data)
        self._size += len(data)

    def tell(self) -> int:
        return self._size

    def seek(self, place: int, /) -> None:
        assert place == self._size

    def truncate(self, size: int, /) -> None:
        # A digest can't be wound back: whoever wants fewer bytes begins again.
        assert size == 0
        self.__init__()  # type: ignore[misc]  # as new

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


class Hub:
    """A Hub: `HF_ENDPOINT` or huggingface.co. `waits`: seconds before each new try of a request (default `WAITS`)."""

    def __init__(self, waits: Sequence[float] | None = None) -> None:
        self.endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")
        self.waits = tuple(WAITS if waits is None else waits)

    def page(self, name: str, kind: Kind = "model") -> str:
        """The address of a repository."""
        return f"{self.endpoint}/{'spaces/' if kind == 'space' else ''}{name}"

    def resolve(self, model_id: str, revision: str = "", kind: Kind = "model") -> Repository:
        """The repository `model_id` at `revision` (branch, tag or commit; empty for the main branch).

        Raises:
            FetchError: no such model or revision, no access, no network, or no Hub at the endpoint.
        """
        api = HfApi(endpoint=self.endpoint)

        def ask() -> Repository:
            # With sizes and hashes of all files: what comes is held against them.
            asked = api.space_info if kind == "space" else api.model_info
            info = asked(model_id, revision=revision or None, files_metadata=True, timeout=_ANSWER_SECONDS)
            if not info.sha or info.siblings is None:
                raise ValueError("no commit or no files")
            files = {item.rfilename: _remote(item) for item in info.siblings}
            # The commit and not the branch: every later request names it, so that a push in between changes nothing.
            return Repository(model_id=info.id, revision=info.sha, files=files, kind=kind)

        try:
            return self.patiently(ask, partial(self.explain, model_id=model_id, revision=revision))
        except HFValidationError as error:
            raise FetchError(
                f"{model_id!r} is neither a folder nor a Hub id",
                cause="the path is misspelt, or the id is not of the form owner/name",
                remedy="check MODEL_ID=",
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FetchError(
                f"{self.endpoint} does not answer as a Hub does",
                cause=f"HF_ENDPOINT is wrong, or a proxy answers in its place ({type(error).__name__})",
                remedy="check HF_ENDPOINT and the proxy settings",
            ) from error

    def card(self, model_id: str) -> dict[str, object] | None:
        """The front matter of a model's card, which the Hub tells of gated ones as well; None: no such model is seen.

        Raises:
            FetchError: no network, or no Hub at the endpoint.
        """
        api = HfApi(endpoint=self.endpoint)

        def ask() -> dict[str, object] | None:
            try:
                data = api.model_info(model_id, timeout=_ANSWER_SECONDS).card_data
            except HFValidationError:
                return None
            except HfHubHTTPError as error:
                if _is_unseen(error):
                    return None
                raise
            return dict(data.to_dict()) if data else {}  # type: ignore[no-untyped-call]

        return self.patiently(ask, partial(self.explain, model_id=model_id, revision=""))

    def read(self, repository: Repository, name: str, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` (exclusive) of a file; no more than these are transferred.

        Raises:
            FetchError: as `resolve`.
            IntegrityError: the file ends before `stop`.
        """

        def ask() -> bytes:
            data = bytearray()
            with self._open(repository, name, start, stop) as response:
                skip = start if response.status_code == 200 else 0  # the server ignored the range
                for chunk in response.iter_bytes():
                    data += chunk
                    if len(data) >= skip + stop - start:
                        break
            return bytes(data[skip : skip + stop - start])

        if start == stop:
            return b""
        part = self.patiently(ask, self._of(repository))
        if len(part) != stop - start:
            raise IntegrityError(
                f"{name} on the Hub ends at byte {start + len(part)}, it is listed with {repository.files[name].size}",
                cause="the upload was not finished, or a proxy cut the answer",
                remedy="try again later, or another REVISION=",
            )
        return part

    def download(self, repository: Repository, name: str, folder: Path) -> Path:
        """Download a file into `folder` and return its path; a partial file there is continued.

        Raises:
            FetchError: as `resolve`.
            IntegrityError: what came is not what the Hub lists; the partial file is removed.
        """
        expected, done, waiting = repository.files[name], folder / name, folder / f"{name}.partial"
        # A repository's file names are its author's, and are joined to our folder.
        if ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute():
            raise IntegrityError(f"{name!r} on the Hub is no path inside a repository", remedy="do not use this model")
        # By size alone: it bore this name only after its hash was checked.
        if done.is_file() and done.stat().st_size == expected.size:
            return done
        done.parent.mkdir(parents=True, exist_ok=True)
        with waiting.open("ab") as stream:
            # Of another version of the file: nothing of it can be gone on with.
            if stream.tell() > expected.size:
                stream.truncate(0)
            elif stream.tell():
                log.step(f"{name}: going on at {log.human_bytes(stream.tell())} of {log.human_bytes(expected.size)}")
            with log.progress(name, expected.size - stream.tell()) as bar:
                self._fill(repository, name, stream, bar)
            stream.flush()
            os.fsync(stream.fileno())
        _check(waiting, expected, name)
        return waiting.replace(done)

    def sha256(self, repository: Repository, name: str, bar: log.Progress) -> str:
        """The hash of a file as it comes from the Hub, without keeping it; `bar` is advanced by the bytes read.

        Raises:
            FetchError: as `resolve`.
        """
        digest = Hash()
        self._fill(repository, name, digest, bar)
        return digest.hexdigest()

    def _fill(self, repository: Repository, name: str, stream: Sink, bar: log.Progress) -> None:
        """Bring `stream` to the size that the Hub lists; each round adds bytes or raises."""
        while stream.tell() < repository.files[name].size:
            self.patiently(lambda: self._continue(repository, name, stream, bar), self._of(repository))

    def _continue(self, repository: Repository, name: str, stream: Sink, bar: log.Progress) -> None:
        """Append to `stream`, whose end is the file's next byte, until the file is whole or the connection breaks."""
        size, start = repository.files[name].size, stream.tell()
        try:
            with self._open(repository, name, start, size) as response:
                if response.status_code == 200 and start:  # the server ignored the range
                    stream.truncate(0)
                    stream.seek(0)
                    bar.advance(-start)
                    start = 0
                for chunk in response.iter_bytes():
                    stream.write(chunk)
                    bar.advance(len(chunk))
        except httpx2.TransportError as error:
            if stream.tell() <= start:
                raise
            log.warn(
                f"{name}: the connection broke at {log.human_bytes(stream.tell())} ({type(error).__name__}), going on"
            )
            time.sleep(self.waits[0] if self.waits else 0)
        if stream.tell() <= start:
            raise httpx2.RemoteProtocolError("the answer was empty")

    @contextmanager
    def _open(self, repository: Repository, name: str, start: int, stop: int) -> Iterator[httpx2.Response]:
        """The answer to a request for bytes `start` to `stop` of a file; its body is still to be read."""
        where = {"repo_type": repository.kind, "revision": repository.revision, "endpoint": self.endpoint}
        url = hf_hub_url(repository.model_id, name, **where)
        # Unpacked on the way, a range would be one of other bytes.
        headers = {**build_hf_headers(), "range": f"bytes={start}-{stop - 1}", "accept-encoding": "identity"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        # The session follows redirects to a storage host and leaves the token out there.
        with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
            hf_raise_for_status(response)
            yield response

    def patiently(self, work: Callable[[], _T], explain: Callable[[Exception], PipelineError]) -> _T:
        """The result of `work`, tried again after each passing failure until the waits are used up.

        Raises:
            PipelineError: what `explain` makes of the last failure.
        """
        for wait in (*self.waits, None):
            try:
                return work()
            except FAILURES as error:
                if wait is None or not is_passing(error):
                    raise explain(error) from error
                if _is_lapsed(error):
                    _auth._OIDC_TOKEN_CACHE = None  # else the client sends it until its hour is over (2.4.0)
                # A server may ask for a day; then it is better to end with a sentence.
                pause = max(wait, min(_asked_wait(error), LONGEST_WAIT))
                log.warn(f"{self.endpoint}: {brief(error)}; trying again in {log.human_seconds(pause)}")
                time.sleep(pause)
        raise AssertionError("the last round returns or raises")

    def _of(self, repository: Repository) -> Callable[[Exception], FetchError]:
        return partial(self.explain, model_id=repository.model_id, revision=repository.revision)

    def explain(self, error: Exception, model_id: str, revision: str) -> FetchError:
        """What `error` means for the person who asked for `model_id`."""
        page = f"{self.endpoint}/{model_id}"
        log_in = "set HF_TOKEN or run `hf auth login`"
        if is_identity(error):
            return _explain_identity(again=is_passing(error), endpoint=self.endpoint, page=page, log_in=log_in)
        if isinstance(error, GatedRepoError):
            who = "this token has" if has_token() else "without a token there is"
            return FetchError(
                f"{model_id} is gated and {who} no access to it",
                cause="its author asks everyone to accept the licence first",
                remedy=f"accept it at {page}, then "
                + (
                    "run this again; a fine-grained token must also allow gated repositories" if has_token() else log_in
                ),
            )
        if isinstance(error, RevisionNotFoundError):
            return FetchError(
                f"{model_id} has no revision {revision!r}",
                remedy=f"choose a branch, tag or commit from {page}/commits/main",
            )
        if _is_unseen(error):
            return FetchError(
                f"there is no model {model_id} at {self.endpoint}, or it is private and not yours to see",
                cause="the id is misspelt" + (", or the token belongs to another account" if has_token() else ""),
                remedy=f"check the id; for a private model {log_in}; for a local folder check the path",
            )
        if isinstance(error, DisabledRepoError):
            return FetchError(f"{model_id} was disabled by the Hub", remedy=f"read why at {page}")
        if isinstance(error, HfHubHTTPError):
            return self._explain_status(error, model_id)
        if isinstance(error, OfflineModeIsEnabled):
            return FetchError("HF_HUB_OFFLINE forbids to ask the Hub", remedy="unset it, or give a folder as MODEL_ID")
        if is_malformed_token(error):
            return FetchError("HF_TOKEN holds characters that no token has", remedy=f"copy it again, then {log_in}")
        return FetchError(
            f"can't reach {self.endpoint}",
            cause=f"no network, a proxy, or a wrong HF_ENDPOINT ({brief(error)})",
            remedy="check the connection and run the same command again: it goes on where it stopped",
        )

    def _explain_status(self, error: HfHubHTTPError, model_id: str) -> FetchError:
        status = error.response.status_code
        if status == 401:
            return FetchError(
                "the Hub refuses the token",
                cause="HF_TOKEN (or the stored token) is mistyped, expired or revoked",
                remedy=f"make a new one at {self.endpoint}/settings/tokens and set HF_TOKEN or run `hf auth login`",
            )
        if status == 403:
            return FetchError(
                f"the token may not read {model_id}",
                cause="a fine-grained token lists what it may read",
                remedy=f"allow it at {self.endpoint}/settings/tokens",
            )
        return FetchError(
            f"{self.endpoint} {'still ' if status in _PASSING else ''}answers with status {status}",
            cause="too many requests" if status == 429 else "the Hub or a proxy before it has a problem",
            remedy="run the same command again later: it goes on where it stopped",
        )


def _remote(item: RepoSibling) -> RemoteFile:
    if item.size is None:
        raise ValueError("a file without a size")
    return RemoteFile(size=item.size, sha256=item.lfs.sha256 if item.lfs else "", git_sha1=item.blob_id or "")


def _check(file: Path, expected: RemoteFile, name: str) -> None:
    """Hold a downloaded file against the Hub's listing; remove it if it differs.

    Raises:
        IntegrityError: size or hash differ.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        if expected.sha256:
            same = hashlib.file_digest(stream, "sha256").hexdigest() == expected.sha256
        else:  # git's name for a blob, https://git-scm.com/book/en/v2/Git-Internals-Git-Objects
            same = hashlib.sha1(b"blob %d\0" % size + stream.read()).hexdigest() == expected.git_sha1
    if size != expected.size or not same:
        file.unlink()
        raise IntegrityError(
            f"{name} has not the {'hash' if size == expected.size else 'size'} that the Hub lists",
            cause="it was damaged on the way, or a proxy answered with something else",
            remedy="run the same command again: that file is downloaded anew",
        )


def has_token() -> bool:
    """Whether there is a token to send; a CI job's identity counts as one, without being asked for it."""
    return bool(os.environ.get("HF_OIDC_RESOURCE") or get_token())


def is_identity(error: Exception) -> bool:
    """Whether a CI job's identity was not taken, or there was none."""
    # There the client changes a CI job's identity for a token; the answer 401 means another thing than elsewhere.
    refused = isinstance(error, HfHubHTTPError) and error.response.request.url.path == "/oauth/token"
    return refused or isinstance(error, OIDCError)


def _explain_identity(*, again: bool, endpoint: str, page: str, log_in: str) -> FetchError:
    """What to do about an identity that gave no token; `again`: it was tried until patience ended."""
    cause = "the job lacks the permission `id-token: write`, or is no trusted publisher of that repository or user"
    allow = f"allow both (repository, branch and workflow at {page}/settings, of a user at {endpoint}/settings)"
    return FetchError(
        "the identity of this CI job gave no token for HF_OIDC_RESOURCE",
        cause=("the Hub could not give one, again and again: its own fault perhaps; or " if again else "") + cause,
        remedy=("run it again later; " if again else "") + f"{allow}, or unset it and {log_in}",
    )


def _is_lapsed(error: Exception) -> bool:
    """Whether the token that a CI job's identity was exchanged for counts no more; it lives for an hour."""
    refused = isinstance(error, HfHubHTTPError) and error.response.status_code == 401
    unseen = isinstance(error, RepositoryNotFoundError)
    return bool(os.environ.get("HF_OIDC_RESOURCE")) and refused and not unseen and not is_identity(error)


def _is_unseen(error: Exception) -> bool:
    """Whether there is no such repository, or it is private and not ours: to strangers the Hub answers 401 for both."""
    anonymous = not has_token() and isinstance(error, HfHubHTTPError) and error.response.status_code == 401
    return isinstance(error, RepositoryNotFoundError) or anonymous


def is_malformed_token(error: Exception) -> bool:
    """Whether the token can't stand in a header. Such an error quotes the token: it must not be printed."""
    return isinstance(error, (UnicodeError, httpx2.LocalProtocolError))


def is_passing(error: Exception) -> bool:
    """Whether the same request may go well later."""
    if isinstance(error, HfHubHTTPError):
        # An exchange that the Hub itself gives up is a 400 (https://github.com/huggingface/hub-docs/issues/2757).
        status, exchange = error.response.status_code, is_identity(error)
        return status in _PASSING or (exchange and status == 400) or _is_lapsed(error)
    return isinstance(error, httpx2.TransportError) and not isinstance(
        error, (httpx2.UnsupportedProtocol, httpx2.LocalProtocolError)
    )


def _asked_wait(error: Exception) -> float:
    """Seconds that the server asks to wait (`Retry-After`), 0 if it doesn't say."""
    if not isinstance(error, HfHubHTTPError):
        return 0.0
    asked = error.response.headers.get("retry-after", "")
    # It may be a date as well, which the Hub does not send.
    return float(asked) if asked.isdecimal() else 0.0


def brief(error: Exception) -> str:
    """One line without headers or tokens."""
    if isinstance(error, HfHubHTTPError):
        return f"status {error.response.status_code}"
    if isinstance(error, httpx2.TransportError) and str(error) and not is_malformed_token(error):
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return type(error).__name__
