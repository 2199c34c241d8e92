"""What is used of LiteRT's classes, which have no types of their own; TensorFlow's interpreter has the same methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypedDict

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[Any]
"""Of any element type: a tensor's is known when its file is open."""


class Detail(TypedDict):
    """A tensor; `shape_signature` is the shape with −1 where it is chosen at run time."""

    index: int
    shape: NDArray[np.int32]
    shape_signature: NDArray[np.int32]
    dtype: DTypeLike


class TensorBuffer(Protocol):
    """Values outside of Python, which a run reads and writes in place."""

    def write(self, values: Array) -> None:
        """Fill it."""

    def read(self, count: int, dtype: DTypeLike) -> Array:
        """Its first `count` values."""


Value = Array | TensorBuffer


class Runner(Protocol):
    """One signature: takes tensors by name, and gives such."""

    def __call__(self, **inputs: Value) -> dict[str, Value]:
        """Run it."""

    def get_input_details(self) -> Mapping[str, Detail]:
        """Its inputs by name."""


class Model(Protocol):
    """An open file of several signatures."""

    def get_signature_list(self) -> Mapping[str, Mapping[str, Sequence[str]]]:
        """Names of `inputs` and `outputs` by signature."""

    def get_signature_runner(self, signature: str) -> Runner:
        """What runs one of them."""


class StepRunner(Runner, Protocol):
    """As the interpreter gives it."""

    def get_output_details(self) -> Mapping[str, Detail]:
        """Its outputs by name."""


class Interpreter(Protocol):
    """`ai_edge_litert.interpreter.Interpreter`: an open file; tensors go by their index."""

    def allocate_tensors(self) -> None:
        """Plan the memory for the shapes of the inputs."""

    def resize_tensor_input(self, index: int, shape: Sequence[int]) -> None:
        """Give an input another shape."""

    def set_tensor(self, index: int, values: Array) -> None:
        """Fill an input."""

    def invoke(self) -> None:
        """Run."""

    def get_tensor(self, index: int, subgraph: int = 0) -> Array:
        """A copy of a tensor's values."""

    def get_input_details(self) -> Sequence[Detail]:
        """The inputs of the first subgraph."""

    def get_output_details(self) -> Sequence[Detail]:
        """Its outputs."""

    def get_tensor_details(self, subgraph_index: int = 0) -> Sequence[Detail]:
        """All tensors of a subgraph."""

    def get_signature_list(self) -> Mapping[str, Mapping[str, Sequence[str]]]:
        """Names of `inputs` and `outputs` by signature."""

    def get_signature_runner(self, signature: str | None = None) -> StepRunner:
        """What runs a signature; without a name, the only one."""


class CompiledModel(Protocol):
    """`ai_edge_litert.compiled_model.CompiledModel`, with its buffers."""

    def get_signature_list(self) -> dict[str, dict[str, list[str]]]:
        """Names of `inputs` and `outputs` by signature."""

    def get_input_tensor_details(self, signature: str) -> Mapping[str, Detail]:
        """A signature's inputs by name."""

    def get_output_tensor_details(self, signature: str) -> Mapping[str, Detail]:
        """Its outputs."""

    def resize_input_tensor_by_name(self, signature: str, name: str, dims: Sequence[int]) -> None:
        """Give an input whose shape is unknown another one."""

    def create_input_buffer_by_name(self, signature: str, name: str) -> TensorBuffer:
        """Room for an input."""

    def create_output_buffer_by_name(self, signature: str, name: str) -> TensorBuffer:
        """Room for an output."""

    def run_by_name(
        self, signature: str, inputs: Mapping[str, TensorBuffer], outputs: Mapping[str, TensorBuffer]
    ) -> None:
        """Run a signature on buffers."""
