"""Running a graph in LiteRT, with or without the XNNPACK delegate, and timing it."""

from __future__ import annotations

import atexit
import math
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.core import parallel
from pipeline.core.errors import IntegrityError
from pipeline.runtime.interface import Array, CompiledModel, Detail, Interpreter, TensorBuffer, Value

if TYPE_CHECKING:
    from ai_edge_litert.environment import Environment

Tokens = NDArray[np.int32]
LENGTH_STEP = 8
"""Lengths are padded up to a multiple of this, so that a runtime plans its memory anew for few shapes."""

SIGNATURE = "serving_default"
INPUTS, OUTPUT = ("attention_mask", "input_ids"), "logits"
# The first run packs weights and plans memory.
_WARM_UP, _RUNS, _SECONDS = 1, 15, 0.2


class MakeInterpreter(Protocol):
    """Opens a `.tflite` file; the seam for another implementation of the interpreter, such as TensorFlow's."""

    def __call__(self, path: Path, *, xnnpack: bool, threads: int) -> Interpreter:
        """The open file."""


def litert(path: Path, *, xnnpack: bool, threads: int) -> Interpreter:
    """LiteRT's interpreter. Without XNNPACK the built-in kernels run, which share no code with it."""
    from ai_edge_litert import interpreter

    kinds = interpreter.OpResolverType
    kind = kinds.BUILTIN if xnnpack else kinds.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    opened: Interpreter = interpreter.Interpreter(
        model_path=str(path), num_threads=threads, experimental_op_resolver_type=kind
    )
    return opened


class MappedModel:
    """A file of several signatures whose weights XNNPACK repacks once, into a file, as LiteRT-LM does.

    LiteRT's interpreter, whose methods these are, would hold every signature's repacked weights in memory: of a 1 GB
    decoder 2 GB.

    Args:
        path: the `.tflite` file.
        weights: the file for the repacked weights, of this model alone.
        threads: how many threads run the kernels.

    Raises:
        IntegrityError: the file is not a model.
    """

    def __init__(self, path: Path, weights: Path, threads: int) -> None:
        from ai_edge_litert import compiled_model
        from ai_edge_litert.options import CpuOptions, Options

        cpu = CpuOptions(num_threads=threads, xnnpack_weight_cache_path=str(weights))

        def opened() -> CompiledModel:
            options, place = Options(cpu_options=cpu), _environment()
            model: CompiledModel = compiled_model.CompiledModel.from_file(str(path), environment=place, options=options)
            return model

        try:
            with _quiet():
                if not weights.is_file():
                    # For that file alone: XNNPACK's room to lay out the largest matrix, of a large model half a
                    # gigabyte, goes when the model is closed.
                    opened()
                self._model = opened()
        except RuntimeError as error:
            raise IntegrityError(f"{path} can't be loaded: {error}", file=path) from error

    def get_signature_list(self) -> dict[str, dict[str, list[str]]]:
        """Names of inputs and outputs by signature."""
        return self._model.get_signature_list()

    def get_signature_runner(self, signature: str) -> MappedRunner:
        """Runs one signature."""
        return MappedRunner(self._model, signature)

    def room(self, signature: str, name: str) -> TensorBuffer:
        """A buffer of zeros for an input; a run can write the output of this name and shape into it as well."""
        return _room(self._model, signature, name)


