"""What the bundle says of the model: template, tokens, sampler, tokenizer, as the checkpoint has them.

The tokenizer goes in as Hugging Face's own backend writes it. A SentencePiece model would load faster (0.06 s, not
1.2 s, for Gemma's 262,144 tokens; the size is the same), but gives other ids than transformers for some texts: it reads
control tokens such as `<eos>` as ordinary text and can't tell U+2581 from a space.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from litert_lm_builder.runtime.proto import llm_model_type_pb2

from pipeline.bundling import template
from pipeline.checkpoint.chat import Tokenizer, open_tokenizer, prompts_begin_with_bos
from pipeline.checkpoint.headers import listed
from pipeline.checkpoint.names import EMBEDDING
from pipeline.checkpoint.picture import open_look, open_patches
from pipeline.checkpoint.reader import open_checkpoint
from pipeline.checkpoint.reading import stop_tokens, turn_end
from pipeline.checkpoint.sound import open_front, open_front4
from pipeline.core import log
from pipeline.core.errors import BundleError
from pipeline.core.facts import Patches
from pipeline.core.graph import Towers, towers_in
from pipeline.core.recipe import Bundle
from pipeline.models import (
    Runtime,
    Tower,
    architecture_of,
    gemma3_vision,
    gemma4_audio,
    gemma4_vision,
    sections,
    tower_of,
)
from pipeline.models.gemma3n_audio import AudioConfig

_DEFAULT_TOP_K, _DEFAULT_TOP_P, _DEFAULT_TEMPERATURE = 50, 1.0, 1.0
"""What transformers samples with where generation_config.json says no more than `do_sample`."""
_NO_WORD_FOR: Mapping[str, tuple[object, ...]] = {
    **dict.fromkeys(
        ("min_p", "epsilon_cutoff", "eta_cutoff", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), (None, 0)
    ),
    **dict.fromkeys(("typical_p", "repetition_penalty", "encoder_repetition_penalty", "top_h", "num_beams"), (None, 1)),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias"), (None, [], {})),
}
"""Keys of generation_config.json that a bundle's metadata has no field for, and the values that say nothing."""

SENSES = "generic_model"
"""LiteRT-LM's type of a Gemma 3 or 3n that sees or hears: their own types do otherwise than Hugging Face."""
_PLACES = {"image": "<|image|>", "audio": "<|audio|>"}
"""Where a medium stands in a prompt of LiteRT-LM's type `gemma4`, which no field of it says."""
_NO_CALLS = (
    "It takes no tools: LiteRT-LM tells calls from text in bundles of the family's own type alone, and what it would "
    "put behind a picture or a sound there is not what the model was trained with. TOWERS=none makes one with tools."
)
_IMAGE = "<image_soft_token>"
"""A token of Gemma 3's tokenizer whose id only the models that see hold."""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How the runtime samples if nobody says otherwise; `top_k` 1 is greedy."""

    top_k: int = 1
    top_p: float = 1.0
    temperature: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Sound:
    """How a bundle hears: the texts of the tokens before and behind a sound, and `place`, its place in a prompt.

    Its encoder takes `frames` frames of `frame` samples, `rate` samples a second, each `hop` after the one before.
    """

    start: str
    end: str
    place: str
    rate: int
    frame: int
    hop: int
    frames: int

    @property
    def apart(self) -> bool:
        """Whether frames lie side by side, as LiteRT-LM's type `gemma4` has them."""
        return self.frame == self.hop


