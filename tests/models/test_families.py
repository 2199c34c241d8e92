"""Small random models of each family, the shipped tokenizer and template, through all stages to a verified bundle.

LiteRT-LM reads what Hugging Face reads and says what it says: ids, prompts, three turns, greedy text, scores.
"""

from __future__ import annotations

import json
from pathlib import Path

import geometry
import pytest
import speaking
import torch
from line import Line, small_recipe

from pipeline import bundle, fetch, fp32, golden, graph, verify
from pipeline.bundling import litertlm
from pipeline.checkpoint import chat
from pipeline.core import log
from pipeline.core.recipe import PROJECT
from pipeline.core.stage import DEFAULT_MODEL
from pipeline.reference.model import HuggingFace
from pipeline.runtime.litert_lm import Dialogue, LmRuntime
from pipeline.runtime.thoughts import Channel

FULL, SLIDING = geometry.FULL, geometry.SLIDING
COMMON = {"vocab_size": speaking.VOCABULARY, "num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES = {
    "gemma4": {
        **COMMON,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "layer_types": [SLIDING, FULL, SLIDING, FULL],
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "head_dim": 16,
        "global_head_dim": 32,
        "sliding_window": 16,
        "vocab_size_per_layer_input": speaking.VOCABULARY,
        "hidden_size_per_layer_input": 16,
        "final_logit_softcapping": 30.0,
    },
    "gemma4_unified": {
        **COMMON,
        "model_type": "gemma4_unified_text",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "layer_types": [SLIDING, FULL],
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "head_dim": 16,
        "global_head_dim": 32,
        "sliding_window": 16,
    },
    "qwen3": {
        **COMMON,
        "model_type": "qwen3",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "llama": {
        **COMMON,
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **geometry.SCALINGS["llama3"]},
    },
}


def checkpoint(name: str, folder: Path) -> tuple[Path, str]:
    """A model of the family in a folder of its name, and its model type."""
    make = geometry.gemma4_reference if name.startswith("gemma4") else geometry.plain_reference
    model_folder = speaking.save(make(FAMILIES[name], 7), folder / name)
    return model_folder, json.loads((model_folder / "config.json").read_text(encoding="utf-8"))["model_type"]


# Thoughts

DIALOGUES = (
    ("What is two and two?", "Two and two, so four.", "It is four."),
    ("Name a colour.", "Any colour will do.", "Blue."),
    ("Say good night.", "They go to bed.", "Good night to you."),
)
MARKS = {"gemma4": ("<|channel>thought\n", "<channel|>"), "qwen3": ("<think>\n", "\n</think>")}
TURNS = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message.role }}\n"
    "{{ message.content.split('MARK')[-1] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
"""As published templates do, it leaves out what was thought in earlier turns."""


def train(model: torch.nn.Module, rows: list[list[int]], steps: int) -> None:
    """Until it says these rows by heart."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    labels = torch.tensor([row + [-100] * (longest - len(row)) for row in rows])
    best = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(steps):
        loss = model(input_ids=ids, attention_mask=(labels != -100).long(), labels=labels).loss
        best.zero_grad()
        loss.backward()
        best.step()
    model.eval()
    assert loss < 0.1, loss


@pytest.mark.parametrize("name", MARKS)
def test_what_a_trained_model_thinks_and_answers_is_hugging_faces(name: str, tmp_path: Path) -> None:
    """Greedy text, thoughts included, told apart; and the next turn, which has none of the first's thoughts."""
    start, end = MARKS[name]
    shipped, folder = PROJECT / DEFAULT_MODEL, tmp_path / name
    tokenizer = chat.open_tokenizer(shipped)
    tokenizer.chat_template = TURNS.replace("MARK", end.strip())
    make = geometry.gemma4_reference if name == "gemma4" else geometry.plain_reference
    model = make(FAMILIES[name], 7)
    rows = []
    for asked, thought, answer in DIALOGUES:
        prompt = chat.render(tokenizer, [{"role": "user", "content": asked}], prompt=True)
        parts = (prompt, f"{start}{thought}{end}{answer}<end_of_turn>")  # apart: no token lies across
        rows.append([token for part in parts for token in tokenizer(part, add_special_tokens=False)["input_ids"]])
    train(model, rows, 250)
    geometry.save(model, folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"bos_token_id": 2, "eos_token_id": [1, 6], "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    kinds = {'model_types = ["gemma3n", "gemma3n_text"]': f'model_types = ["{config["model_type"]}"]'}
    recipe = small_recipe(
        tmp_path / "recipe.toml", **kinds, **{'precisions = ["fp32", "int8"]': 'precisions = ["fp32"]'}
    )
    line = Line(artifacts=tmp_path / "artifacts", recipe=recipe, model=folder)
    for stage in (fetch, graph, fp32, bundle):
        assert line.run(stage.STAGE, "--graphs", "bundle") == 0, stage.__name__
    made = line.root / "bundle" / "fp32.litertlm"
    channel, reference = Channel(*(litertlm.thoughts(made) or ("", ""))), HuggingFace.load(folder, "cpu")
    thoughts: list[str] = []
    for asked, thought, answer in DIALOGUES[:2]:
        with (
            LmRuntime(made, threads=1) as runtime,
            Dialogue(runtime, 48, greedy=True, thoughts=channel, aside=thoughts.append) as dialogue,
        ):
            talk = [{"role": "user", "content": asked}]
            assert "".join(dialogue.answer(asked)) == answer
            assert "".join(thoughts).strip() == thought
            thoughts.clear()
            talk += [{"role": "assistant", "content": answer}, {"role": "user", "content": DIALOGUES[2][0]}]
            second = "".join(dialogue.answer(DIALOGUES[2][0]))
            expected = greedy(reference, chat.render(tokenizer, talk, prompt=True))
            told = list(channel.split([expected]))
            assert second == "".join(text for thinking, text in told if not thinking)
            assert "".join(thoughts).strip() == "".join(text for thinking, text in told if thinking).strip()
            thoughts.clear()


def greedy(reference: HuggingFace, prompt: str) -> str:
    """What the reference says after `prompt`, without the stop token."""
    with log.progress("reference", 48, "tokens") as bar:
        return reference.continue_greedily([prompt], 48, bar)[0].text


@pytest.mark.parametrize("name", FAMILIES)
def test_a_bundle_of_each_family_says_what_hugging_face_says(name: str, tmp_path: Path) -> None:
    model, kind = checkpoint(name, tmp_path)
    kinds = {'model_types = ["gemma3n", "gemma3n_text"]': f'model_types = ["{kind}"]'}
    more = {'precisions = ["fp32", "int8"]': 'precisions = ["fp32"]', "prompts = 16": "prompts = 12"}
    recipe = small_recipe(tmp_path / "recipe.toml", **kinds, **more)
    line = Line(artifacts=tmp_path / "artifacts", recipe=recipe, model=model)
    for stage in (fetch, golden, graph, fp32, bundle, verify):
        assert line.run(stage.STAGE, "--graphs", "bundle") == 0, stage.__name__
    report = json.loads((line.root / "verify" / "report.json").read_text(encoding="utf-8"))
    found = report["bundles"]["bundle-fp32"]
    assert found["against_reference"]["nmse_max"] <= 1e-9 and found["token_ids"]["wrong"] == 0
    assert found["greedy"]["same"] + found["greedy"]["ties"] == len(found["greedy"]["rows"]) > 0
