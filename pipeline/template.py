"""template: whether LiteRT-LM renders the checkpoint's chat template as transformers does; with fetch's result alone.

Make runs it before the first stage that reads the checkpoint, so that a template that no bundle can have is refused
before hours of work. It takes no model: `bundling/standin.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pipeline.bundling.metadata import of_checkpoint
from pipeline.core import log, options
from pipeline.core.recipe import load as load_recipe
from pipeline.core.stage import Common, guard


def work(given: Common) -> None:
    """Say what the bundle's template will be.

    Raises:
        BundleError: no bundle can have it; names line and construct, or how the rendered text differs.
    """
    bundle = load_recipe(given.recipe_file).bundle
    made = of_checkpoint(given.root / "fetch" / "checkpoint", bundle, given.towers).metadata
    what = "rendered alike in LiteRT-LM" if made.chat_template else "none: a base model"
    log.line(f"template · {given.root.name} · {what}")
    for remark in made.remarks:
        log.warn(remark)


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line and return the exit code."""
    given = options.read("template", "Prove the checkpoint's chat template in LiteRT-LM.", Common, argv)
    return guard(lambda: work(given))


if __name__ == "__main__":
    sys.exit(main())
