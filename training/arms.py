"""The arms of ablations: a recipe on the world alone, and the same with one choice made differently. Plain values.

Trains and measures nothing. Called by ablate and by the report.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from training.recipe import Recipe, parse_recipe

WORLD_MIX = {"world_draw": 0.3, "world_describe": 0.2, "world_count": 0.1, "world_ask": 0.15, "world_edit": 0.15, "world_move": 0.1}
WORLD_CODES = {"world_pictures": 0.7, "world_films": 0.3}


@dataclass(frozen=True, slots=True)
class Arm:
    """changes: values of the recipe by their dotted keys. stages: of training, in turn. like: the arm whose finished first stage of the
    tokenizer it shares, so that only what differs is trained again."""

    changes: Mapping[str, Any] = field(default_factory=dict)
    stages: tuple[str, ...] = ("pretrain", "multitask")
    like: str | None = None


@dataclass(frozen=True, slots=True)
class Budget:
    """steps: of the decoder's last stage; pretrain_steps: of pre-training, where there is any. count: tasks of a kind that an arm is
    measured on."""

    steps: int
    pretrain_steps: int
    reconstruction_steps: int
    adversarial_steps: int
    count: int


def arms_of(budget: Budget) -> dict[str, Arm]:
    """Every arm by name."""
    return {
        "base": Arm(),
        "all-global": Arm({"decoder.global_every": 1}),
        "draw only": Arm({"multitask.mix": {"world_draw": 1.0}}),
        "describe only": Arm({"multitask.mix": {"world_describe": 1.0}}),
        "pre-trained": Arm(_steps("pretrain.schedule", budget.pretrain_steps)),
        "longer": Arm({"multitask.schedule.steps": budget.steps + budget.pretrain_steps}),
        "adversary": Arm(stages=("tokenizer",)),
        "no adversary": Arm(
            {"tokenizer.settings.adversary_share": 0.0, "tokenizer.settings.match_share": 0.0}, ("tokenizer",), like="adversary"
        ),
    }


ABLATIONS = {
    "adversary": ("adversary", "no adversary"),
    "attention": ("base", "all-global"),
    "tasks": ("base", "draw only", "describe only"),
    "pretraining": ("base", "pre-trained", "longer"),
}
"""The arms that are compared. "base" is trained once for all of them."""


def base_changes(budget: Budget) -> dict[str, Any]:
    """What all arms change of the recipe: fewer steps, and the world alone, but for the image tokenizer, which is only measured on it.
    Taught on scenes alone, its latents all became one (seen on a GPU and on a CPU, also with 400 free steps)."""
    often = {"save_every": 50, "patience": 0}
    shares: dict[str, Any] = {"pretrain.mix": WORLD_CODES, "multitask.mix": WORLD_MIX, "data.num_watched": 48}
    shares |= {"pretrain.later": [], "multitask.later": []}
    steps = {
        "tokenizer.reconstruction": budget.reconstruction_steps,
        "tokenizer.adversarial": budget.adversarial_steps,
        "pretrain.schedule": 0,
        "multitask.schedule": budget.steps,
    }
    for name, count in steps.items():
        shares |= {f"{name}.{key}": value for key, value in often.items()}
        shares |= _steps(name, count)
    return shares


def _steps(name: str, count: int) -> dict[str, int]:
    return {f"{name}.steps": count, f"{name}.evaluate_every": max(1, count), f"{name}.warmup_steps": max(1, count // 20)}


def changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with other values under dotted keys. Raises: ValueError for a key that it does not have."""
    values = asdict(recipe)
    for key, value in changes.items():
        *path, last = key.split(".")
        section: dict[str, Any] = values
        for name in path:
            section = section.get(name, {})
        if last not in section:
            raise ValueError(f"a recipe has no {key}")
        section[last] = value
    return parse_recipe(values)
