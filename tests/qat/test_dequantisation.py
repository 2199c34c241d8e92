"""Checkpoints that compressed-tensors packed: read here and by transformers, whose dequantisation is that library's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, Gemma3ForCausalLM, Gemma3TextConfig

from pipeline.checkpoint.reader import open_checkpoint
from pipeline.core.recipe import PROJECT
from pipeline.reference.model import HuggingFace

# In a folder beside the environment, which `nox -s qat` makes.
library: Any = pytest.importorskip("compressed_tensors")
VOCABULARY, WIDTH = 300, 256


@pytest.fixture(scope="module", params=[32, 128, 0])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Gemma 3 in bfloat16, its layers packed by the library; groups of 0: a scale for a row."""
    torch.manual_seed(1)
    geometry = Gemma3TextConfig(
        vocab_size=2048, hidden_size=WIDTH, intermediate_size=384, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=128, layer_types=["sliding_attention", "full_attention"], sliding_window=5,
        pad_token_id=0, bos_token_id=2, eos_token_id=1,
    )  # fmt: skip
    model = Gemma3ForCausalLM(geometry).to(torch.bfloat16)
    folder = tmp_path_factory.mktemp(f"group{request.param}")
    model.save_pretrained(folder)
    quantization = library.quantization
    strategy = {"strategy": "group", "group_size": request.param} if request.param else {"strategy": "channel"}
    weights = quantization.QuantizationArgs(num_bits=4, type="int", symmetric=True, **strategy)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    compressor = library.compressors.BaseCompressor.load_from_registry("pack-quantized")
    stored = {}
    for name, value in model.state_dict().items():
        if ".layers." not in name or value.ndim != 2:
            stored[name] = value
            continue
        peaks = value.float().reshape(len(value), -1, request.param or value.shape[1]).abs().amax(-1)
        state = {"weight": value, "weight_scale": (peaks / 7.5).to(torch.bfloat16)}
        made = compressor.compress(state, scheme)
        stored |= {name.removesuffix("weight") + part: one.contiguous() for part, one in made.items()}
    stored.pop("lm_head.weight", None)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    said = quantization.QuantizationConfig(
        config_groups={"group_0": scheme},
        format="pack-quantized",
        quantization_status="compressed",
        ignore=["lm_head"],
    )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = json.loads(said.model_dump_json())
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for file in (PROJECT / "examples" / "tiny-gemma3n").glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="module")
def theirs(packed: Path) -> Any:
    """What transformers loads, dequantised, in float32."""
    return AutoModelForCausalLM.from_pretrained(
        packed,
        dtype=torch.float32,
        attn_implementation="eager",
        quantization_config=CompressedTensorsConfig(dequantize=True),
    ).eval()


def test_every_value_is_transformers_before_it_rounds_them(packed: Path, theirs: Any) -> None:
    """transformers 5.24 multiplies integer and scale in the scale's type, bfloat16; here the product is exact."""
    checkpoint, seen = open_checkpoint(packed), 0
    for name, value in theirs.state_dict().items():
        if name in checkpoint.tensors:
            ours = torch.from_numpy(checkpoint.read(name).copy())
            assert torch.equal(ours.to(torch.bfloat16).float(), value), name
            seen += checkpoint.tensors[name].scale is not None
    assert seen == 14


@pytest.mark.parametrize("streamed", [False, True])
def test_the_reference_answers_as_transformers_does(packed: Path, theirs: Any, streamed: bool) -> None:
    ours = HuggingFace.load(packed, "cpu", streamed=streamed).model
    ids = torch.randint(3, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        found, expected = (one(input_ids=ids, use_cache=False).logits.double() for one in (ours, theirs))
    error = (found - expected).square().mean() / expected.square().mean()
    assert 0 < error <= 1e-4, error
    rounded = {name: value.to(torch.bfloat16).float() for name, value in ours.state_dict().items()}
    if not streamed:  # which has no matrices of its own
        ours.load_state_dict(rounded)
        with torch.inference_mode():
            assert torch.equal(ours(input_ids=ids, use_cache=False).logits.double(), expected)
    print(f"NMSE {float(error):.1e}")