@dataclass(frozen=True, kw_only=True)
class Picture:
    """How a bundle sees: the texts of the tokens before and behind a picture, and `place`, its place in a prompt.

    Its encoder takes `size` x `size` pixels, or `patches`, and makes `tokens` soft tokens of them, or at most so many.
    If these see the `whole` picture, also what comes after them, its end is a token of the text.
    """

    start: str
    end: str
    place: str
    size: int
    tokens: int
    whole: bool = False
    patches: Patches | None = None


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """What the runtime has to know. `start` is put in front of the first prompt; `stop` token ids end an answer.

    `pad` is the token that stands for none.
    `model_type` is LiteRT-LM's name of the family: another one there means another way to treat prompts. `sections` are
    the TFLite files that the bundle has: a decoder that takes token ids looks embeddings up itself. `max_tokens` bounds
    prompt and answer together. `chat_template` is empty for a base model; `thoughts` are the texts around thoughts,
    `tools` whether it takes tools, `calls` what the runtime needs to know of their calls;
    `remarks` are for the card: what the runtime does otherwise than the checkpoint says. `activation_type` is what a
    GPU is to compute the decoder in, `fp32`, or empty: the runtime's own choice, fp16. `picture` is of one that sees,
    `sound` of one that hears.
    """

    model_type: str
    sections: tuple[str, ...]
    start: int | None
    stop: tuple[int, ...]
    max_tokens: int
    pad: int | None = None
    chat_template: str = ""
    thoughts: tuple[str, str] | None = None
    tools: bool = False
    calls: Mapping[str, str] = field(default_factory=dict)
    sampler: Sampler = Sampler()
    remarks: tuple[str, ...] = ()
    activation_type: str = ""
    picture: Picture | None = None
    sound: Sound | None = None


FLOAT16_HOLDS = 65504.0
"""The largest number in float16."""
_ROOM = 2.0
"""Times the largest activation that was seen: other text has larger ones."""


def activation_type(largest: float | None) -> str:
    """What a GPU is to compute a model in whose largest activation is known."""
    return "fp32" if largest is not None and _ROOM * largest > FLOAT16_HOLDS else ""


def describe(
    checkpoint: Path,
    tokenizer: Tokenizer,
    *,
    runtime: Callable[[str], Runtime],
    sections: tuple[str, ...],
    vocabulary: int,
    max_tokens: int,
    picture: Picture | None = None,
    sound: Sound | None = None,
) -> Metadata:
    """The metadata of a bundle.

    Args:
        checkpoint: the folder with `generation_config.json` and `config.json`.
        tokenizer: the checkpoint's, as transformers loads it.
        runtime: what the architecture says to LiteRT-LM of a model with a chat template.
        sections: the TFLite files of the bundle.
        vocabulary: how many tokens the embedding table holds.
        max_tokens: the length of the KV cache.
        picture: how it sees, if it does.
        sound: how it hears, if it does.

    Raises:
        BundleError: LiteRT-LM has no such model type, the template fails, or a token is not in the vocabulary.
    """
    source = template_source(tokenizer.chat_template)
    family = runtime(source)
    known = llm_model_type_pb2.LlmModelType.DESCRIPTOR.fields_by_name
    if family.type not in known:
        raise BundleError(f"LiteRT-LM has no model type {family.type!r}", remedy=f"use one of {', '.join(known)}")
    generation, config = (_read_json(checkpoint / name) for name in ("generation_config.json", "config.json"))
    places = {what: told.place for what, told in (("image", picture), ("audio", sound)) if told}
    # Of the types of families, which keep tool calls, Gemma 4's alone takes media just as its processors give them.
    own = (picture and picture.patches) or (sound and sound.apart)
    kind = SENSES if places and not own else family.type
    takes = family.tools and bool(re.search(r"\btools\b", source))
    tools = takes and kind == family.type
    chat = template.prepare(source, tokenizer, kind, tools=tools, places=places) if source else None
    if chat and chat.no_tools:
        tools = False
        log.warn(f"the bundle takes no tools, which its template would render otherwise: {chat.no_tools}")
    begins = chat.starts_with_bos if chat else prompts_begin_with_bos(tokenizer)
    stop = {*stop_tokens(generation, config, tokenizer)}
    if chat and not set(tokenizer(ending := turn_end(tokenizer), add_special_tokens=False)["input_ids"]) & stop:
        log.warn(f"an answer ends with {ending!r} in the chat template, which is no token: only eos ends one")
    if tools and family.response and (token := tokenizer.backend_tokenizer.token_to_id(family.response)) is not None:
        stop.add(token)
    _check_tokens(stop, "stop token", vocabulary)
    if chat:
        _check_tokens(_prompt_tokens(source, tokenizer), "token of the chat template", vocabulary)
    return Metadata(
        model_type=kind,
        sections=sections,
        start=tokenizer.bos_token_id if begins else None,
        stop=tuple(sorted(stop)),
        max_tokens=max_tokens,
        pad=pad if (pad := tokenizer.pad_token_id) is not None and pad < vocabulary else None,
        chat_template=chat.source if chat else "",
        thoughts=family.thoughts if family.thoughts and family.thoughts[1].strip() in source else None,
        tools=tools,
        calls=family.calls if tools else {},
        sampler=_sampler(generation, vocabulary),
        remarks=(*_remarks(generation, chat), *([_NO_CALLS] if takes and kind != family.type else [])),
        picture=picture,
        sound=sound,
    )


