"""A written graph in LiteRT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def run(file: Path, values: np.ndarray[Any, Any], *, plain: bool = False) -> np.ndarray[Any, Any]:
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    resolver = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES if plain else OpResolverType.AUTO
    interpreter = Interpreter(model_path=str(file), experimental_op_resolver_type=resolver)
    place = interpreter.get_input_details()[0]["index"]
    interpreter.resize_tensor_input(place, values.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(place, values)
    interpreter.invoke()
    return np.array(interpreter.get_tensor(interpreter.get_output_details()[0]["index"]))
