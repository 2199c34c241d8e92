"""Hugging Face's eyes in a process of their own: `python -m pipeline.reference.eyes CHECKPOINT OUT PICTURE…`.

Processor, vision tower and what is behind it are those of transformers (and timm), unchanged, joined by
`get_image_features` itself of `Gemma3nModel`, `Gemma3Model` or `Gemma4Model`; matrices are read as they are needed. OUT
gets, by each picture's name, its soft tokens, float32 [n, H], and of Gemma 3n behind them the vector of
`<end_of_image>`.

A process of its own, since transformers goes other ways once torchvision is there, which timm asks for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file

from pipeline.core import log
from pipeline.core.stage import guard

See = Callable[[Any], torch.Tensor]
"""From what a processor gives to what stands in a prompt, [n, H]."""


def see(checkpoint: Path, out: Path, files: Sequence[Path]) -> None:
    """Write what is seen in `files` to `out`."""
    name_operators()
    from transformers import AutoConfig
    from transformers.image_utils import load_image

    config = AutoConfig.from_pretrained(checkpoint, local_files_only=True)
    look, processor = _KINDS[config.model_type](checkpoint, config)
    seen = {}
    with torch.inference_mode(), log.progress("reference on pictures", len(files), "pictures") as bar:
        for file in files:
            seen[file.stem] = look(processor(load_image(str(file)), return_tensors="pt"))
            bar.advance()
    save_file(seen, out)


def _gemma3n(checkpoint: Path, config: Any) -> tuple[See, Any]:
    """Gemma 3n's eyes and processor."""
    from transformers import TimmWrapperModel
    from transformers.models.gemma3n.modeling_gemma3n import Gemma3nModel
    from transformers.models.siglip.image_processing_siglip import SiglipImageProcessor

    from pipeline.reference.answers import embedder

    own = embedder(checkpoint, config.vision_config, config.text_config, "embed_vision")
    tower = _tower(checkpoint, TimmWrapperModel, config)
    model: Any = SimpleNamespace(vision_tower=tower, embed_vision=own, config=config)
    with torch.inference_mode():
        end = own(input_ids=torch.tensor([[config.eoi_token_id]]))[0]

    def look(given: Any) -> torch.Tensor:
        soft = Gemma3nModel.get_image_features(model, given["pixel_values"], return_dict=True).pooler_output[0]
        return torch.cat([soft, end])

    return look, SiglipImageProcessor.from_pretrained(checkpoint, local_files_only=True)


def _gemma3(checkpoint: Path, config: Any) -> tuple[See, Any]:
    """Gemma 3's, which have no vector of a picture's end: that is a token of the text model."""
    from transformers import SiglipVisionModel
    from transformers.models.gemma3.image_processing_gemma3 import Gemma3ImageProcessor
    from transformers.models.gemma3.modeling_gemma3 import Gemma3Model, Gemma3MultiModalProjector

    from pipeline.reference import streaming
    from pipeline.reference.answers import weights

    with torch.device("meta"):
        projector = Gemma3MultiModalProjector(config)
    projector = streaming.load_part(projector, weights(checkpoint, "multi_modal_projector"))
    tower = _tower(checkpoint, SiglipVisionModel, config)
    model: Any = SimpleNamespace(vision_tower=tower, multi_modal_projector=projector, config=config)

    def look(given: Any) -> torch.Tensor:
        found = Gemma3Model.get_image_features(model, given["pixel_values"], return_dict=True)
        soft: torch.Tensor = found.pooler_output[0]
        return soft

    return look, Gemma3ImageProcessor.from_pretrained(checkpoint, local_files_only=True)


def _gemma4(checkpoint: Path, config: Any) -> tuple[See, Any]:
    """Gemma 4's, for pictures that keep their proportions."""
    from transformers.models.gemma4.image_processing_gemma4 import Gemma4ImageProcessor
    from transformers.models.gemma4.modeling_gemma4 import Gemma4Model, Gemma4MultimodalEmbedder, Gemma4VisionModel

    from pipeline.reference.answers import embedder

    own = embedder(checkpoint, config.vision_config, config.text_config, "embed_vision", Gemma4MultimodalEmbedder)
    tower = _tower(checkpoint, Gemma4VisionModel, config)
    model: Any = SimpleNamespace(vision_tower=tower, embed_vision=own, config=config)

    def look(given: Any) -> torch.Tensor:
        pixels, places = given["pixel_values"], given["image_position_ids"]
        soft: torch.Tensor = Gemma4Model.get_image_features(model, pixels, places, return_dict=True).pooler_output[0]
        return soft

    return look, Gemma4ImageProcessor.from_pretrained(checkpoint, local_files_only=True)


_KINDS: Mapping[str, Callable[[Path, Any], tuple[See, Any]]] = {
    "gemma3": _gemma3,
    "gemma3n": _gemma3n,
    "gemma4": _gemma4,
}
"""By the type of the model."""


def _tower(checkpoint: Path, kind: Any, config: Any) -> Any:
    """The vision tower, of a class of transformers, which ships no types for how it is made."""
    from pipeline.reference import streaming
    from pipeline.reference.answers import weights

    with torch.device("meta"):
        tower = kind._from_config(config.vision_config, dtype=torch.float32)
    return streaming.load_part(tower, weights(checkpoint, "vision_tower"))


def name_operators() -> None:
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
