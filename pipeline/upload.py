"""upload: what `publish/` holds against what a repository on the Hub holds, and, confirmed, its upload in one commit.

    make publish HF_REPO=owner/name                 # a dry run: what would change there
    make publish HF_REPO=owner/name CONFIRM=yes
    make publish SPACE=owner/name CONFIRM=yes       # `space/`: the page, as a static Space

The folder is cleared by its own papers (report, manifests, checksums, licence): it may come from another machine.
A confirmed run commits on the commit it was compared with, reads every file back by the new commit, tags it, and writes
`receipt.json`. Any run may be cut or killed: the next one goes on, and does nothing where nothing is left to do.
Without a `--tag`, it is named after the checkpoint's revision and the recipe: `<12 digits>-<8 digits of its sha256>`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.core import log
from pipeline.core.stage import guard, source
from pipeline.release import preflight, receipt, upload
from pipeline.release.hub import Hub, Kind, Repository
from pipeline.release.upload import Target


def run(
    folder: Path, repo: str, *, kind: Kind = "model", tag: str = "", parent: str = "", confirmed: bool = False
) -> None:
    """Compare `folder` with the repository `repo`, and upload it if `confirmed`.

    Args:
        folder: a filled `publish/`, or `space/`.
        repo: `owner/name`; it exists.
        kind: what it is.
        tag: name of the tag, or empty for the usual one.
        parent: the commit that the repository's main branch must be at, or empty for the one it is at now.
        confirmed: whether to send anything.

    Raises:
        UsageError: `repo` or `tag` can't be one.
        PublishError: the folder may not go up, or the Hub refuses.
        IntegrityError: what came back is not what was sent.
    """
    upload.check_names(repo, tag, kind)
    release = preflight.release(folder)
    if confirmed:
        preflight.refuse_dirty([*release.sources, source()])
    target = Target(hub=Hub(), repo=repo, folder=folder, files=release.files, tag=tag or release.tag, kind=kind)
    published = target.tagged()
    head = target.head()
    if published and published.revision != head.revision:
        log.warn(f"{repo} holds these files at tag {target.tag}; its main branch has moved on to {head.revision}")
    if published and confirmed and receipt.read(folder) == receipt.said(target, published.revision):
        log.line(f"{repo} holds these files at commit {published.revision}, tag {target.tag}: nothing to do")
    elif confirmed:
        _publish(target, published, parent or head.revision)
    else:
        _show(target, published or head)


def _publish(target: Target, published: Repository | None, parent: str) -> None:
    """Commit unless that is done, read back, tag, and write the receipt last."""
    published = published or target.commit(parent)
    log.step(f"{target.repo} at commit {published.revision}: reading every file back")
    target.check(published)
    target.mark(published.revision)
    receipt.write(target, published.revision)
    log.line(f"published: {target.page}/tree/{target.tag}")
    log.line(f"receipt:   {target.folder / preflight.RECEIPT}")


def _show(target: Target, there: Repository) -> None:
    """Print the difference, and the command that uploads."""
    diff = target.diff(there)
    for mark, names in (("+", diff.added), ("~", diff.changed), ("-", diff.removed), ("=", diff.unchanged)):
        for name in names:
            size = target.files[name].size if name in target.files else there.files[name].size
            log.line(f"  {mark} {log.human_bytes(size):>9}  {name}")
    log.line(f"{target.repo}: parent commit {there.revision}, tag {target.tag}; {diff.counts}")
    if diff.empty:
        log.line("dry run: the repository holds these files already")
    else:
        size = sum(target.files[name].size for name in (*diff.added, *diff.changed))
        log.line(f"dry run: would send {log.human_bytes(size)}; nothing was sent. To upload, the same command and")
        log.line(f"  CONFIRM=yes PARENT={there.revision}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.upload",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="a filled publish folder")
    parser.add_argument("--repository", required=True, help="owner/name on the Hub")
    parser.add_argument("--space", action="store_true", help="it is a Space, and the folder a filled space folder")
    parser.add_argument("--tag", default="", help="name of the tag (default: from revision and recipe)")
    parser.add_argument("--parent", default="", help="commit that the repository must be at (default: where it is now)")
    parser.add_argument("--confirm", action="store_true", help="upload; without it nothing is sent")
    given = parser.parse_args(argv)

    def work() -> None:
        with upload.client():
            kind: Kind = "space" if given.space else "model"
            run(given.folder, given.repository, kind=kind, tag=given.tag, parent=given.parent, confirmed=given.confirm)

    return guard(work)


if __name__ == "__main__":
    sys.exit(main())
