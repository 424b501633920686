"""A recipe: everything that decides what comes out of training, read from one TOML file into plain frozen values.

Trains nothing and builds nothing. Called by the command, which hands a recipe to the stages.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec

from service.errors import StartupError, WeightsError
from service.model.config import LayerAttention, ModelConfig
from service.model.vq import VQConfig
from training.language import LanguageSettings
from training.loop import Precision, Schedule
from training.picture.stage import PictureSettings
from training.tokens import BOS_ID, EOS_ID, picture_ids
from training.world.tasks import TASK_NAMES

MEMORY_SOURCES = ("emoji_draw", "emoji_read", "emoji_pictures")
WORLD_SOURCES = (*(f"world_{name}" for name in TASK_NAMES), "world_pictures", "world_films")
SOURCES = ("text", *MEMORY_SOURCES, *WORLD_SOURCES)
"""What a mix may be made of."""
FILM_FRAMES = 5
"""Of a motion: the first, which is given, and four that follow."""
RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True, slots=True)
class DataRecipe:
    """size: pixels of a picture's side, a multiple of the world's 32. styles: of emoji, that the image tokenizer learns; memory_styles:
    those of them in which memory_count emoji are drawn and named. texts: sources of plain text. has_stamps: may scenes hold small emoji?
    num_watched: held-out pictures, documents of a kind and texts that the logs watch."""

    size: int = 32
    styles: tuple[str, ...] = ()
    memory_styles: tuple[str, ...] = ()
    memory_count: int = 0
    texts: tuple[str, ...] = ()
    has_stamps: bool = False
    num_watched: int = 200


@dataclass(frozen=True, slots=True)
class TokenizerRecipe:
    """scene_share: of the pictures of a batch; recoloured_share: of the scenes, whose red, green and blue change places."""

    reconstruction: Schedule
    adversarial: Schedule
    model: VQConfig = field(default_factory=VQConfig)
    settings: PictureSettings = field(default_factory=PictureSettings)
    scene_share: float = 0.5
    recoloured_share: float = 0.0


@dataclass(frozen=True, slots=True)
class DecoderRecipe:
    """Every global_every-th layer sees everything, the last one too; the others see `sink` tokens at the head, `window` behind, and of
    their own picture only the codes within `radius` (rows, columns). source: the checkpoint of a text model that it begins as, by what the
    catalog calls it or where it lies; every size must be that one's. Empty for weights that know nothing."""

    text_vocab_size: int
    width: int
    feed_forward_width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    global_every: int
    window: int
    sink: int
    radius: tuple[int, int]
    max_context: int = 512
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5
    has_qk_norm: bool = True
    source: str = ""


@dataclass(frozen=True, slots=True)
class LaterMix:
    """What takes the mix's place from a step on."""

    step: int
    mix: dict[str, float]


@dataclass(frozen=True, slots=True)
class LanguageRecipe:
    """mix: the share of documents that each source gives. later: other mixes, by the step from which they hold."""

    mix: dict[str, float]
    schedule: Schedule
    settings: LanguageSettings = field(default_factory=LanguageSettings)
    later: tuple[LaterMix, ...] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        """Of all mixes."""
        return tuple(dict.fromkeys(name for mix in (self.mix, *(each.mix for each in self.later)) for name in mix))


@dataclass(frozen=True, slots=True)
class Recipe:
    """precision: of the stages whose settings name none. ranks: 0 for as many as the machine wants."""

    name: str
    summary: str
    data: DataRecipe
    tokenizer: TokenizerRecipe
    decoder: DecoderRecipe
    pretrain: LanguageRecipe
    multitask: LanguageRecipe
    precision: Precision = "auto"
    seed: int = 0
    ranks: int = 0

    def model_config(self) -> ModelConfig:
        """The decoder's. Raises: WeightsError for numbers that make no model."""
        own, codes = self.decoder, self.tokenizer.model
        side = self.data.size // codes.patch
        plain = LayerAttention(rope_base=own.rope_base)
        local = replace(plain, window=own.window, sink=own.sink, radius=own.radius)
        layers = tuple(plain if (index + 1) % own.global_every == 0 else local for index in range(own.num_layers))
        return ModelConfig(
            vocab_size=own.text_vocab_size + codes.num_codes,
            width=own.width,
            feed_forward_width=own.feed_forward_width,
            num_heads=own.num_heads,
            num_kv_heads=own.num_kv_heads,
            head_width=own.head_width,
            layers=layers,
            max_context=own.max_context,
            norm_eps=own.norm_eps,
            has_tied_head=True,
            has_qk_norm=own.has_qk_norm,
            eos_ids=(EOS_ID,),
            bos_id=BOS_ID,
            pictures=picture_ids(own.text_vocab_size, codes.num_codes, side, side),
        )


