"""What the reference says: of the corpus, the shape grid, the conversations, and of itself run in another way.

It takes tokens, conversations and metrics from the judge, so that both speak of the same positions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from pipeline.cluster.pool import Shards
from pipeline.core import log, manifest, memory, parallel
from pipeline.core.errors import UsageError
from pipeline.core.recipe import BASELINE, Bundle, Corpus, Graphs, Recipe, Shapes
from pipeline.judge import corpus, kv_cache, metrics, scripts
from pipeline.judge.corpus import Tokens
from pipeline.judge.metrics import Scores, Summary
from pipeline.judge.reference import Head
from pipeline.reference.devices import require_same
from pipeline.reference.model import HuggingFace
from pipeline.reference.shards import Asked, Later, Model, loaded

Floats = NDArray[np.float32]
_LOADED = 3e8
"""Parameters per second that are read and widened, roughly."""
Floor = Mapping[str, object]
NOT_MEASURED: Floor = {"not_measured": "not measured: the model does not fit into memory and is streamed in float32"}
SAMPLE = 8
"""Windows on which the reference is held against itself."""
_FLOOR_POSITIONS = 256
_OF_SCRIPT = 8
"""Texts in each script that a release is for: a thousand positions of windows of 128 tokens."""


def ask(model: Model, shards: Shards, parameters: int) -> Asked:
    """Hugging Face's model in fp32, to be asked in shards; what its loading waits for is said."""
    log.step(f"the reference runs in fp32 on {model.device}" + (", a matrix at a time" if model.streamed else ""))
    if shards.remote:  # workers load its weights, and its tokenizer and configuration are enough here
        reference = HuggingFace.load(Path(model.checkpoint), "cpu", streamed=True)
    else:
        with log.waiting("opening the checkpoint", 3 + (0 if model.streamed else parameters / _LOADED)):
            reference = loaded(model)
    # As many workers as cores are faster with one thread each, and bytes must not depend on how many there are.
    return Asked(shards, model, parallel.threads(1) if shards.remote else torch.get_num_threads(), reference)


def make_corpus(asked: Asked, windows: Tokens, count: int, file: Path) -> Later[Floats]:
    """Compute the hidden states of `windows`, store those at `count` positions, and return all, float32 [N, L, H]."""
    states = asked.hidden(windows, np.ones_like(windows))
    judged = corpus.spread_positions(len(windows), windows.shape[1], count)

    def finish() -> Floats:
        hidden = states()
        kept = {"input_ids": windows, "hidden": hidden[judged.window, judged.length - 1]}
        save_file({**kept, "window": judged.window, "length": judged.length}, file)
        return hidden

    return finish


def make_shapes(asked: Asked, shapes: Shapes, file: Path) -> Later[int]:
    """Compute and store the shape grid: per case ids, mask and the hidden state [B, H] of each row's last token."""
    reference, rows = asked.reference, max(shapes.batch)
    vocabulary = reference.model.config.vocab_size
    cases = list(corpus.shape_cases(shapes.batch, shapes.sequence, shapes.padding))
    families: dict[tuple[int, str], tuple[Tokens, Tokens, Later[Floats]]] = {}
    for (sequence, padding), count in corpus.family_rows(cases).items():
        family = corpus.shape_family(
            rows, sequence, padding, vocabulary=vocabulary, bos=reference.bos, pad=reference.pad
        )
        ids, mask = family.input_ids[:count], family.attention_mask[:count]
        families[sequence, padding] = ids, mask, asked.hidden(ids, mask, last=True)

    def finish() -> int:
        told = {family: (ids, mask, states()) for family, (ids, mask, states) in families.items()}
        tensors: dict[str, NDArray[np.number]] = {}
        for case in cases:
            chosen = list(case.rows)
            for part, values in zip(
                ("input_ids", "attention_mask", "hidden"), told[case.sequence, case.padding], strict=True
            ):
                tensors[f"{case.name}.{part}"] = values[chosen]
        save_file(tensors, file)
        return len(cases)

    return finish


