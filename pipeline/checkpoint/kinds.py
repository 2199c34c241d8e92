"""What there is instead, where files are no plain safetensors checkpoint: each kind with what makes one of it.

Trainers leave more than models: folders of checkpoints, shards of their own, pickles, other formats.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import PurePath

from pipeline.checkpoint import adapters
from pipeline.checkpoint.headers import listed
from pipeline.checkpoint.reader import CONFIG, INDEX, SINGLE
from pipeline.checkpoint.source import Source
from pipeline.core import log
from pipeline.core.errors import FetchError

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state")
_OTHERS = (".gguf", ".safetensors", ".litertlm", ".tflite", ".onnx", ".h5", ".npz")
_NUMBERS = re.compile(r"\d+")
_NO_TEXT = re.compile(r"\w+For(?!CausalLM|ConditionalGeneration)\w+")
"""Architectures with another head than one over the vocabulary."""


def check(source: Source) -> None:
    """Refuse what is no plain safetensors checkpoint, by the names of its files.

    Raises:
        FetchError: says what it is instead (checkpoints in subfolders, shards of a trainer, pickles) and what to do.
    """
    names, where = source.sizes.keys(), source.where
    if INDEX in names or SINGLE in names:
        if CONFIG not in names:
            raise FetchError(f"{where} has no {CONFIG}", cause="it is not a whole Hugging Face checkpoint")
        _check_adapter_beside(source)
        return
    if any(name.endswith(".safetensors") and "-of-" in name for name in names):
        raise FetchError(
            f"{where} has shards but no {INDEX}",
            cause="the copy is incomplete, or the tool that saved it wrote none",
            remedy="copy or upload the index too; or take the base model's, if the shards have its names",
        )
    below = tuple(source.below())
    _check_subfolders(source, below)
    _check_shards_of_trainers(where, names, below)
    pickles = [name for name in names if name.endswith(_PICKLES) and not name.startswith(_NO_WEIGHTS)]
    if pickles:
        raise FetchError(
            f"{where} has its weights as pickle files only ({listed(pickles, 3)})",
            cause="pickle files can run code when they are opened, so they are never opened here",
            remedy="in a place where that does no harm, save it again as safetensors:"
            " `AutoModelForCausalLM.from_pretrained(MODEL_ID).save_pretrained(FOLDER)`, then MODEL_ID=FOLDER",
        )
    others = [name for name in names if name.endswith(_OTHERS)]
    made_from = "give the Hugging Face checkpoint that it was made from"
    raise FetchError(
        f"{where} has neither {SINGLE} nor {INDEX}",
        cause=f"its weights are in another format ({listed(others, 3)})" if others else "it holds no model",
        remedy=made_from if others else f"give a folder with {CONFIG} and {SINGLE}, an adapter's folder, or a Hub id",
    )


def _check_adapter_beside(source: Source) -> None:
    """Refuse an adapter that was saved over its base; say of any other that the model counts.

    Unsloth and torchtune put a merged model beside its adapter.

    Raises:
        FetchError: the adapter names the model that it lies beside as its base.
    """
    if adapters.CONFIG not in source.sizes or adapters.WEIGHTS not in source.sizes:
        return
    base = str(source.json(adapters.CONFIG).get("base_model_name_or_path") or "")
    if source.is_here(base):
        raise FetchError(
            f"{source.where} holds a model and an adapter for that very model ({adapters.WEIGHTS})",
            cause="the adapter was saved into the folder of its base: the model alone would be the untrained one",
            remedy=f"move the adapter ({adapters.CONFIG}, {adapters.WEIGHTS}) to a folder of its own, then MODEL_ID= "
            "that folder BASE= this one",
        )
    log.warn(
        f"{adapters.WEIGHTS} lies beside the model: the model counts, as merged; transformers with PEFT installed "
        f"would put the adapter on {base or 'its base'} instead"
    )


def _check_subfolders(source: Source, below: Iterable[str]) -> None:
    """Refuse a folder of folders with models, naming the one that was trained longest.

    Raises:
        FetchError: it is one.
    """
    told = {SINGLE, INDEX, adapters.WEIGHTS}
    found = sorted({path.parent.name for path in map(PurePath, below) if path.name in told}, key=_steps)
    if not found:
        return
    last = found[-1]
    here = f"MODEL_ID={source.where}/{last}"
    there = f"`hf download OWNER/NAME --include '{last}/*' --local-dir FOLDER`, then MODEL_ID=FOLDER/{last}"
    raise FetchError(
        f"{source.where} holds no model itself; there is one in {'each of ' * (len(found) > 1)}{', '.join(found)}",
        cause="a training that was not ended writes no last model; other tools give each model a folder of its own",
        remedy=f"give the one you want, e.g. {there if source.remote else here}",
    )


def _steps(name: str) -> tuple[int, str]:
    """By the number of steps in a folder's name, where it has one."""
    numbers = _NUMBERS.findall(name)
    return int(numbers[-1]) if numbers else -1, name


def _check_shards_of_trainers(where: str, names: Collection[str], below: Iterable[str]) -> None:
    if "zero_to_fp32.py" in names:
        raise FetchError(
            f"{where} has its weights as DeepSpeed's shards (zero_to_fp32.py)",
            cause="each process saved its own part",
            remedy="run `python zero_to_fp32.py . . --safe_serialization` there",
        )
    shards = sorted({PurePath(path).parent.name for path in below if path.endswith(".distcp")})
    if shards:
        raise FetchError(
            f"{where} has its weights as FSDP's shards ({shards[0]})",
            cause="each process saved its own part",
            remedy=f"run `accelerate merge-weights {where}/{shards[0]} {where}`",
        )


def purpose(config: Mapping[str, object]) -> str:
    """The architecture that `config` names, if that has another head than one over the vocabulary; else empty."""
    named = config.get("architectures")
    first = str(named[0]) if isinstance(named, list) and named else ""
    return first if _NO_TEXT.fullmatch(first) else ""
