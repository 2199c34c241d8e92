"""What the sections of a bundle that sees or hears must be to each other, of which LiteRT-LM checks next to nothing.

With an adapter that is missing or of another width, or with sizes that do not fit, it gives wrong words and no error
(0.18.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.bundling.metadata import Metadata, Picture, Sound
from pipeline.core.errors import BundleError
from pipeline.tflite.graph import Graph, text

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""Tensors of a signature by name: element type and shape."""


def check(models: Mapping[str, Path], metadata: Metadata) -> None:
    """Hold the sections of towers against each other, the decoder and the metadata.

    Raises:
        BundleError: they don't fit; says where.
    """
    faults = {
        "vision": _of_eyes(models, metadata.picture) if metadata.picture else [],
        "audio": _of_ears(models, metadata.sound) if metadata.sound else [],
    }
    for tower, own in faults.items():
        if found := next(filter(None, own), ""):
            raise BundleError(
                f"the sections of the {tower} tower don't fit: {found}",
                cause="they are of another model, or of another build",
                remedy="run `make bundle` again with this MODEL_ID and TOWERS=",
            )


def _of_ears(models: Mapping[str, Path], sound: Sound) -> list[str]:
    taken, made = _ports(models["audio_encoder"])
    features, mask = _tensor(made, "features", "audio_encoder"), _tensor(made, "mask", "audio_encoder")
    rows = features[1][1] if len(features[1]) == 3 else 0
    width = _width(models["decoder"])
    faults = [
        _differs("audio_encoder takes", taken, _heard(sound)),
        "" if rows and sound.frames % rows == 0 else f"audio_encoder makes {features[1]} of {sound.frames} frames",
        _differs("audio_encoder gives", {"mask": mask}, {"mask": ("BOOL", (1, rows))}),
    ]
    taken, made = _ports(models["audio_adapter"])
    faults.append(_differs("audio_adapter takes", taken, {"features": features, "mask": mask}))
    faults.append(_differs("audio_adapter gives", made, dict.fromkeys([*made][:1], ("FLOAT32", (1, rows, width)))))
    return faults + _of_end(models["end_of_audio"], "eoa_embedding", width)


def _heard(sound: Sound) -> Shapes:
    return {
        "mask": ("BOOL", (1, 1, sound.frames)),
        "src_inputs": ("FLOAT32", (1, sound.frames, sound.frame)),
    }


def _of_eyes(models: Mapping[str, Path], picture: Picture) -> list[str]:
    width = _width(models["decoder"])
    taken, made = _ports(models["vision_encoder"])
    features = _tensor(made, "features", "vision_encoder")
    rows = features[1][1] if len(features[1]) == 3 else 0
    faults = [
        _differs("vision_encoder takes", taken, _seen(picture)),
        "" if rows == picture.tokens else f"vision_encoder makes {features[1]}, not {picture.tokens} soft tokens",
        _differs("vision_encoder tells", {"mask": made.get("mask")}, {"mask": ("BOOL", (1, rows))})
        if picture.patches
        else "",
    ]
    taken, made = _ports(models["vision_adapter"])
    faults.append(_differs("vision_adapter takes", taken, {"soft_tokens": features}))
    # The runtime makes a place of every row. Where it puts nothing behind a picture, its end is the last row.
    rows += not (picture.whole or picture.patches)
    faults.append(_differs("vision_adapter gives", made, {"mm_embedding": ("FLOAT32", (1, rows, width))}))
    return faults + (_of_end(models["end_of_vision"], "eoi_embedding", width) if picture.patches else [])


def _of_end(file: Path, name: str, width: int) -> list[str]:
    """A section that gives a vector, whatever comes."""
    taken, made = _ports(file)
    wanted = {name: ("FLOAT32", (1, 1, width))}
    return [_differs(f"{file.stem} takes", taken, {}), _differs(f"{file.stem} gives", made, wanted)]


def _seen(picture: Picture) -> Shapes:
    if not picture.patches:
        return {"images": ("FLOAT32", (1, picture.size, picture.size, 3))}
    count, width = picture.patches.count, 3 * picture.patches.size**2
    return {"images": ("FLOAT32", (1, count, width)), "positions_xy": ("INT32", (1, count, 2))}


def _ports(file: Path) -> tuple[Shapes, Shapes]:
    """Inputs and outputs of the only signature of `file`.

    Raises:
        BundleError: it has several, or none.
    """
    graph = Graph.read(file)
    signatures = graph.model.signatureDefs or []
    if len(signatures) != 1:
        raise BundleError(f"{file.name} has {len(signatures)} signatures, LiteRT-LM wants one", file=file)
    view = graph.seen_through(int(signatures[0].subgraphIndex))

    def shapes(ports: object) -> Shapes:
        return {
            text(port.name): (view.type_of(int(port.tensorIndex)), view.shape(int(port.tensorIndex)))
            for port in ports  # type: ignore[attr-defined]
        }

    return shapes(signatures[0].inputs), shapes(signatures[0].outputs)


def _tensor(found: Shapes, name: str, section: str) -> tuple[str, tuple[int, ...]]:
    if name not in found:
        raise BundleError(f"{section} gives no {name}, but {', '.join(found) or 'nothing'}")
    return found[name]


def _width(decoder: Path) -> int:
    """How wide the vectors are that the decoder takes."""
    graph = Graph.read(decoder)
    view = graph.views()[0]
    ports = {text(port.name): view.shape(int(port.tensorIndex)) for port in view.ports()}
    if "embeddings" not in ports:
        raise BundleError(
            "the decoder takes token ids, so nothing seen or heard can go into it",
            remedy="say TOWERS=none",
            file=decoder,
        )
    return ports["embeddings"][-1]


def _differs(what: str, found: Mapping[str, object], wanted: Shapes) -> str:
    return "" if dict(found) == dict(wanted) else f"{what} {dict(found)}, not {dict(wanted)}"
