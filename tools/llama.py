"""llama.cpp through its Python bindings: what it predicts, how fast it is, and its files in fewer bits.

    python -m tools.llama TASK.json        # by a Python that has locks/rival.txt, with the bindings on its path

`tools.rival` writes the task and reads the results; nothing of this project is needed here. LLAMA_CPP_LIB_PATH names
the folder of the library.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def opened(model: str, *, context: int, threads: int, every: bool) -> Any:
    """The model with a cache of `context` tokens; `every`: logits of all tokens and not of the last alone."""
    from llama_cpp import Llama

    return Llama(
        model, n_ctx=context, n_batch=512, n_threads=threads, n_threads_batch=threads, logits_all=every, verbose=False
    )


def predict(task: Mapping[str, Any]) -> dict[str, Any]:
    """Write float32 logits [n, T, V] to `out` of the token windows int32 [n, T] in `windows`, each read at once."""
    windows = np.load(task["windows"])
    model = opened(task["model"], context=windows.shape[1], threads=task["threads"], every=True)
    shape = (*windows.shape, model.n_vocab())
    out = np.lib.format.open_memmap(task["out"], mode="w+", dtype=np.float32, shape=shape)
    for place, window in enumerate(windows):
        model.reset()
        model.eval(window.tolist())
        out[place] = model.scores
    out.flush()
    return {"positions": int(windows.size)}


def quantize(task: Mapping[str, Any]) -> dict[str, Any]:
    """Write the model in `model` to `out` with weights of llama.cpp's `type`, by its defaults.

    Raises:
        RuntimeError: llama.cpp says that it failed.
    """
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{task['type']}")
    failed = llama_cpp.llama_model_quantize(task["model"].encode(), task["out"].encode(), ctypes.byref(settings))
    if failed:
        raise RuntimeError(f"llama.cpp made no {task['type']} of {task['model']}: {failed}")
    return {}


def words(tokenize: Callable[[bytes], list[int]], word: str, count: int) -> list[int]:
    """`count` tokens: the start token, if the model has one, and `word` again and again.

    Raises:
        RuntimeError: the word is not one token.
    """
    prompt = tokenize((word * (count - len(tokenize(b"")))).encode())
    if len(prompt) != count:
        raise RuntimeError(f"the prompt is {len(prompt)} tokens, not {count}")
    return prompt


def speed(task: Mapping[str, Any]) -> dict[str, Any]:
    """Read `prompt_tokens` at once, then decode `decode_tokens` greedily; tokens per second, seconds."""
    started = time.perf_counter()
    model = opened(task["model"], context=task["context"], threads=task["threads"], every=False)
    loaded = time.perf_counter()
    prompt = words(model.tokenize, task["word"], task["prompt_tokens"])
    began = time.perf_counter()
    model.eval(prompt)
    token = int(_last(model).argmax())
    read = time.perf_counter()
    for _ in range(task["decode_tokens"]):
        model.eval([token])
        token = int(_last(model).argmax())
    ended = time.perf_counter()
    return {
        "load_s": loaded - started,
        "first_token_s": read - began,
        "prefill_tokens_per_s": task["prompt_tokens"] / (read - began),
        "decode_tokens_per_s": task["decode_tokens"] / (ended - read),
    }


def _last(model: Any) -> NDArray[np.float32]:
    """The logits [V] of the last token; the bindings keep them only where every token's are asked for."""
    import llama_cpp

    row = llama_cpp.llama_get_logits_ith(model.ctx, -1)
    return np.ctypeslib.as_array(ctypes.cast(row, ctypes.POINTER(ctypes.c_float)), shape=(model.n_vocab(),))


def main(file: Path) -> None:
    """Do the task in `file` and write beside it, as `result`, what came of it."""
    task = json.loads(file.read_text(encoding="utf-8"))
    found = {"predict": predict, "quantize": quantize, "speed": speed}[task["what"]](task)
    Path(task["result"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
