"""Hold real chat templates against the runtime: each is rendered alike in LiteRT-LM, or refused with its construct.

    python -m tools.templates FOLDER        (nox -s templates)

FOLDER has the templates (`*.jinja`) that llama.cpp's source carries, as published with their models; none is copied
here. Their models' special tokens matter to no proof, so the shipped model's tokenizer stands in.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pipeline.bundling import template
from pipeline.checkpoint import chat
from pipeline.core import log
from pipeline.core.errors import BundleError
from pipeline.core.recipe import PROJECT

KINDS = {"gemma-4": "gemma4", "gemma": "gemma3", "qwen": "qwen3"}
"""What LiteRT-LM takes a model for, by a word in its template's name, the first that fits; else a generic one."""
TOOLS = ("gemma4", "qwen3")
"""Those whose bundles take tools, where the template does."""


def tried(file: Path) -> tuple[bool, str]:
    """Whether the template in `file` is rendered alike, and what is said of it."""
    tokenizer = chat.open_tokenizer(PROJECT / "examples" / "tiny-gemma3n")
    tokenizer.chat_template = source = file.read_text(encoding="utf-8")
    kind = next((kind for word, kind in KINDS.items() if word in file.name.lower()), "generic_model")
    try:
        made = template.prepare(source, tokenizer, kind, tools=kind in TOOLS and "tools" in source)
    except BundleError as error:
        return False, f"{error}; {error.cause}"
    how = "as it is" if made.source == source.removesuffix("\n") else "rewritten"
    return True, f"{how}, but without tools: {made.no_tools}" if made.no_tools else how


def main() -> int:
    """Run from the command line; 1 if a template ends in anything else than a proof or a sentence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="templates with this in their names")
    arguments = parser.parse_args()
    alike = broken = 0
    files = [file for file in sorted(arguments.folder.glob("*.jinja")) if arguments.only in file.name]
    for file in files:
        try:
            same, said = tried(file)
        except Exception as error:
            same, said, broken = False, f"BROKEN: {error!r}", broken + 1
        alike += same
        log.line(f"{'alike' if same else 'refused':<8} {file.stem}: {said[:400]}")
    log.line(f"{len(files)} templates: {alike} rendered alike, {len(files) - alike - broken} refused with a reason")
    return 1 if broken or not files else 0


if __name__ == "__main__":
    sys.exit(main())
