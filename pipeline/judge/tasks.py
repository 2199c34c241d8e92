"""The user's own task: prompts with references, answers scored against them, and how far two models are apart in that.

Exact match, and chrF and BLEU as sacrebleu computes them, in points from 0 to 100; paired bootstrap over prompts after
Koehn (2004): both models are scored on the same draws, so that what is hard for both does not blur their difference.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import UsageError
from pipeline.judge import corpus
from pipeline.judge.metrics import Draws, Estimate, estimate

if TYPE_CHECKING:
    from sacrebleu.metrics.base import Metric

Message = Mapping[str, str]
ORIGINAL = "original"
"""What Hugging Face's model is called among those that answer."""
TITLES = {"exact": "exact match", "chrf": "chrF", "bleu": "BLEU"}
METRICS = tuple(TITLES)
FEWEST = 30
"""Prompts below which an interval is too rough to be relied on."""
_REMEDY = 'each line must be JSON such as {"prompt": "…", "reference": "…"}, or with "messages" and "references"'


@dataclass(frozen=True, kw_only=True)
class Item:
    """One prompt, as a conversation that the model is to answer, and the answers that are right."""

    messages: tuple[Message, ...]
    references: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """What was asked last."""
        return self.messages[-1]["content"]


def read(file: Path) -> list[Item]:
    """The items of a `.jsonl` file: `prompt` or `messages`, and `reference` or `references`, on each line.

    Raises:
        UsageError: the file can't be read, is empty, or a line is not what it must be.
    """
    wanted = "set TASK= to a UTF-8 .jsonl file"
    items = corpus.parse_lines(file, lambda row: _item(json.loads(row)), "task", wanted, _REMEDY)
    if not items:
        raise UsageError(f"{file} holds no prompt", remedy=_REMEDY)
    return items


def _item(row: Mapping[str, object]) -> Item:
    messages = row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
    references = row["references"] if "references" in row else [row["reference"]]
    if not isinstance(messages, list) or not isinstance(references, list):
        raise TypeError("messages or references are no list")
    texts = [*references, *(message[key] for message in messages for key in ("role", "content"))]
    if not messages or not references or not all(isinstance(text, str) for text in texts):
        raise TypeError("a prompt, message or reference is missing or is no text")
    return Item(messages=tuple(messages), references=tuple(references))


@dataclass(frozen=True)
class Answers:
    """Statistics of one model's answers: per metric one row a prompt [n, k], and the score that their sum [k] has."""

    statistics: Mapping[str, NDArray[np.float64]]
    score: Mapping[str, Callable[[NDArray[np.float64]], float]]

    def value(self, metric: str) -> float:
        """The score of all answers."""
        return self.score[metric](self.statistics[metric].sum(axis=0))

    @cached_property
    def drawn(self) -> Mapping[str, NDArray[np.float64]]:
        """Each metric's score of every draw of prompts; the draws of as many prompts are the same ones."""
        times = Draws.of(np.arange(len(self.statistics["exact"]))).times
        return {
            metric: np.array([self.score[metric](row) for row in times @ rows])
            for metric, rows in self.statistics.items()
        }


def answers(texts: Sequence[str], items: Sequence[Item]) -> Answers:
    """The statistics of `texts`, one for each of `items`; Unicode's composed form, spaces at the ends left out."""
    said = [_plain(text) for text in texts]
    right = [[_plain(text) for text in item.references] for item in items]
    exact = [text in references for text, references in zip(said, right, strict=True)]
    statistics = {"exact": np.array([[float(hit), 1.0] for hit in exact])}
    score: dict[str, Callable[[NDArray[np.float64]], float]] = {"exact": lambda sums: float(100 * sums[0] / sums[1])}
    streams = cast("list[list[str]]", _streams(right))  # None is no reference, which sacrebleu's types don't say
    for name, metric in _sacrebleu().items():
        statistics[name] = np.array(metric._extract_corpus_statistics(said, streams), np.float64)
        score[name] = lambda sums, metric=metric: float(  # type: ignore[misc]  # the default binds this turn's metric
            metric._compute_score_from_stats([int(count) for count in sums]).score
        )
    return Answers(statistics=statistics, score=score)


def _sacrebleu() -> dict[str, Metric]:
    """chrF2 and BLEU with their defaults.

    Their statistics per sentence have no public name in sacrebleu 2.6.0; its own significance tests use these as well,
    and a test here holds the scores against `corpus_score`.
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    return {"chrf": CHRF(), "bleu": BLEU(force=True)}


def signatures() -> dict[str, str]:
    """How sacrebleu was set up, in its own notation, for others to compare with."""
    found = {}
    for name, metric in _sacrebleu().items():
        metric.corpus_score(["a"], [["a"]])  # which tells it how many references there are
        found[name] = str(metric.get_signature())
    return found


def _streams(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """As sacrebleu wants them: a list of the first reference of each prompt, one of the second, and so on."""
    most = max(map(len, references))
    return [[row[place] if place < len(row) else None for row in references] for place in range(most)]


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()


@dataclass(frozen=True)
class Comparison:
    """One model beside another: its score less the other's, and `within` how many points it is at 95 %."""

    difference: Estimate
    within: float


def scored(found: Answers) -> dict[str, Estimate]:
    """Each metric with its 95 % interval."""
    return {metric: estimate(found.value(metric), found.drawn[metric]) for metric in METRICS}


def compared(found: Answers, original: Answers) -> dict[str, Comparison]:
    """Each metric against the original's, on the same draws."""
    told = {}
    for metric in METRICS:
        drawn = found.drawn[metric] - original.drawn[metric]
        difference = estimate(found.value(metric) - original.value(metric), drawn)
        told[metric] = Comparison(difference, max(abs(difference.low), abs(difference.high)))
    return told


def figures(texts: Mapping[str, Sequence[str]], items: Sequence[Item]) -> dict[str, object]:
    """Scores of every model, and each bundle's beside the original's."""
    found: dict[str, Answers] = {name: answers(said, items) for name, said in texts.items()}
    original = found[ORIGINAL]
    return {
        "scores": {
            name: {metric: asdict(value) for metric, value in scored(each).items()} for name, each in found.items()
        },
        "against_original": {
            name: {
                **{metric: asdict(value) for metric, value in compared(each, original).items()},
                "identical": sum(map(str.__eq__, texts[name], texts[ORIGINAL])) / len(items),
            }
            for name, each in found.items()
            if name != ORIGINAL
        },
    }


def rows(texts: Mapping[str, Sequence[str]], items: Sequence[Item]) -> list[dict[str, object]]:
    """Every prompt with its references and what each model said."""
    return [
        {
            "messages": [dict(message) for message in item.messages],
            "references": list(item.references),
            "answers": {name: said[place] for name, said in texts.items()},
        }
        for place, item in enumerate(items)
    ]
