"""check: hold a published folder against its own papers, as a stranger would, offline or from the Hub.

    make check FILES=folder|owner/name@revision [PUBLIC_KEY=file | IDENTITY=who ISSUER=address]

Every file has the sum in SHA256SUMS and nothing else lies beside them; every model file is the one that `report.json`
judged, that `provenance.json` speaks of and that the manifests list, and every tensor has the sum in `tensors.json`;
every other paper is the one that `provenance.json` lists; the report's figures are those of the judgement that the
manifests list, and keep its limits. With a key or an identity, the signature holds for all of it. Without one, whoever
rewrites all papers to fit each other is not found out, and the check says so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.core import log
from pipeline.core.stage import guard
from pipeline.release import signing
from pipeline.release.audit import check
from pipeline.release.download import obtain
from pipeline.release.signing import Trust


def _say(folder: Path, counted: Mapping[str, int], trust: Trust) -> None:
    log.line(f"{folder}: as its papers say: {', '.join(f'{count} {what}' for what, count in counted.items())}")
    if trust:
        log.line(f"signature: holds, of {trust.identity or trust.public_key}")
    elif (folder / signing.NAME).is_file():
        log.warn("signature not checked: say whose it must be with PUBLIC_KEY=, or with IDENTITY= and ISSUER=")
    else:
        log.warn("signature not checked: there is none")


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.check", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("files", help="a published folder, or owner/name@revision on the Hub")
    parser.add_argument("--downloads", type=Path, default=Path("artifacts/.check"), help="where the latter goes")
    parser.add_argument("--public-key", default="", help="the signature must be of this key (PEM)")
    parser.add_argument("--identity", default="", help="the signature must be of this identity (sigstore)")
    parser.add_argument("--issuer", default="", help="the identity must be vouched for by this provider")
    parser.add_argument("--signer", default=sys.executable, help="a Python that has model-signing (default: this one)")
    given = parser.parse_args(argv)
    trust = Trust(public_key=given.public_key, identity=given.identity, issuer=given.issuer)

    def work() -> None:
        folder = obtain(given.files, given.downloads)
        _say(folder, check(folder, trust, given.signer), trust)

    return guard(work)


if __name__ == "__main__":
    sys.exit(main())
