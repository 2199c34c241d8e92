"""Stage bundle: what LiteRT-LM runs: sections, tokenizer, chat template and limits in one `.litertlm` per precision."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from pipeline.bundling import contents, litertlm
from pipeline.bundling.metadata import activation_type, of_checkpoint, tokenizer_json
from pipeline.core import log
from pipeline.core.facts import Bundle, Hears, Precision, Sees
from pipeline.core.graph import tower_precision
from pipeline.core.recipe import SECTION_LIMIT
from pipeline.core.stage import Context, Outcome, Stage, main
from pipeline.quantize import readback

_CPU_ALONE = (
    "The KV cache grows with the conversation, so LiteRT-LM runs this file on the CPU alone. For a phone's GPU, or a "
    'browser, make it with `cache = "static"` in the recipe.'
)


def work(context: Context) -> Outcome:
    """Write a bundle per precision of the recipe.

    The template is proven in LiteRT-LM with the stand-in, and what is written is read back: to open the bundle itself
    takes memory of the weights' size, which verify alone may.
    """
    described = of_checkpoint(context.root / "fetch" / "checkpoint", context.recipe.bundle, context.towers)
    made_int8 = context.upstream["int8"].told(Precision) if "int8" in context.upstream else None
    metadata = replace(
        described.metadata, activation_type=activation_type(made_int8.largest_activation if made_int8 else None)
    )
    tokenizer_text = tokenizer_json(described.tokenizer, described.vocabulary)
    bundles: dict[str, Bundle] = {}
    for precision in context.recipe.bundle.built:
        made, out = context.upstream[precision], context.folder / f"{precision}.litertlm"
        if not made.outputs:  # optional, and its stage has said why there is none
            continue
        sensed = _sensed(context, precision)
        text = [name for name in metadata.sections if name not in sensed]
        models = {name: context.root / made.output(f"{name}.tflite").path for name in text}
        stored, weight_bytes = readback.stored_weights(models.values())
        limit = context.recipe.bundle.section_limit
        places = litertlm.write(
            metadata, tokenizer_text, {**models, **sensed}, out, limit or SECTION_LIMIT, must=limit is not None
        )
        bundles[precision] = Bundle(
            sections=tuple(places),
            model_type=metadata.model_type,
            start_token=metadata.start,
            stop_tokens=metadata.stop,
            max_tokens=metadata.max_tokens,
            chat_template=bool(metadata.chat_template),
            top_k=metadata.sampler.top_k,
            stored=stored,
            weight_bytes=weight_bytes,
            cache_bytes=contents.cache_bytes(models["decoder"], context.recipe.bundle.cache_length),
            remarks=(*metadata.remarks, *([_CPU_ALONE] if context.recipe.bundle.grows else [])),
            hears=Hears(rate=sound.rate, frame=sound.frame, hop=sound.hop) if (sound := metadata.sound) else None,
            sees=Sees(size=picture.size, whole=picture.whole, patches=picture.patches)
            if (picture := metadata.picture)
            else None,
        )
        log.step(f"{out.name}: {log.human_bytes(out.stat().st_size)}")
    return Outcome(facts=bundles)


def _sensed(context: Context, precision: str) -> dict[str, Path]:
    """The sections of the towers in a bundle of some precision, by name."""
    towers, own = context.upstream.get("towers"), f"towers/{tower_precision(precision)}/"
    records = towers.outputs if towers else ()
    return {Path(one.path).stem: context.root / one.path for one in records if one.path.startswith(own)}


STAGE = Stage(name="bundle", summary="Pack the sections into LiteRT-LM bundles.", work=work)

if __name__ == "__main__":
    sys.exit(main(STAGE))
