"""From a checkpoint to files, whatever its architecture: the step graph, and the sections of the on-device bundle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from pipeline.checkpoint.layout import lay_out
from pipeline.checkpoint.reader import Checkpoint
from pipeline.core import log
from pipeline.core.manifest import Manifest
from pipeline.core.recipe import DECODER, STEP, Bundle, Graphs, StepLimits
from pipeline.export.export import Dimensions, Inputs, Signature, export
from pipeline.models import architecture_for, architecture_of, needed, sizes
from pipeline.tflite import weights
from pipeline.tflite.graph import Graph


def tensor_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Canonical → checkpoint name of every tensor of the text model."""
    family = architecture_for(checkpoint.config)
    return lay_out(checkpoint.tensors, needed(family), str(checkpoint.folder), tied=checkpoint.tied)


def export_step(checkpoint: Checkpoint, limits: StepLimits, out: Path) -> None:
    """Write the step graph, its weights still to be attached, to `out`."""
    shape = {0: ("batch", 1, limits.max_batch), 1: ("sequence", 1, limits.max_sequence)}
    inputs = {name: torch.ones((2, 128), dtype=torch.int32) for name in ("input_ids", "attention_mask")}
    with torch.device("meta"):
        module = architecture_of(checkpoint).step()
    dimensions = {name: shape for name in inputs}
    with log.waiting("exporting the step graph", _seconds(checkpoint, 1)):
        export([Signature("serving_default", module, _vectors(checkpoint), inputs, dimensions)], out)


def export_all_positions(checkpoint: Checkpoint, window: int, out: Path) -> None:
    """Write the step graph with the logits of every position, for one row of `window` tokens; weights as there."""
    inputs = {name: torch.ones((1, window), dtype=torch.int32) for name in ("input_ids", "attention_mask")}
    with torch.device("meta"):
        module = architecture_of(checkpoint).step(all_positions=True)
    with log.waiting("exporting the graph of every position", _seconds(checkpoint, 1)):
        export([Signature("serving_default", module, _vectors(checkpoint), inputs)], out)


def export_decoder(checkpoint: Checkpoint, bundle: Bundle, out: Path) -> None:
    """Write the bundle's decoder, as `export_step`: signatures `decode`, and `prefill_<n>` for the recipe's lengths.

    With a cache that grows: `decode` and `prefill`.
    """
    prefills = {f"prefill_{length}": length for length in bundle.prefill}
    lengths = {"decode": 1} | ({"prefill": max(bundle.prefill)} if bundle.grows else prefills)
    with log.waiting("exporting the decoder", _seconds(checkpoint, len(lengths))):
        export([_call(checkpoint, bundle, name, length) for name, length in lengths.items()], out)


def _seconds(checkpoint: Checkpoint, signatures: int) -> float:
    shapes = architecture_of(checkpoint).tensors()
    return sizes.export_seconds(signatures, shapes)


def _call(checkpoint: Checkpoint, bundle: Bundle, name: str, length: int) -> Signature:
    architecture = architecture_of(checkpoint, bundle)
    with torch.device("meta"):
        module = architecture.decoder(logits=name == "decode")
    inputs = {
        **architecture.decoder_inputs(length, bundle.cache_length, max(bundle.prefill)),
        "input_pos": torch.arange(length, dtype=torch.int32),
        "mask": torch.zeros(1, 1, length, bundle.cache_length),
    }
    return Signature(name, module, _vectors(checkpoint), inputs, _unknown(name, inputs, bundle) if bundle.grows else {})


def _unknown(name: str, inputs: Inputs, bundle: Bundle) -> Dimensions:
    """What is chosen at run time where the cache grows: its length, and the tokens of a prefill."""
    length, tokens = ("cache", 1, bundle.cache_length), ("tokens", 1, bundle.cache_length)
    kept = {f"kv_cache_{key}": {2 if key.startswith("k_") else 3: length} for key in inputs["kv_cache"]}
    if name == "decode":
        return {"mask": {3: length}, **kept}
    given = {key: {1: tokens} for key in inputs if key.endswith(("tokens", "embeddings"))}
    return {"mask": {2: tokens, 3: length}, "input_pos": {0: tokens}, **given, **kept}


def _vectors(checkpoint: Checkpoint) -> Callable[[str], torch.Tensor]:
    """What a graph's norms and biases are, by parameter name."""
    names = tensor_names(checkpoint)

    return lambda name: torch.from_numpy(weights.vector(checkpoint, names[name.removeprefix("model.")]).copy())


def with_weights(checkpoint: Checkpoint, file: Path) -> Graph:
    """An exported graph with the checkpoint's weights in float32, which are read when it is written."""
    graph = Graph.read(file)
    weights.attach(graph, checkpoint, tensor_names(checkpoint))
    return graph


def graph_files(made: Manifest, root: Path, graphs: Graphs) -> dict[str, Path]:
    """The files of stage graph that `graphs` need: name → where it is, below the model's `root`.

    Raises:
        IntegrityError: the stage was run for others.
    """
    wanted = {"step": (STEP,), "bundle": (DECODER,), "all": (STEP, DECODER)}[graphs]
    return {name: root / made.output(name).path for name in wanted}