@dataclass(frozen=True, kw_only=True)
class Described:
    """A checkpoint's metadata, the tokenizer that it was made from, and how many tokens the model has."""

    metadata: Metadata
    tokenizer: Tokenizer
    vocabulary: int


def of_checkpoint(folder: Path, bundle: Bundle, towers: Towers = "none") -> Described:
    """What a bundle of the checkpoint in `folder` with these `towers` says of it; raises as `describe`."""
    checkpoint = open_checkpoint(folder)
    architecture = architecture_of(checkpoint, bundle)
    taken = {name: tower_of(architecture, name) for name in towers_in(towers)}
    vocabulary = architecture.tensors()[EMBEDDING][0]
    tokenizer = open_tokenizer(folder)
    made = describe(
        folder,
        tokenizer,
        runtime=architecture.runtime,
        sections=(*sections(architecture), *(name for tower in taken.values() for name in tower.sections)),
        vocabulary=vocabulary,
        max_tokens=bundle.max_tokens,
        picture=_picture(taken["vision"], folder, tokenizer) if "vision" in taken else None,
        sound=_sound(taken["audio"], checkpoint.folder, tokenizer) if "audio" in taken else None,
    )
    if made.picture and made.picture.whole:
        said = _in_one_call(made.picture, bundle.prefill, _alone(made.picture, tokenizer))
        made = replace(made, remarks=(*made.remarks, said))
    return Described(metadata=made, tokenizer=tokenizer, vocabulary=vocabulary)


