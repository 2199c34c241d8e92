"""Hugging Face's eyes in a process of their own: `python -m pipeline.reference.eyes CHECKPOINT OUT PICTURE…`.

Processor, vision tower and embedder are those of transformers and timm, unchanged, joined by
`Gemma3nModel.get_image_features` itself; matrices are read as they are needed. OUT gets, by each picture's name, its
soft tokens and behind them the vector of `<end_of_image>`, float32 [257, H].

A process of its own, since transformers goes other ways once torchvision is there, which timm asks for.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pipeline.core import log
from pipeline.core.stage import guard


@dataclass(frozen=True)
class _Model:
    """What `get_image_features` asks for of its model."""

    vision_tower: Any
    embed_vision: Any
    config: Any


def see(checkpoint: Path, out: Path, files: Sequence[Path]) -> None:
    """Write what is seen in `files` to `out`."""
    _name_operators()
    from transformers import AutoConfig, TimmWrapperModel
    from transformers.image_utils import load_image
    from transformers.models.gemma3n.modeling_gemma3n import Gemma3nModel
    from transformers.models.siglip.image_processing_siglip import SiglipImageProcessor

    from pipeline.reference import streaming
    from pipeline.reference.answers import embedder, weights

    config = AutoConfig.from_pretrained(checkpoint, local_files_only=True)
    with torch.device("meta"):
        kind: Any = TimmWrapperModel  # transformers ships no types for how it is made
        tower = kind._from_config(config.vision_config, dtype=torch.float32)
    tower = streaming.load_part(tower, weights(checkpoint, "vision_tower"))
    own = embedder(checkpoint, config.vision_config, config.text_config, "embed_vision")
    model: Any = _Model(vision_tower=tower, embed_vision=own, config=config)
    processor = SiglipImageProcessor.from_pretrained(checkpoint, local_files_only=True)
    seen = {}
    with torch.inference_mode(), log.progress("reference on pictures", len(files), "pictures") as bar:
        end = own(input_ids=torch.tensor([[config.eoi_token_id]]))[0]
        for file in files:
            pixels = processor(load_image(str(file)), return_tensors="pt")["pixel_values"]
            soft = Gemma3nModel.get_image_features(model, pixels, return_dict=True).pooler_output[0]
            seen[file.stem] = torch.cat([soft, end])
            bar.advance()
    save_file(seen, out)


def _name_operators() -> None:
    """Name the operators of torchvision that it describes when it is imported.

    PyPI has it for CUDA alone (0.28.0): beside torch's CPU build its own don't load, and nothing here calls them.
    """
    if torch.version.cuda:
        return
    library: Any = torch.library.Library  # torch ships no types for it
    _KEPT.append(library("torchvision", "DEF"))
    for name in ("nms", "qnms"):
        _KEPT[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_KEPT: list[Any] = []
"""The names go with what named them."""


if __name__ == "__main__":
    checkpoint, out, *files = map(Path, sys.argv[1:])
    sys.exit(guard(lambda: see(checkpoint, out, files)))