class MappedRunner:
    """One signature of a `MappedModel`, called with arrays or buffers by name.

    Inputs of unknown shape take that of the arrays.
    """

    def __init__(self, model: CompiledModel, signature: str) -> None:
        self._model, self._signature = model, signature
        self._inputs = model.get_input_tensor_details(signature)
        self._outputs = model.get_output_tensor_details(signature)
        self._buffers: dict[tuple[str, str], TensorBuffer] = {}

    def get_input_details(self) -> Mapping[str, Detail]:
        """Shape and type of each input."""
        return self._inputs

    def __call__(self, **inputs: Value) -> dict[str, Value]:
        """Run with `inputs`: arrays, which are copied, or buffers of `MappedModel.room`, which are read in place.

        Outputs of the names of such buffers are written into them, and given as these; the others are given as arrays.
        """
        self._resize({name: value.shape for name, value in inputs.items() if isinstance(value, np.ndarray)})
        placed = {name: value for name, value in inputs.items() if not isinstance(value, np.ndarray)}
        given = {
            name: self._filled(name, value) if isinstance(value, np.ndarray) else value
            for name, value in inputs.items()
        }
        # Written in place: LiteRT 2.3.0 knows the size of an output only after a run, and would write beyond a room for
        # the shape before.
        taken = {name: given[name] if self._shares(name) else self._buffer("output", name) for name in self._outputs}
        self._model.run_by_name(self._signature, given, taken)
        return {name: placed[name] if name in placed else self._read(name, taken[name]) for name in self._outputs}

    def _shares(self, name: str) -> bool:
        """Whether an output is written where the input of its name was: a cache, and no tensor of another rank."""
        own = self._inputs.get(name)
        return own is not None and len(own["shape"]) == len(self._outputs[name]["shape"])

    def _resize(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        changed = {name: shape for name, shape in shapes.items() if shape != tuple(self._inputs[name]["shape"])}
        if not changed:
            return
        for name, shape in changed.items():
            self._model.resize_input_tensor_by_name(self._signature, name, list(shape))
        self._buffers.clear()  # their sizes are those of the shapes before
        self._inputs = self._model.get_input_tensor_details(self._signature)

    def _buffer(self, way: Literal["input", "output"], name: str) -> TensorBuffer:
        if (way, name) not in self._buffers:
            self._buffers[way, name] = (
                _room(self._model, self._signature, name)
                if way == "input"
                else self._model.create_output_buffer_by_name(self._signature, name)
            )
        return self._buffers[way, name]

    def _filled(self, name: str, value: Array) -> TensorBuffer:
        buffer = self._buffer("input", name)
        buffer.write(value)
        return buffer

    def _read(self, name: str, buffer: TensorBuffer) -> Array:
        detail = (self._inputs if self._shares(name) else self._outputs)[name]
        values = buffer.read(math.prod(detail["shape"]), np.dtype(detail["dtype"]))
        return values.reshape(detail["shape"])


def _room(model: CompiledModel, signature: str, name: str) -> TensorBuffer:
    """A buffer of zeros for an input."""
    detail = model.get_input_tensor_details(signature)[name]
    buffer = model.create_input_buffer_by_name(signature, name)
    # A fresh buffer holds whatever was in memory, and a cache must begin as the runtime's does. The first that is
    # written makes an environment of its own, which tells of accelerators as well.
    with _quiet():
        buffer.write(np.zeros(detail["shape"], np.dtype(detail["dtype"])))
    return buffer


@cache
def _environment() -> Environment:
    """LiteRT's one environment. It tells of every accelerator that it looks for, and again of each when it ends."""
    from ai_edge_litert.environment import Environment

    nowhere = os.open(os.devnull, os.O_WRONLY)
    # At the very end of the process, when nothing of ours speaks any more.
    atexit.register(os.dup2, nowhere, 2)
    return Environment.create()


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on standard error, native code's neither."""
    with open(os.devnull, "wb") as nowhere, standard_error(nowhere.fileno()):
        yield


@contextmanager
def standard_error(target: int) -> Iterator[None]:
    """Send what native code prints to standard error to the file descriptor `target`."""
    # The descriptor and not sys.stderr, which native code does not know of.
    saved = os.dup(2)
    try:
        os.dup2(target, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


class StepModel:
    """An open step graph. Its shape is changed only when a batch has another one than the batch before.

    Args:
        path: the `.tflite` file.
        xnnpack: whether the XNNPACK delegate runs what it can.
        threads: how many threads run the kernels (default: `parallel.threads`).
        interpreter: how the file is opened.

    Raises:
        IntegrityError: the file is not a model, or its signature is not that of a step graph.
    """

    def __init__(
        self, path: Path, *, xnnpack: bool = True, threads: int | None = None, interpreter: MakeInterpreter = litert
    ) -> None:
        started = time.perf_counter()
        try:
            self._interpreter = interpreter(path, xnnpack=xnnpack, threads=threads or parallel.threads())
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise IntegrityError(f"{path} can't be loaded: {error}", file=path) from error
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
                file=path,
            )
        runner = self._interpreter.get_signature_runner(SIGNATURE)
        inputs = {name: int(detail["index"]) for name, detail in runner.get_input_details().items()}
        return inputs, int(runner.get_output_details()[OUTPUT]["index"])

    def logits(self, input_ids: Tokens, attention_mask: Tokens) -> NDArray[np.float32]:
        """Next-token logits float32 [B, V] after each row's last attended token; inputs int32 [B, S].

        Raises:
            CancelledError: in a thread whose work is given up.
        """
        parallel.check()
        # Allocation plans all memory anew, which takes longer than a short run.
        if input_ids.shape != self._shape:
            for index in self._inputs.values():
                self._interpreter.resize_tensor_input(index, list(input_ids.shape))
            self._interpreter.allocate_tensors()
            self._shape = input_ids.shape
        for name, value in (("input_ids", input_ids), ("attention_mask", attention_mask)):
            self._interpreter.set_tensor(self._inputs[name], np.ascontiguousarray(value, dtype=np.int32))
        self._interpreter.invoke()
        # A copy: the next run writes over the tensor itself.
        return self._interpreter.get_tensor(self._output)

    def continue_greedily(self, prompt: Sequence[int], count: int, stop: Sequence[int]) -> list[int]:
        """The next tokens after `prompt`, each the most likely one, up to `count` or a token in `stop` (included).

        Padded to a multiple of 8 tokens: to plan another shape takes longer than to run a short one.
        """
        tokens = list(prompt)
        while len(tokens) < len(prompt) + count:
            ids = np.zeros((1, -(-len(tokens) // LENGTH_STEP) * LENGTH_STEP), dtype=np.int32)
            ids[0, : len(tokens)] = tokens
            mask = (np.arange(ids.shape[1]) < len(tokens)).astype(np.int32)[None]
            tokens.append(int(self.logits(ids, mask)[0].argmax()))
            if tokens[-1] in stop:
                break
        return tokens[len(prompt) :]


class FixedStep:
    """A signature of fixed shape of a step graph (`[step] fixed`), open: smaller batches are padded to its shape.

    Args:
        path: the `.tflite` file.
        signature: its name.
        threads: how many threads run the kernels, which are XNNPACK's.

    Raises:
        IntegrityError: the file has no such signature.
    """

    def __init__(self, path: Path, signature: str, threads: int) -> None:
        try:
            self._run = litert(path, xnnpack=True, threads=threads).get_signature_runner(signature)
        except (ValueError, RuntimeError) as error:
            raise IntegrityError(
                f"{path} can't be run by {signature}: {error}",
                cause="it was made by another recipe than the one that names this shape",
                file=path,
            ) from error
        self._batch, self._sequence = map(int, self._run.get_input_details()["input_ids"]["shape"])

    def logits(self, input_ids: Tokens, attention_mask: Tokens) -> NDArray[np.float32]:
        """As `StepModel.logits`; any batch, sequences of at most the shape's."""
        parts = []
        for start in range(0, len(input_ids), self._batch):
            parallel.check()
            rows = slice(start, start + self._batch)
            given = {"input_ids": self._padded(input_ids[rows]), "attention_mask": self._padded(attention_mask[rows])}
            logits = self._run(**given)[OUTPUT]
            assert isinstance(logits, np.ndarray)
            parts.append(logits[: len(input_ids[rows])])
        return np.concatenate(parts)

    def _padded(self, rows: Tokens) -> Tokens:
        """`rows` with zeros behind; a row of padding is the last one again, for one without tokens has no logits."""
        filled = np.pad(rows, ((0, self._batch - len(rows)), (0, 0)), mode="edge")
        return np.pad(filled, ((0, 0), (0, self._sequence - rows.shape[1]))).astype(np.int32)


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


def measure_in_turns(paths: Sequence[Path], sequence: int, *, bos: int, rounds: int) -> list[float]:
    """Seconds of one step of one row of `sequence` tokens with each of `paths`, run in turns.

    The least of `rounds`: other work on the machine only ever adds to a time.
    """
    ids = np.full((1, sequence), bos, dtype=np.int32)
    mask, models = np.ones_like(ids), [StepModel(path) for path in paths]
    times: list[list[float]] = []
    for _ in range(_WARM_UP + rounds):
        times.append([])
        for model in models:
            started = time.perf_counter()
            model.logits(ids, mask)
            times[-1].append(time.perf_counter() - started)
    return [min(column) for column in zip(*times[_WARM_UP:], strict=True)]


def _median_seconds(model: StepModel, ids: Tokens) -> float:
    """Median of up to 15 runs after warm-up, or fewer once a fifth of a second has gone.

    A first run that takes as long is not repeated: what it does once alone is a small part of it.
    """
    mask = np.ones_like(ids)
    times: list[float] = []
    while len(times) < _WARM_UP + _RUNS and sum(times) < _SECONDS:
        started = time.perf_counter()
        model.logits(ids, mask)
        times.append(time.perf_counter() - started)
    return statistics.median(times[_WARM_UP:] or times)


def open_traced(file: Path) -> Interpreter:
    """LiteRT's interpreter of `file`, which keeps every tensor of a run.

    Inside XNNPACK's partitions no tensor can be read, so the plain kernels run.
    """
    from ai_edge_litert import interpreter

    opened: Interpreter = interpreter.Interpreter(
        model_path=str(file),
        num_threads=parallel.threads(),
        experimental_op_resolver_type=interpreter.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
        experimental_preserve_all_tensors=True,
    )
    return opened


def run(interpreter: Interpreter, ids: Tokens) -> None:
    """Run a step graph on one sample, `ids` [L], all of it attended to."""
    values = {"input_ids": ids[None], "attention_mask": np.ones_like(ids[None])}
    inputs = interpreter.get_signature_runner(SIGNATURE).get_input_details()
    for name, detail in inputs.items():
        interpreter.resize_tensor_input(detail["index"], values[name].shape)
    interpreter.allocate_tensors()
    for name, detail in inputs.items():
        interpreter.set_tensor(detail["index"], values[name])
    interpreter.invoke()
