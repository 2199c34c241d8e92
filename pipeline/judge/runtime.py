"""Running a step graph in LiteRT, with or without the XNNPACK delegate, and timing it."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import IntegrityError
from pipeline.judge.corpus import Tokens

SIGNATURE = "serving_default"
INPUTS, OUTPUT = ("attention_mask", "input_ids"), "logits"
_WARM_UP, _RUNS, _SECONDS = 1, 15, 1.0


class MakeInterpreter(Protocol):
    """Opens a `.tflite` file; the seam for another implementation of the interpreter, such as TensorFlow's."""

    def __call__(self, path: Path, *, xnnpack: bool, threads: int) -> Any:
        """An object with the methods of `ai_edge_litert.interpreter.Interpreter`."""


def litert(path: Path, *, xnnpack: bool, threads: int) -> Any:
    """LiteRT's interpreter. Without XNNPACK the built-in kernels run, which share no code with it."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    kind = OpResolverType.BUILTIN if xnnpack else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    return Interpreter(model_path=str(path), num_threads=threads, experimental_op_resolver_type=kind)


def default_threads() -> int:
    """The processors that this process may use, at most 8."""
    return min(8, len(os.sched_getaffinity(0)))


def processor() -> str:
    """The processor's name, from the kernel."""
    file = Path("/proc/cpuinfo")
    rows = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    names = [row.partition(":")[2].strip() for row in rows if row.startswith("model name")]
    return names[0] if names else platform.machine()


class StepModel:
    """An open step graph. Its shape is changed only when a batch has another one than the batch before.

    Args:
        path: the `.tflite` file.
        xnnpack: whether the XNNPACK delegate runs what it can.
        threads: how many threads run the kernels.
        interpreter: how the file is opened.

    Raises:
        IntegrityError: the file is not a model, or its signature is not that of a step graph.
    """

    def __init__(
        self, path: Path, *, xnnpack: bool = True, threads: int | None = None, interpreter: MakeInterpreter = litert
    ) -> None:
        started = time.perf_counter()
        try:
            self._interpreter = interpreter(path, xnnpack=xnnpack, threads=threads or default_threads())
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise IntegrityError(
                f"{path} can't be loaded: {error}", remedy="remove its folder and run make again"
            ) from error
        self.load_seconds = time.perf_counter() - started
        self._inputs, self._output = self._bind(path)
        self._shape: tuple[int, ...] = ()

    def _bind(self, path: Path) -> tuple[dict[str, int], int]:
        """Tensor indices of the inputs and the output."""
        signatures = self._interpreter.get_signature_list()
        found = signatures.get(SIGNATURE, {"inputs": [], "outputs": []})
        if tuple(sorted(found["inputs"])) != INPUTS or list(found["outputs"]) != [OUTPUT]:
            raise IntegrityError(
                f"{path} is not a step graph: its signatures are {signatures}",
                cause=f"expected {SIGNATURE} with inputs {' and '.join(INPUTS)} and output {OUTPUT}",
                remedy="remove its folder and run make again",
            )
        runner = self._interpreter.get_signature_runner(SIGNATURE)
        inputs = {name: int(detail["index"]) for name, detail in runner.get_input_details().items()}
        return inputs, int(runner.get_output_details()[OUTPUT]["index"])

    def logits(self, input_ids: Tokens, attention_mask: Tokens) -> NDArray[np.float32]:
        """Next-token logits float32 [B, V] after each row's last attended token; inputs int32 [B, S]."""
        if input_ids.shape != self._shape:
            for index in self._inputs.values():
                self._interpreter.resize_tensor_input(index, list(input_ids.shape))
            self._interpreter.allocate_tensors()
            self._shape = input_ids.shape
        for name, value in (("input_ids", input_ids), ("attention_mask", attention_mask)):
            self._interpreter.set_tensor(self._inputs[name], np.ascontiguousarray(value, dtype=np.int32))
        self._interpreter.invoke()
        logits: NDArray[np.float32] = self._interpreter.get_tensor(self._output)
        return logits

    def continue_greedily(self, prompt: Sequence[int], count: int, stop: Sequence[int]) -> list[int]:
        """The next tokens after `prompt`, each the most likely one, up to `count` or a token in `stop` (included)."""
        tokens = list(prompt)
        while len(tokens) < len(prompt) + count:
            ids = np.array([tokens], dtype=np.int32)
            tokens.append(int(self.logits(ids, np.ones_like(ids))[0].argmax()))
            if tokens[-1] in stop:
                break
        return tokens[len(prompt) :]


@dataclass(frozen=True)
class Speed:
    """Median seconds to load a file that is in the page cache, and of one step of one row by sequence length."""

    load: float
    latency: dict[int, float]


def measure_speed(
    path: Path, sequences: Sequence[int], *, bos: int, xnnpack: bool, threads: int | None = None
) -> Speed:
    """Time `path` at batch 1 for each of `sequences` (in tokens), after warm-up at each."""
    models = [StepModel(path, xnnpack=xnnpack, threads=threads) for _ in range(3)]
    latency = {}
    for sequence in sequences:
        ids = np.full((1, sequence), bos, dtype=np.int32)
        latency[sequence] = _median_seconds(models[-1], ids)
    return Speed(load=statistics.median(model.load_seconds for model in models), latency=latency)


def _median_seconds(model: StepModel, ids: Tokens) -> float:
    """Median of up to 15 runs after warm-up, or fewer once a second has gone; never fewer than three."""
    mask = np.ones_like(ids)
    times: list[float] = []
    for _ in range(_WARM_UP):
        model.logits(ids, mask)
    while len(times) < _RUNS and (len(times) < 3 or sum(times) < _SECONDS):
        started = time.perf_counter()
        model.logits(ids, mask)
        times.append(time.perf_counter() - started)
    return statistics.median(times)
