"""A bundle beside llama.cpp's file of the very same checkpoint and precision: quality on one text, speed in turns.

    nox -s rival [-- [smollm2] [--precision int4]]   # builds llama.cpp, makes checkpoint, reference, bundle, calls this

int8 is held against Q8_0, int4 against Q4_0, which llama.cpp rounds with its defaults, without an importance matrix.

Both predict every token of the texts that verify judges bundles on, and are held against Hugging Face in fp32 by the
judge's own metrics: ours through the `decode` signature, a token at a time, llama.cpp a text at once, as its own
`perplexity` does. Then both read a prompt and decode, each time in a process of its own and in turns: ours in
LiteRT-LM, llama.cpp in its library. llama.cpp runs with its defaults; the cache is as long as the bundle's. The table
goes to `bench/`, which `python -m tools.figures` writes into the documents.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core import log, parallel
from pipeline.core.host import processor
from pipeline.core.recipe import PROJECT, RECIPES, load
from pipeline.judge import metrics
from pipeline.judge.metrics import Summary
from pipeline.judge.reference import Head, Reference
from pipeline.runtime.sections import Conversation, Sections
from tools import figures, tables
from tools.bench_bundle import WORD, Work, measure_apart, medians
from tools.real_models import DEFAULT, REAL_MODELS

Logits = NDArray[np.float32]
_AT_ONCE = 8
"""Texts whose logits are on disk together: 1 GB of Gemma 3's."""


@dataclass(frozen=True, kw_only=True)
class Rival:
    """llama.cpp: its source with the bindings, the folder of its library, and the Python that runs them."""

    source: Path
    library: Path
    python: Path

    def convert(self, checkpoint: Path, model: Path, kind: str) -> None:
        """Write `checkpoint` as Q8_0, which llama.cpp's own script does, or as `kind` from that script's bfloat16."""
        outtype, made = ("q8_0", model) if kind == "Q8_0" else ("bf16", model.with_suffix(".bf16.gguf"))
        script = self.source / "vendor" / "llama.cpp" / "convert_hf_to_gguf.py"
        command = [sys.executable, str(script), str(checkpoint), "--outtype", outtype, "--outfile", str(made)]
        subprocess.run(command, check=True)  # by this Python: the script wants torch and transformers
        if made != model:
            self.run({"what": "quantize", "model": str(made), "out": str(model), "type": kind})
            made.unlink()

    def run(self, task: Mapping[str, Any]) -> dict[str, Any]:
        """Do one of `tools.llama`'s tasks in a process of its own."""
        paths = os.pathsep.join([str(PROJECT), str(self.source)])
        with tempfile.TemporaryDirectory() as scratch:
            file, result = Path(scratch) / "task.json", Path(scratch) / "result.json"
            file.write_text(json.dumps({**task, "result": str(result)}), encoding="utf-8")
            subprocess.run(
                [str(self.python), "-m", "tools.llama", str(file)],
                check=True,
                env={**os.environ, "PYTHONPATH": paths, "LLAMA_CPP_LIB_PATH": str(self.library)},
            )
            found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Texts int32 [n, T + 1], and of their first T tokens Hugging Face's hidden states float32 [n, T, H]."""

    tokens: NDArray[np.int32]
    states: NDArray[np.float32]
    head: Head

    @classmethod
    def stored(cls, root: Path, count: int | None) -> Texts:
        """Those of the golden stage below `root`, or only the first `count`."""
        golden = json.loads((root / "golden" / "manifest.json").read_text(encoding="utf-8"))
        cap = golden["facts"]["final_logit_softcapping"]
        head = Head.of_checkpoint(root / "fetch" / "checkpoint", cap)
        found = Reference(root / "golden", head).cache()
        return cls(tokens=found["texts"][:count], states=found["states"][:count], head=head)

    def summary(self, texts: Iterator[Logits]) -> Summary:
        """How close predictions are: logits [T, V] text by text."""
        scores = [
            self.head.score(logits, states, tokens[1:])
            for logits, states, tokens in zip(texts, self.states, self.tokens, strict=True)
        ]
        blocks = np.repeat(np.arange(len(self.tokens)), self.states.shape[1])
        return metrics.summarise(metrics.join(scores), blocks)


def ours(sections: Path, texts: Texts, threads: int) -> Iterator[Logits]:
    """What the sections in a folder predict, through the cache."""
    with (
        tempfile.TemporaryDirectory(dir=sections.parent) as scratch,
        log.progress("ours", texts.tokens[:, 1:].size, "tokens") as bar,
    ):
        conversation = Conversation(Sections(sections, weights=Path(scratch) / "weights", threads=threads))
        for text in texts.tokens:
            conversation.reset()
            rows = []
            for token in text[:-1]:
                rows.append(conversation.decode(int(token)))
                bar.advance()
            yield np.stack(rows)


def theirs(rival: Rival, model: Path, texts: Texts, threads: int) -> Iterator[Logits]:
    """What llama.cpp predicts of the same."""
    with tempfile.TemporaryDirectory(dir=model.parent) as scratch:
        windows, out = Path(scratch) / "windows.npy", Path(scratch) / "logits.npy"
        task = {"what": "predict", "model": str(model), "windows": str(windows), "out": str(out), "threads": threads}
        with log.progress("llama.cpp", len(texts.tokens), "texts") as bar:
            for start in range(0, len(texts.tokens), _AT_ONCE):
                np.save(windows, texts.tokens[start : start + _AT_ONCE, :-1])
                rival.run(task)
                for logits in np.load(out, mmap_mode="r"):
                    yield logits
                    bar.advance()