def recipe_names() -> list[str]:
    """Of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def read_recipe(name: str) -> Recipe:
    """The recipe of a name that comes with the package, or of a path to a TOML file.

    Raises: StartupError when there is none, or naming the key that is unknown, missing or of the wrong kind.
    """
    path = RECIPES / f"{name}.toml" if name in recipe_names() else Path(name)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise StartupError(f"there is no recipe {name!r}: name one of {', '.join(recipe_names())}, or a TOML file") from None
    except ValueError as error:
        raise StartupError(f"the recipe {path.name} is no TOML: {error}") from error
    try:
        recipe = parse_recipe(values)
    except (WeightsError, ValueError) as error:
        raise StartupError(f"the recipe {path.name}: {getattr(error, 'message', None) or error}") from error
    return recipe


def parse_recipe(values: Mapping[str, Any]) -> Recipe:
    """Raises: ValueError naming the key that is unknown, missing or of the wrong kind; WeightsError for a model that can't be."""
    if unknown := list(_unknown(Recipe, values, "")):
        raise ValueError(f"nothing is called {', '.join(unknown)}")
    try:
        recipe = msgspec.convert(_with_precision(values), Recipe)
    except msgspec.ValidationError as error:
        raise ValueError(str(error).replace("$.", "")) from error
    _check(recipe)
    return recipe


def _unknown(kind: type, values: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """Keys that the dataclass has no field for, here and in the sections below, as they are written."""
    known = _hints(kind)
    for key, value in values.items():
        if key not in known:
            yield f"{prefix}{key}"
        inner = known.get(key)
        if is_dataclass(inner) and isinstance(inner, type) and isinstance(value, Mapping):
            yield from _unknown(inner, value, f"{prefix}{key}.")
        for part in get_args(inner):  # of a tuple of sections
            for each in value if is_dataclass(part) and isinstance(part, type) and isinstance(value, list) else ():
                yield from _unknown(part, each, f"{prefix}{key}.")


@cache
def _hints(kind: type) -> dict[str, Any]:
    types = get_type_hints(kind)
    return {each.name: types[each.name] for each in fields(kind)}


def _with_precision(values: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's precision written into every stage's settings that have none of their own."""
    whole = dict(values)
    for stage in ("tokenizer", "pretrain", "multitask"):
        section = whole.get(stage)
        if isinstance(section, Mapping) and isinstance(section.get("settings", {}), Mapping):
            settings = {"precision": whole.get("precision", "auto"), **section.get("settings", {})}
            whole[stage] = {**section, "settings": settings}
    return whole


def _check(recipe: Recipe) -> None:
    """What types can't say. Raises: ValueError naming the key."""
    data, codes, decoder = recipe.data, recipe.tokenizer.model, recipe.decoder
    if data.size <= 0 or data.size % 32:
        raise ValueError(f"data.size is {data.size}; it must be a multiple of 32, the side of the world's pictures")
    if strange := set(data.memory_styles) - set(data.styles):
        raise ValueError(f"data.memory_styles has {', '.join(sorted(strange))}, which data.styles has not")
    if data.size % codes.patch:
        raise ValueError(f"data.size {data.size} is no multiple of the {codes.patch} pixels that a code stands for")
    film = FILM_FRAMES * ((data.size // codes.patch) ** 2 + 1)
    if decoder.max_context <= film:
        raise ValueError(f"decoder.max_context is {decoder.max_context}; a film of {FILM_FRAMES} frames alone has {film} ids")
    if decoder.global_every < 1 or decoder.num_layers % decoder.global_every:
        raise ValueError(f"decoder.num_layers {decoder.num_layers} is no multiple of decoder.global_every {decoder.global_every}")
    for name in ("pretrain", "multitask"):
        own: LanguageRecipe = getattr(recipe, name)
        _check_mix(f"{name}.mix", own.mix, data)
        for each in own.later:
            _check_mix(f"{name}.later.mix", each.mix, data)
        if sorted(steps := [each.step for each in own.later]) != steps or any(not 0 < step < own.schedule.steps for step in steps):
            raise ValueError(f"{name}.later has the steps {steps}; they must rise, and lie within the {own.schedule.steps} of its schedule")
    recipe.model_config()


def _check_mix(key: str, mix: Mapping[str, float], data: DataRecipe) -> None:
    if unknown := set(mix) - set(SOURCES):
        raise ValueError(f"{key} has {', '.join(sorted(unknown))}; there are {', '.join(SOURCES)}")
    if not sum(mix.values()) > 0 or min(mix.values()) < 0:
        raise ValueError(f"{key} must have shares that are not negative, and one above 0")
    if "text" in mix and not data.texts:
        raise ValueError(f"{key} has text, but data.texts is empty")
    if set(mix) & set(MEMORY_SOURCES) and not (data.memory_count and data.memory_styles):
        raise ValueError(f"{key} has emoji, but data.memory_count or data.memory_styles is empty")
