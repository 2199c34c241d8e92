"""Forms of checkpoints, each read here and by Hugging Face: equal logits and stop tokens, or one sentence of refusal.

`nox -s intake` runs all forms and many combinations; other runs a few of both.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import intake
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from intake import SHIPPED, Form
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from transformers import AutoConfig, Gemma3nForCausalLM

from pipeline import fetch
from pipeline.bundling import metadata
from pipeline.checkpoint import chat
from pipeline.checkpoint.reader import Checkpoint, open_checkpoint
from pipeline.checkpoint.reading import read
from pipeline.core.recipe import PROJECT
from pipeline.core.stage import DEFAULT_RECIPE, main
from pipeline.models import architecture_of, build
from pipeline.reference.model import HuggingFace

ALL = "INTAKE_DRAWS" in os.environ
DRAWS = int(os.environ.get("INTAKE_DRAWS", "4"))
FORMS = intake.one_at_a_time()
IDS = torch.tensor([[2, 40, 1001, 7, 300, 2047 - 1, 12, 88]])
LIMIT = 1e-6
"""Of the normalised mean square error of logits, the converter's gate."""


def fetched(form: Form, folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Fetch the form; the exit code and what was said."""
    capsys.readouterr()
    model = intake.write(form, folder / "given")
    code = main(
        fetch.STAGE,
        ["--model-id", str(model), "--artifacts", str(folder / "made"), "--recipe", str(PROJECT / DEFAULT_RECIPE)],
    )
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def ours(checkpoint: Checkpoint) -> np.ndarray:
    """Logits [S, V] by this project's modules and its reading of the checkpoint."""
    module = architecture_of(checkpoint).step(all_positions=True).eval()
    state = {
        name if name.startswith("lm_head.") else f"model.{name}": torch.from_numpy(checkpoint.read(stored).copy())
        for name, stored in build.tensor_names(checkpoint).items()
    }
    module.load_state_dict(state, assign=True)
    with torch.inference_mode():
        logits: np.ndarray = module(IDS.int(), torch.ones_like(IDS).int())["logits"][0].double().numpy()
    return logits


def theirs(form: Form, folder: Path) -> tuple[np.ndarray, Mapping[str, object]]:
    """The same by Hugging Face's class and its own loading, and what that found missing."""
    whole = AutoConfig.from_pretrained(folder)
    config = whole.get_text_config()
    config.tie_word_embeddings = whole.tie_word_embeddings
    for each in (whole, config):
        vars(each).pop("quantization_config", None)
    prefix = intake.PREFIXES[form.prefix]
    renamed = {f"^{prefix}": "model."}
    outer = prefix.removesuffix("model.") if form.prefix in ("peft", "compiled") else ""
    outer = {"transformers 4": "language_model.", "parallel": "module."}.get(form.prefix, outer)
    if outer:
        renamed[f"^{outer}lm_head"] = "lm_head"
    model, report = Gemma3nForCausalLM.from_pretrained(
        folder, config=config, key_mapping=renamed, dtype=torch.float32, attn_implementation="eager",
        output_loading_info=True,
    )  # fmt: skip
    with torch.inference_mode():
        logits: np.ndarray = model.eval()(IDS).logits[0].double().numpy()
    return logits, report


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """The normalised mean square error of the worst position."""
    return float((((found - expected) ** 2).sum(-1) / (expected**2).sum(-1)).max())


def judge(form: Form, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Hold one form against what is expected of it, and against Hugging Face."""
    code, said = fetched(form, folder, capsys)
    assert "unexpected" not in said and "Traceback" not in said, said
    if form.refusal:
        assert code in (3, 4) and form.refusal in said and "do: " in said, said
        assert not list(folder.glob("made/*/fetch/manifest.json"))
        return
    assert code == 0, said
    checkpoint = open_checkpoint(folder / "made" / "tiny" / "fetch" / "checkpoint")
    expected, report = theirs(form, checkpoint.folder)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    assert error(ours(checkpoint), expected) <= LIMIT
    assert checkpoint.tied == (form.head not in ("own", "one row"))
    text = read(checkpoint)
    assert text.stop == form.stops
    assert bool(text.tokenizer.chat_template) == (form.template != "none")


SOME = FORMS if ALL else FORMS[::6]


@pytest.mark.parametrize("form", SOME, ids=lambda form: form.name)
def test_a_form_is_read_as_hugging_face_reads_it_or_refused(
    form: Form, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge(form, tmp_path, capsys)


FORMS_DRAWN = st.builds(
    Form,
    prefix=st.sampled_from(list(intake.PREFIXES)),
    head=st.sampled_from(intake.HEADS),
    files=st.sampled_from(intake.FILES),
    config=st.sampled_from(intake.CONFIGS),
    template=st.sampled_from(intake.TEMPLATES),
    stop=st.sampled_from(intake.STOPS),
    extra=st.sampled_from(intake.EXTRAS),
)
"""Most draws would be refused for one thing or another: three in four keep to what can be converted."""
ACCEPTED = FORMS_DRAWN.filter(lambda form: not form.refusal)


@settings(max_examples=DRAWS, suppress_health_check=list(HealthCheck))
@given(form=st.one_of(ACCEPTED, ACCEPTED, ACCEPTED, FORMS_DRAWN))
def test_combinations_are_read_as_hugging_face_reads_them_or_refused(
    form: Form, capsys: pytest.CaptureFixture[str]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        judge(form, Path(folder), capsys)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    "form",
    [
        Form(prefix="peft", head="own", extra="buffers"),
        Form(prefix="tower", config="quantised nested", files="index names less", extra="towers"),
        Form(prefix="twice", head="alone", config="nested"),
    ],
    ids=lambda form: form.name,
)
def test_the_reference_reads_it_too(form: Form, streamed: bool, tmp_path: Path) -> None:
    model = intake.write(form, tmp_path)
    loaded = HuggingFace.load(model, "cpu", streamed=streamed)
    with torch.inference_mode():
        logits = loaded.model(IDS).logits[0].double().numpy()
    assert error(logits, ours(open_checkpoint(model))) <= LIMIT
    assert loaded.stop == form.stops


def test_the_embedding_in_place_of_a_trained_head_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    form = Form(head="own")
    model = intake.write(form, tmp_path)
    monkeypatch.setattr(Checkpoint, "tied", True)
    assert error(ours(open_checkpoint(model)), theirs(form, model)[0]) > 1e-3


def test_tokens_that_were_added_with_their_rows_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tokens more in the embedding and not in the per-layer table, as `resize_token_embeddings` leaves it."""
    plainly, rows = intake.write, len(load_file(SHIPPED / "model.safetensors")["model.embed_tokens.weight"])

    def write(form: Form, folder: Path) -> Path:
        model = plainly(form, folder)
        tensors, config = load_file(model / "model.safetensors"), json.loads((model / "config.json").read_text())
        table = tensors["model.embed_tokens.weight"]
        tensors["model.embed_tokens.weight"] = torch.cat([table, 1.5 * table[100:102]])
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        (model / "config.json").write_text(json.dumps({**config, "vocab_size": rows + 2}))
        return model

    monkeypatch.setattr(intake, "write", write)
    monkeypatch.setitem(globals(), "IDS", torch.cat([IDS, torch.tensor([[rows, rows + 1, 5]])], dim=1))
    judge(Form(), tmp_path, capsys)


def test_a_sentencepiece_model_alone_gives_the_same_ids(tmp_path: Path) -> None:
    """`tokenizer.model` without `tokenizer.json`: as transformers converts it, and so in the bundle."""
    model = intake.write(Form(), tmp_path)
    (model / "tokenizer.json").unlink()
    converted, shipped = (chat.open_tokenizer(folder) for folder in (model, SHIPPED))
    bundled = Backend.from_str(metadata.tokenizer_json(converted, 2048))
    texts = (SHIPPED / "corpus" / "verification.txt").read_text(encoding="utf-8").splitlines()
    odd = (
        "<start_of_turn>user\nHi<end_of_turn>",
        "  two \t spaces\n\n",
        "ⵣ 👩‍👩‍👧 <eos><bos>",
        "\u2581x",
        "",
        "a\u0301é",
    )
    for text in (*texts, *odd):
        expected = shipped(text)["input_ids"]
        assert converted(text)["input_ids"] == bundled.encode(text).ids == expected, text


def test_there_are_sixty_forms_and_more() -> None:
    assert len({form.name for form in FORMS}) == len(FORMS) >= 60
