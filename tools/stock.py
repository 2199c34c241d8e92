"""Make a `.litertlm` bundle with the stock exporter, to compare ours with, and note what making it took.

    python -m tools.stock CHECKPOINT OUT        # by a Python that has locks/stock.txt

Writes `OUT/<precision>.litertlm` and beside it `<precision>.json`: seconds, peak memory, size, settings, versions; and
`<precision>.log`: what the exporter said. It runs with its own defaults but for the flags below, in a process of its
own. It imports TensorFlow without asking for it, so the lock has that too.

It goes on without an error where it can't convert a model rightly: of Gemma 3n text checkpoints it drops the per-layer
embeddings.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tools import watched

RECIPES = {"int8": "dynamic_wi8_afp32", "fp32": "none"}
"""The exporter's name of each precision; left out it means int8."""
PACKAGES = ("litert-torch", "litert-converter", "ai-edge-quantizer", "tensorflow-cpu", "torch", "transformers")
PROGRAM = "from litert_torch.cli import main; main()"


def command(checkpoint: Path, folder: Path, settings: dict[str, Any]) -> list[str]:
    """The exporter's command line for a bundle in `folder`."""
    flags = [f"--{name}={value}" for name, value in settings.items()]
    return [sys.executable, "-c", PROGRAM, "export_hf", str(checkpoint), str(folder), *flags]


def export(checkpoint: Path, out: Path, precision: str, prefill: int, cache: int) -> dict[str, Any]:
    """Make the bundle in `out`; what it took.

    Args:
        checkpoint: a folder with safetensors, or a Hub id's download.
        out: the folder for the bundle, its log and the figures.
        precision: a key of `RECIPES`.
        prefill: tokens that one prefill call takes.
        cache: tokens that the KV cache holds.

    Raises:
        subprocess.CalledProcessError: the exporter failed; the log says why.
        FileNotFoundError: it ended well and made no bundle.
    """
    out.mkdir(parents=True, exist_ok=True)
    settings = {"prefill_lengths": [prefill], "cache_length": cache, "quantization_recipe": RECIPES[precision]}
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        took = watched.run(command(checkpoint, Path(scratch), settings), out / f"{precision}.log")
        made = next(Path(scratch).glob("*.litertlm"), None)
        if made is None:
            raise FileNotFoundError(f"the exporter made no bundle, see {out / f'{precision}.log'}")
        bundle = out / f"{precision}.litertlm"
        shutil.move(made, bundle)
    return {
        "settings": settings,
        **asdict(took),
        "size": bundle.stat().st_size,
        "versions": {name: version(name) for name in PACKAGES},
    }


def main() -> int:
    """Make the bundle, write the figures; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint folder")
    parser.add_argument("out", type=Path, help="where the bundle goes")
    parser.add_argument("--precision", choices=sorted(RECIPES), default="int8", help="default: %(default)s")
    parser.add_argument("--prefill", type=int, default=128, help="tokens of a prefill call (default: %(default)s)")
    parser.add_argument("--cache", type=int, default=4096, help="tokens the KV cache holds (default: %(default)s)")
    arguments = parser.parse_args()
    file = arguments.out / f"{arguments.precision}.json"
    try:
        figures = export(**vars(arguments))
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        print(f"{error}\nIts output is in {file.with_suffix('.log')}", file=sys.stderr)
        return 1
    file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(
        f"{file.with_suffix('.litertlm')}: {figures['size'] / 1e6:.0f} MB in {figures['seconds']:.0f} s, "
        f"{figures['peak_resident'] / 2**30:.2f} GiB resident, {figures['peak_anonymous'] / 2**30:.2f} GiB anonymous",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
