"""The signature of a published folder, in OpenSSF's format (https://github.com/sigstore/model-transparency).

`model.sig` covers every file but itself, `SHA256SUMS` and what the runner adds. `SHA256SUMS` covers `model.sig` and is
nothing but the sums of the other files, so it needs no signature, and no byte of the folder is left out.

A folder is signed after it is finished, anywhere that it lies. A `model.sig` that `SHA256SUMS` does not list was left
by a run that was killed, and counts as none.

The work is done by PyPI's `model-signing`, a program of its own in an environment of its own (locks/sign.txt), because
it needs a newer typing-extensions than the converter allows. `signer` is that environment's Python.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.core import log, manifest, process
from pipeline.core.errors import IntegrityError, PublishError, UsageError
from pipeline.release import provenance

NAME = "model.sig"
RUNNERS = (manifest.NAME, "run.json", "receipt.json")
"""What the runner leaves in the folder; it is not uploaded."""
KEY = "SIGN_KEY"
"""Environment variable with the path of the private key, which is recorded nowhere."""


_PUBLIC_HALF = """
import sys
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
with open(sys.argv[1], "rb") as file:
    key = load_pem_private_key(file.read(), None).public_key()
print(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode())
"""


@dataclass(frozen=True, kw_only=True)
class Trust:
    """Whose signature is accepted: that of a public key, or of an identity that an issuer vouches for; or nobody's."""

    public_key: str = ""
    identity: str = ""
    issuer: str = ""

    def __bool__(self) -> bool:
        return any((self.public_key, self.identity, self.issuer))

    def options(self) -> list[str]:
        """How model-signing is told.

        Raises:
            UsageError: both kinds are asked for, half of one, or the key is no file.
        """
        if self.public_key and not (self.identity or self.issuer):
            if not Path(self.public_key).is_file():
                raise UsageError(f"{self.public_key} is not a file", remedy="set PUBLIC_KEY= to a public key (PEM)")
            return ["key", "--public_key", self.public_key]
        if self.identity and self.issuer and not self.public_key:
            return ["sigstore", "--identity", self.identity, "--identity_provider", self.issuer]
        raise UsageError(
            "it is not clear whose signature is to be accepted",
            remedy="set PUBLIC_KEY= alone, or IDENTITY= and ISSUER= together",
        )


def sign(folder: Path, how: str, signer: str = sys.executable) -> None:
    """Write the signature into the finished `folder` and list it in SHA256SUMS; one that holds already stays.

    Args:
        folder: holds all that is to be signed, and its sums.
        how: `key`: with the private key that the environment's SIGN_KEY names, offline. `keyless`: by sigstore, with
            the identity that CI gives.
        signer: the Python that has model-signing.

    Raises:
        UsageError: no key is named, or `signer` lacks model-signing.
        PublishError: it could not be signed.
        IntegrityError: a file is not as its sum says.
    """
    _require(signer)
    options = _how(how)
    if _holds(folder, how, signer):
        log.line(f"{folder / NAME} holds already")
        return
    _take_off(folder)
    provenance.check_sums(folder)
    if _run(signer, "sign", options, folder):
        raise PublishError(
            f"{folder} could not be signed",
            cause="the line above says why: a key of another kind, or no identity to be had",
            remedy="correct it and run `make publish` again",
        )
    digest = manifest.FileRecord.of(folder / NAME, folder).sha256
    provenance.list_sums(folder, {**provenance.read_sums(folder), NAME: digest})


def _how(how: str) -> list[str]:
    if how == "keyless":
        return ["sigstore", "--use_ambient_credentials"]
    key = os.environ.get(KEY, "")
    if not Path(key).is_file():
        raise UsageError(
            "there is no private key to sign with" if not key else "the private key is not a file",
            remedy=f"set {KEY}= to an elliptic-curve key in PEM, P-256, P-384 or P-521, without password",
        )
    return ["key", "--private_key", key]


def _holds(folder: Path, how: str, signer: str) -> bool:
    """Whether the folder is signed: by the same key; or by sigstore, whose signatures all differ, since it was made."""
    if NAME not in provenance.read_sums(folder) or not (folder / NAME).is_file():
        return False
    if how == "keyless":
        return provenance.check_sums(folder) > 0
    # By the signer's Python, which has the cryptography; the key's path goes as a word, its content nowhere.
    public = process.output([signer, "-c", _PUBLIC_HALF, os.environ[KEY]])
    with tempfile.NamedTemporaryFile("w", suffix=".pub", encoding="utf-8") as file:
        file.write(public or "")
        file.flush()
        return bool(public) and not _run(signer, "verify", ["key", "--public_key", file.name], folder)


def _take_off(folder: Path) -> None:
    """Remove a signature: from the sums first, so that no moment has one listed that is not there."""
    sums = provenance.read_sums(folder)
    sums.pop(NAME, None)
    provenance.list_sums(folder, sums)
    (folder / NAME).unlink(missing_ok=True)


def verify(folder: Path, trust: Trust, signer: str = sys.executable) -> None:
    """Hold every file of `folder` against its signature.

    Raises:
        UsageError: `trust` is not one signer, or `signer` lacks model-signing.
        IntegrityError: there is no signature, it is not that signer's, or a file is not what was signed.
    """
    options = trust.options()
    if not (folder / NAME).is_file():
        raise IntegrityError(
            f"{folder} has no signature", cause="it was never signed, or somebody took it away", remedy="do not use it"
        )
    _require(signer)
    if _run(signer, "verify", options, folder):
        raise IntegrityError(
            f"the signature of {folder} does not hold",
            cause="the line above says why: another signer, or a file that was changed, added or dropped since",
            remedy="do not use it",
        )


def _run(signer: str, verb: str, options: Sequence[str], folder: Path) -> int:
    # Files of git are signed as well: left out, one could be slipped in.
    command = [signer, "-m", "model_signing", verb, *options, "--signature", str(folder / NAME)]
    command += ["--no-ignore-git-paths", *(f"--ignore-paths={folder / name}" for name in (provenance.NAME, *RUNNERS))]
    return process.run([*command, str(folder)])


def _require(signer: str) -> None:
    if process.output([signer, "-c", "import model_signing, OpenSSL"]) is None:
        raise UsageError(
            f"{signer} has no model-signing",
            cause="it is in an environment of its own",
            remedy="go through `make`, or install locks/sign.txt and name its Python with --signer",
        )