def in_turns(rival: Rival, model: Path, bundle: Path, work: Work, cache: int, rounds: int) -> dict[str, Any]:
    """Medians over `rounds` rounds, and the rounds; the first load of the bundle, which packs weights, comes before."""
    taken: dict[str, list[dict[str, float]]] = {"ours": [], "llama.cpp": []}
    task = {"what": "speed", "model": str(model), "context": cache, "word": WORD, **asdict(work)}
    with tempfile.TemporaryDirectory() as scratch:
        measure_apart(bundle, Path(scratch), work)
        for number in range(1, rounds + 1):
            log.step(f"round {number} of {rounds}")
            taken["ours"].append(measure_apart(bundle, Path(scratch), work))
            taken["llama.cpp"].append(rival.run(task))
    return {name: {**medians(rows), "rounds": rows} for name, rows in taken.items()}


def quality(summary: Summary) -> dict[str, Any]:
    """What the README and the issue's limits speak of."""
    found = asdict(summary)
    kept = ("positions", "blocks", "kld", "kld_p99", "kld_max", "top1", "perplexity_ratio", "rms_delta_p")
    return {name: found[name] for name in kept}


def build(rival: Rival) -> str:
    """The version of the source: what its bindings call themselves."""
    text = (rival.source / "PKG-INFO").read_text(encoding="utf-8")
    return next(line.split(": ")[1] for line in text.splitlines() if line.startswith("Version: "))


def compare(root: Path, rival: Rival, model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that was measured of the files below `root` and of `model`."""
    busy = os.getloadavg()[0]
    texts, bundle = Texts.stored(root, arguments.texts), root / "bundle" / f"{arguments.precision}.litertlm"
    cache = load(RECIPES / f"{REAL_MODELS[arguments.model].recipe}.toml").bundle.cache_length
    work = Work(prompt_tokens=128, decode_tokens=128, threads=arguments.threads)
    speed = in_turns(rival, model, bundle, work, cache, arguments.rounds)
    found = {
        "llama.cpp": texts.summary(theirs(rival, model, texts, arguments.threads)),
        "ours": texts.summary(ours(root / arguments.precision, texts, arguments.threads)),
    }
    sizes = {"ours": bundle.stat().st_size, "llama.cpp": model.stat().st_size}
    return {
        "model": arguments.model,
        "precision": arguments.precision,
        "files": {name: {"size": sizes[name], **quality(found[name]), **speed[name]} for name in ("ours", "llama.cpp")},
        **asdict(work),
        "cache": cache,
        "rounds": arguments.rounds,
        "runtime": version("litert-lm-api"),
        "bindings": build(rival),
        "cpu": processor(),
        "load_average": busy,
        "date": time.strftime("%Y-%m-%d"),
    }


def table(found: Mapping[str, Any]) -> Sequence[str]:
    """The figures as lines."""
    rows = [["", "size MB", "KLD", "top-1", "perplexity", "prefill tok/s", "decode tok/s"]]
    for name, row in found["files"].items():
        quality_ = [
            f"{row['kld']['value']:.4f}",
            f"{row['top1']['value']:.1%}",
            f"{row['perplexity_ratio']['value']:.4f}",
        ]
        rates = [f"{row['prefill_tokens_per_s']:.0f}", f"{row['decode_tokens_per_s']:.1f}"]
        rows.append([name, f"{row['size'] / 1e6:.1f}", *quality_, *rates])
    return log.align(rows)


def main() -> int:
    """Convert, measure, write the JSON, print the table; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="the model's folder below ARTIFACTS, with golden and bundle")
    parser.add_argument("--source", type=Path, required=True, help="llama-cpp-python, unpacked")
    parser.add_argument("--library", type=Path, required=True, help="the folder with libllama.so")
    parser.add_argument("--python", type=Path, required=True, help="a Python that has locks/rival.txt")
    parser.add_argument("--model", choices=[*REAL_MODELS], default=DEFAULT, help="which it is (default: %(default)s)")
    parser.add_argument("--precision", choices=[*figures.PEERS], default="int8", help="default: %(default)s")
    parser.add_argument("--texts", type=int, help="judge only so many texts (default: all of the reference)")
    parser.add_argument(
        "--threads", type=int, default=parallel.threads(), help="default: OMP_NUM_THREADS, else one per core"
    )
    parser.add_argument("--rounds", type=int, default=5, help="measurements of speed (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="the JSON file to write (default: in bench/raw/)")
    arguments = parser.parse_args()
    kind = figures.PEERS[arguments.precision]
    out = arguments.out or tables.RAW / f"{figures.rival_name(arguments.model, arguments.precision)}.json"
    rival = Rival(source=arguments.source, library=arguments.library, python=arguments.python)
    model = arguments.root / f"{kind.lower()}.gguf"
    try:
        rival.convert(arguments.root / "fetch" / "checkpoint", model, kind)
        found = compare(arguments.root, rival, model, arguments)
    except subprocess.CalledProcessError as error:
        parser.exit(1, f"{error}\nWhat it said is above.\n")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    tables.write_all(figures.rival(found))
    for line in table(found):
        log.line(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