@dataclass(frozen=True)
class Sample:
    """A few windows [N, L] with their hidden states [N, L, H], on which the reference is held against itself."""

    windows: Tokens
    hidden: Floats
    head: Head

    def against(self, other: Floats) -> Summary:
        """How far `other` [N, L, H] leads from the hidden states, at places spread over the windows."""
        places = corpus.spread_positions(len(self.windows), self.windows.shape[1], _FLOOR_POSITIONS)
        targets = self.windows[places.window, places.length]
        pair = np.stack([hidden[places.window, places.length - 1] for hidden in (self.hidden, other)])
        count, scores = max(1, self.head.rows // 2), list[Scores]()
        for start in range(0, len(places), count):
            lot = pair[:, start : start + count]
            # Of both at once: to widen the head takes longer than to multiply by it.
            own, again = np.split(self.head.logits(lot.reshape(-1, lot.shape[-1])), 2)
            scores.append(metrics.compare(own, again, targets[start : start + count]))
        return metrics.summarise(metrics.join(scores), places.window)


def threads_floor(asked: Asked, windows: Tokens) -> Callable[[Sample], Floor]:
    """How far the reference is from itself: a few `windows` again with another number of threads, or on the CPU.

    A file's distance below this is noise of the reference.

    Raises:
        VerificationError: a GPU's hidden states differ from the CPU's by more than the tolerance.
    """
    device, threads = asked.model.device, asked.threads
    other = 2 if device == "cpu" and threads == 1 else 1
    used = other if device == "cpu" else threads
    states = asked.hidden(windows, np.ones_like(windows), device="cpu", threads=used)

    def finish(sample: Sample) -> Floor:
        again = states()
        nmse = require_same(again, sample.hidden, f"{device} with {threads} threads", "golden")
        against = f"{other} instead of {threads} threads" if device == "cpu" else "CPU"
        return {"against": against, "nmse": nmse, **asdict(sample.against(again))}

    return finish


def bfloat16_floor(asked: Asked, windows: Tokens) -> Callable[[Sample], Floor]:
    """How far the reference is from itself in bfloat16, which checkpoints are published and served in.

    Its layers, that is: the head is computed in float64 here as everywhere. Not measured where it is streamed.
    """
    if asked.model.streamed:
        return lambda _: NOT_MEASURED
    rounded = replace(asked.model, device="cpu", bfloat16=True)
    states = asked.hidden(windows, np.ones_like(windows), model=rounded)
    return lambda sample: {"against": "bfloat16 instead of float32", **asdict(sample.against(states()))}


def is_streamed(wanted: str, device: str, parameters: int) -> bool:
    """Whether the weights stay in their file: as asked for, else if they do not fit into memory in float32.

    Raises:
        UsageError: they are to be streamed to a GPU.
    """
    if device != "cpu":
        if wanted == "streamed":
            raise UsageError("weights are streamed on the CPU only", remedy="leave out --weights, or use DEVICE=cpu")
        return False
    return wanted == "streamed" or (wanted == "auto" and memory.must_stream(parameters))


def make_greedy(asked: Asked, openings: Sequence[str], recipe: Recipe, graphs: Graphs, file: Path) -> Later[None]:
    """Compute and store as many continuations, and as long, as step graph and bundles are held against.

    Every fourth prompt of a bundle is the same beginning as a chat turn, so that answers end at a stop token.
    """
    wanted: list[Corpus | Bundle] = [recipe.corpus] if graphs != "bundle" else []
    wanted += [recipe.bundle] if graphs != "step" else []
    prompts = corpus.pick_prompts(openings, max(each.prompts for each in wanted))
    if graphs != "step" and asked.reference.tokenizer.chat_template:
        prompts[3::4] = [asked.reference.as_turn(prompt) for prompt in prompts[3::4]]
    rows = asked.greedy(prompts, max(each.continuation for each in wanted))
    return lambda: manifest.write_atomically(
        file, json.dumps([asdict(row) for row in rows()], ensure_ascii=False, indent=1) + "\n"
    )


@dataclass(frozen=True)
class CacheTrace:
    """What the reference was asked through the cache: the model's window, tokens of a conversation, texts."""

    sliding_window: int
    conversation: int
    texts: int


def in_script(name: str, documents: Sequence[str], reference: HuggingFace, window: int) -> Tokens:
    """Windows [n, `window`] of the documents that are in a script, n at most `_OF_SCRIPT`.

    Raises:
        UsageError: there is too little text in it to judge by.
    """
    own = [document for document in documents if scripts.of_text(document) == name]
    try:
        return corpus.pack_windows(own, reference.tokenize, bos=reference.bos, window=window, limit=_OF_SCRIPT)
    except UsageError as error:
        raise UsageError(
            f"the verification text has too little in {name}: {error}",
            cause="`corpus.scripts` in the recipe names it, so bundles are judged on it",
            remedy=f"give text with documents in {name} (EVAL=), or leave it out there",
        ) from error


def make_cache_trace(asked: Asked, documents: Sequence[str], recipe: Recipe, folder: Path) -> Later[CacheTrace]:
    """Compute and store what the reference says of the conversations and texts that go through the cache.

    With its own cache only where an fp32 bundle is held against that.

    Raises:
        UsageError: the verification text is too short for them.
    """
    reference, bundle, window = asked.reference, recipe.bundle, recipe.corpus.window
    sliding = int(getattr(reference.model.config, "sliding_window", None) or 0)  # some families have no window
    schedule, _ = kv_cache.schedules(bundle, sliding)
    length = schedule.length + 1  # the last token is only predicted
    tokens = corpus.pack_windows(documents, reference.tokenize, bos=reference.bos, window=length, limit=2)
    if len(tokens) < 2:
        raise UsageError(
            f"the verification text is too short for two conversations of {schedule.length} tokens",
            remedy="give more text, or lower bundle.decode in the recipe",
        )
    count, texts, scripts_for = kv_cache.texts(bundle, window), np.empty((0, window), np.int32), recipe.corpus.scripts
    if count:
        texts = corpus.pack_windows(documents, reference.tokenize, bos=reference.bos, window=window, limit=count)
    texts = np.concatenate([texts, *(in_script(name, documents, reference, window) for name in scripts_for)])
    read, told = tokens[:, :-1], texts[:, :-1]
    # What the reference's own cache gives is the measure of the fp32 bundle alone, whose arithmetic is the same. With a
    # large model it is most of the work: each token reads all weights.
    cached = asked.cached(read, bundle.decode) if BASELINE in bundle.precisions else None
    hidden = asked.hidden(read, np.ones_like(read))
    states = asked.hidden(told, np.ones_like(told)) if len(texts) else None

    def finish() -> CacheTrace:
        whole = hidden()
        tensors = {"tokens": tokens, "hidden": whole, "cached": cached() if cached else whole[:, :0]}
        if states:
            tensors |= {"texts": texts, "states": states()}
        save_file(tensors, folder / "cache.safetensors")
        return CacheTrace(sliding_window=sliding, conversation=schedule.length, texts=len(texts))

    return finish
