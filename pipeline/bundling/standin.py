"""A bundle that says always the same, in 3 kB: LiteRT-LM with a template and no model, open in a few milliseconds.

Whether the runtime renders a template, and goes on with a conversation by it, depends on neither weights nor tokens. So
both are known here before the first section is made. The decoder takes any token for one of no meaning, answers it with
`REPLY`, and that with its stop token.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from litert_lm_builder import litertlm_builder
from litert_lm_builder.runtime.proto import llm_metadata_pb2, llm_model_type_pb2

from pipeline.runtime.litert_lm import LmRuntime
from pipeline.tflite.graph import Graph

REPLY = "Azul, a longer answer of some words."
_LENGTH = 64
"""Of the cache: a whole message is one token."""
_ANY, STOP, _REPLY = range(3)
"""Its tokens."""


@contextmanager
def opened(model_type: str) -> Iterator[LmRuntime]:
    """LiteRT-LM with such a bundle of the kind that it calls `model_type`."""
    metadata = llm_metadata_pb2.LlmMetadata(
        max_num_tokens=_LENGTH, llm_model_type=llm_model_type_pb2.LlmModelType(), jinja_prompt_template="{{ '' }}"
    )
    getattr(metadata.llm_model_type, model_type).SetInParent()
    metadata.stop_tokens.add().token_ids.ids.append(STOP)
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(scratch) / "standin.litertlm"
        write(metadata, REPLY, bundle)
        with LmRuntime(bundle, threads=1) as runtime:
            yield runtime


def write(metadata: llm_metadata_pb2.LlmMetadata, reply: str, out: Path) -> None:
    """Write such a bundle, `reply` what it always says; beside it lie its parts."""
    scratch = out.parent
    (scratch / "metadata.pb").write_bytes(metadata.SerializeToString(deterministic=True))
    words = {"type": "WordLevel", "vocab": {"<any>": _ANY, "<stop>": STOP, reply: _REPLY}, "unk_token": "<any>"}
    (scratch / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": words}), encoding="utf-8")
    _decoder().write(scratch / "model.tflite")
    builder = litertlm_builder.LitertLmFileBuilder()
    builder.add_system_metadata(
        litertlm_builder.Metadata(key="Authors", value="none", dtype=litertlm_builder.DType.STRING)
    )
    builder.add_llm_metadata(str(scratch / "metadata.pb"))
    builder.add_hf_tokenizer(str(scratch / "tokenizer.json"))
    builder.add_tflite_model(str(scratch / "model.tflite"), litertlm_builder.TfLiteModelType.PREFILL_DECODE)
    with out.open("wb") as stream:
        builder.build(stream)


def _decoder() -> Graph:
    """Two signatures. The logits of token t are 5 for the reply, 10 t for the stop token; the cache holds nothing."""
    graph = Graph.empty()
    inputs = {
        "tokens": graph.add_tensor("tokens", "INT32", (1, 1)),
        "input_pos": graph.add_tensor("input_pos", "INT32", (1,)),
        "mask": graph.add_tensor("mask", "FLOAT32", (1, 1, 1, _LENGTH)),
        "kv_cache_k_0": graph.add_tensor("k", "FLOAT32", (1, 1, _LENGTH, 1)),
        "kv_cache_v_0": graph.add_tensor("v", "FLOAT32", (1, 1, 1, _LENGTH)),
    }
    operators, caches = [], {}
    for name in ("kv_cache_k_0", "kv_cache_v_0"):
        caches[name] = graph.add_tensor(f"{name}_out", "FLOAT32", graph.shape(inputs[name]))
        operators.append(graph.operator("ADD", [inputs[name], inputs[name]], [caches[name]]))
    slopes, begins = (
        graph.add_constant(np.array([[values]], np.float32), name)
        for name, values in (("slopes", (0.0, 10.0, 0.0)), ("begins", (0.0, 0.0, 5.0)))
    )
    number = graph.add_tensor("number", "FLOAT32", (1, 1))
    scaled, logits = (graph.add_tensor(name, "FLOAT32", (1, 1, _REPLY + 1)) for name in ("scaled", "logits"))
    operators += [
        graph.operator("CAST", [inputs["tokens"]], [number]),
        graph.operator("MUL", [slopes, number], [scaled]),
        graph.operator("ADD", [scaled, begins], [logits]),
    ]
    outputs = {**caches, "logits": logits}
    graph.main.inputs, graph.main.outputs = list(inputs.values()), list(outputs.values())
    graph.main.operators = operators
    graph.add_signature("decode", inputs, outputs)
    graph.model.subgraphs.append(copy.deepcopy(graph.main))
    second = Graph(graph.model, 1)
    second.main.outputs = list(caches.values())
    second.add_signature("prefill_1", inputs, caches)
    return graph