def _alone(picture: Picture, tokenizer: Tokenizer) -> int:
    """The tokens of a prompt that begins a chat with a picture and says nothing."""
    content = [{"type": "image"}, {"type": "text", "text": ""}]
    talk = [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    text = text.replace(picture.place, f"\n\n{picture.start}{picture.end}\n\n")
    return picture.tokens + len(tokenizer.encode(text, add_special_tokens=False))


def _in_one_call(picture: Picture, prefill: tuple[int, ...], alone: int) -> str:
    """What is to be said of pictures that have to see themselves whole, where calls take `prefill` tokens.

    Args:
        picture: how it sees.
        prefill: `bundle.prefill` of the recipe.
        alone: tokens of a prompt that has a picture and no question.

    Raises:
        BundleError: a picture would be read in several calls, in each of which it sees a part of itself.
    """
    if len(prefill) > 1 or prefill[0] < alone:
        raise BundleError(
            f"pictures of {picture.tokens} soft tokens, which have to see each other, would be read in several calls",
            cause=f"`bundle.prefill` is {[*prefill]}, a picture without a question is a prompt of {alone} tokens, and "
            "LiteRT-LM reads one by the longest prefill that it fills",
            remedy=f"say prefill = [{1 << alone.bit_length()}] there",
        )
    return (
        f"LiteRT-LM reads a prompt by {prefill[0]} tokens; a picture that lies across two such parts, as a second one "
        "in a message may, does not see itself whole there, as it does in transformers."
    )


def _sound(tower: Tower, checkpoint: Path, tokenizer: Tokenizer) -> Sound:
    config = tower.config
    assert isinstance(config, AudioConfig | gemma4_audio.AudioConfig)
    own = isinstance(config, gemma4_audio.AudioConfig)
    front = open_front4(checkpoint) if own else open_front(checkpoint)
    start, end, place = _texts(tokenizer, boa=config.boa_token_id, eoa=config.eoa_token_id, audio=config.audio_token_id)
    if own:
        _check_place("audio", place)
    return Sound(
        start=start, end=end, place=place, rate=front.rate, frame=front.frame, hop=front.hop, frames=config.frames
    )


def _check_place(kind: str, place: str) -> None:
    """Raises BundleError where a medium's place is not called as type `gemma4` has it."""
    if place != _PLACES[kind]:
        raise BundleError(
            f"the tokenizer calls the place of {'a picture' if kind == 'image' else 'a sound'} {place}, and LiteRT-LM "
            f"looks for {_PLACES[kind]} alone",
            cause="the tokenizer was changed",
            remedy="put the base model's tokenizer into the checkpoint, or say TOWERS=none",
        )


def _picture(tower: Tower, checkpoint: Path, tokenizer: Tokenizer) -> Picture:
    config = tower.config
    assert not isinstance(config, AudioConfig | gemma4_audio.AudioConfig)
    start, end = _texts(tokenizer, boi=config.boi_token_id, eoi=config.eoi_token_id)
    if isinstance(config, gemma4_vision.VisionConfig):
        config.check(patches := open_patches(checkpoint))
        (place,) = _texts(tokenizer, image=config.image_token_id)
        _check_place("image", place)
        return Picture(start=start, end=end, place=place, size=0, tokens=patches.tokens, patches=patches)
    config.check((look := open_look(checkpoint)).size)
    whole = isinstance(config, gemma3_vision.VisionConfig)
    # Gemma 3's template has what begins a picture in its place, and its processor puts the rest there.
    place = start if whole else _texts(tokenizer, image=config.image_token_id)[0]
    return Picture(start=start, end=end, place=place, size=look.size, tokens=config.soft_tokens, whole=whole)


def _texts(tokenizer: Tokenizer, **tokens: int) -> list[str]:
    """The texts of tokens, by their names in config.json."""
    texts = [tokenizer.backend_tokenizer.id_to_token(token) for token in tokens.values()]
    if None in texts:
        named = ", ".join(f"{name}_token_id" for name in tokens)
        raise BundleError(
            f"the tokenizer lacks a token that config.json has for a tower ({named})",
            cause="it is the text model's",
            remedy="put the tokenizer of the whole model into the checkpoint, or say TOWERS=none",
        )
    return [*map(str, texts)]


def _read_json(file: Path) -> Mapping[str, object]:
    """The object in `file`; empty if there is no such file."""
    try:
        table = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if not isinstance(table, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise BundleError(f"{file} is not JSON: {error}", remedy="get the checkpoint anew") from error
    return table


def template_source(templates: str | Mapping[str, str] | None) -> str:
    """The template that `apply_chat_template` takes by default; some checkpoints have several, by name."""
    if isinstance(templates, Mapping):
        return str(templates.get("default", ""))
    return str(templates or "")


def _prompt_tokens(source: str, tokenizer: Tokenizer) -> set[int]:
    """The tokens of a rendered conversation."""
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi"}]
    text = tokenizer.apply_chat_template(talk, chat_template=source, tokenize=False, add_generation_prompt=True)
    return set(tokenizer(text, add_special_tokens=False)["input_ids"])


def _check_tokens(ids: set[int], what: str, vocabulary: int) -> None:
    outside = sorted(token for token in ids if not 0 <= token < vocabulary)
    if outside:
        raise BundleError(
            f"{what} {outside[0]} is not in the model's vocabulary of {vocabulary} tokens",
            cause="tokenizer or generation_config.json belong to another model, or got tokens that the model did not",
            remedy="save tokenizer and generation config from the model that was trained, with its embedding resized",
        )


def _sampler(generation: Mapping[str, object], vocabulary: int) -> Sampler:
    """What `generate` would sample with, in the runtime's words: `top_k` is at least 1, no temperature is 0."""
    # transformers decodes greedily then, whatever temperature stands beside it.
    if not generation.get("do_sample"):
        return Sampler()
    top_k = int(_number(generation, "top_k", _DEFAULT_TOP_K))
    temperature = float(_number(generation, "temperature", _DEFAULT_TEMPERATURE))
    if temperature == 0:
        return Sampler()
    top_p = float(_number(generation, "top_p", _DEFAULT_TOP_P))
    return Sampler(top_k=top_k if top_k > 0 else vocabulary, top_p=top_p, temperature=temperature)


def _number(generation: Mapping[str, object], name: str, default: float) -> float:
    value = generation.get(name)
    if value is None:
        return default
    if not isinstance(value, int | float):
        raise BundleError(f"{name} is {value!r}, expected a number", remedy="correct generation_config.json")
    return value


def _remarks(generation: Mapping[str, object], chat: template.Template | None) -> tuple[str, ...]:
    """What the runtime does otherwise than the checkpoint says, in sentences."""
    names = {
        name: generation.get(name) for name, neutral in _NO_WORD_FOR.items() if generation.get(name) not in neutral
    }
    said = ", ".join(f"{name} = {value}" for name, value in names.items())
    remarks = [f"LiteRT-LM samples without what generation_config.json says besides: {said}."] if said else []
    if chat and not chat.goes_on:
        remarks.append(
            "The chat template renders earlier messages otherwise once more follow: render the whole conversation anew "
            "for every turn (a session of its own, as `make chat` does), or ask one question at a time."
        )
    if chat and chat.no_tools:
        remarks.append("It takes no tools: LiteRT-LM would render them otherwise than the model was trained with.")
    return tuple(remarks)


def tokenizer_json(tokenizer: Tokenizer, vocabulary: int) -> str:
    """The tokenizer as `tokenizer.json` text, without added tokens that the model has no embedding for.

    Gemma 3's tokenizer has such a token, `<image_soft_token>`, whose id only the multimodal models hold.

    Raises:
        BundleError: it knows more tokens than the model, beside added ones.
    """
    backend = tokenizer.backend_tokenizer
    size = 1 + max(backend.get_vocab(with_added_tokens=False).values())
    if size > vocabulary:
        raise BundleError(
            f"the tokenizer has {size} tokens, the model's vocabulary only {vocabulary}",
            cause="the tokenizer belongs to another model",
            remedy="put the tokenizer files of this model into the checkpoint",
        )
    # Saved settings of the training: the runtime must get every token of a prompt, and no more.
    backend.no_truncation()
    backend.no_padding()
    # Cut out of the text: to parse and dump all of it would write floats of scores another way.
    text = str(backend.to_str())
    place = text.index(key := '"added_tokens":') + len(key)
    added, end = json.JSONDecoder().raw_decode(text, place)
    kept = [token for token in added if token["id"] < vocabulary]
    dropped = {token["content"] for token in added if token["id"] >= vocabulary} - {_IMAGE}
    if dropped:
        log.warn(f"the model has no embedding for tokens of its tokenizer, which read as text now: {listed(dropped)}")
    return text[:place] + json.dumps(kept, ensure_ascii=False, separators=(",", ":")) + text[end:]
