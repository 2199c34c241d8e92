"""sign: put the signature into a finished `publish/`, with a private key or with the identity of a CI job.

    make publish SIGN_KEY=key.pem
    make publish SIGN=keyless

It is a step of its own, not a part of the stage: the folder may come from another machine, and no key need be on the
one that builds. A signature of the same key that holds already stays, so that nothing changes when nothing changed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.core import log
from pipeline.core.errors import UsageError
from pipeline.core.stage import guard
from pipeline.release import signing


def run(folder: Path, how: str, signer: str) -> None:
    """Sign `folder`; see `signing.sign`.

    Raises:
        UsageError: there is no such folder.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder", remedy="run `make publish` first")
    log.step(f"sign {folder}")
    signing.sign(folder, how, signer)


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.sign", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a filled publish folder")
    parser.add_argument(
        "--by", choices=("key", "keyless"), required=True, help=f"the private key that {signing.KEY} names, or sigstore"
    )
    parser.add_argument("--signer", default=sys.executable, help="a Python that has model-signing (default: this one)")
    given = parser.parse_args(argv)
    return guard(lambda: run(given.folder, given.by, given.signer))


if __name__ == "__main__":
    sys.exit(main())
