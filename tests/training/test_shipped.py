"""The weights in this repository: what their card says is measured on them, and they do the world's tasks. Nothing is fetched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from service.catalog import CATALOG, ShippedEntry
from service.model.families import read_config
from training.data.emoji import EmojiSet
from training.evaluate.shares import digest_of
from training.evaluate.subject import Subject, open_subject
from training.evaluate.world import attempt, tasks_of
from training.export import SHIPPED_BYTES
from training.materials import Materials
from training.recipe import read_recipe
from training.world.draw import Brush
from training.world.scene import World
from training.world.tasks import TaskName

REPOSITORY = Path(__file__).parents[2]
COUNT = 24


@pytest.fixture(scope="module")
def folder() -> Path:
    entry = CATALOG["braid-nano"]
    assert isinstance(entry, ShippedEntry)
    return entry.folder


@pytest.fixture(scope="module")
def subject(folder: Path) -> Subject:
    """Without stamps, which would have to be fetched."""
    materials = Materials(read_recipe("nano").data, World(()), Brush({}), EmojiSet((), {}, {}), ())
    return open_subject(folder, materials, torch.device("cpu"))


def test_they_are_those_of_the_recipe_and_small(folder: Path) -> None:
    assert read_config(folder) == read_recipe("nano").model_config()
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    assert max(sizes) < SHIPPED_BYTES
    assert sum(sizes) < 25_000_000


def test_the_report_and_the_card_are_about_them(folder: Path) -> None:
    measured = json.loads((REPOSITORY / "docs/results/model.json").read_text(encoding="utf-8"))
    digest = digest_of(folder)
    assert measured["model"]["digest"] == digest
    assert not measured["measured"]["is_quick"]
    for page in (folder / "README.md", REPOSITORY / "docs/model.md"):
        assert digest[:16] in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "least"), [("draw", COUNT // 5), ("describe", COUNT // 2), ("ask", COUNT // 2)])
def test_they_do_the_worlds_tasks(subject: Subject, name: TaskName, least: int) -> None:
    """Trained combinations, well below the report's figures, and far above guessing: are these the weights, whole and in their places?"""
    done = attempt(subject, tasks_of(subject, name, "trained", COUNT))
    assert sum(each.verdict.is_right for each in done) > least
