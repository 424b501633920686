"""The stages of a recipe, from data to a decoder that can be served: what each starts from, does, and leaves behind.

Each stage has a folder; when its artefact lies there, it has ended. The loop, the models and the data are elsewhere. Called by the
command.
"""

from __future__ import annotations

import json
import operator
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor

from service.catalog import resolve
from service.errors import StartupError
from service.model.vq import VQTokenizer
from service.model.vq_files import FOLDER
from service.model.weights import open_weights
from training.adapt import Adapters, adapted_ops
from training.ahead import num_workers
from training.borrow import borrowed_vocabulary, borrowed_weights, check_borrowed
from training.decoder import INITIAL_STD, NamedSource, fresh_weights, teachable
from training.evaluate.shares import MACHINE, circumstances
from training.export import load_image_tokenizer, save_decoder, save_image_tokenizer, whole_folder, write_json
from training.language import Elsewhere, LanguageStage, nearest_codes
from training.loop import run
from training.materials import Materials, load_materials, open_streams, vocabulary_texts
from training.picture.source import PictureMix
from training.picture.stage import AdversarialStage, ReconstructionStage
from training.ranks import Rank, run_ranks
from training.recipe import Recipe
from training.stream.document import CodesLater
from training.tokens import PAD_ID, train_tokenizer

Say = Callable[[str], None]

SECTIONS = {
    "data": ("data", "decoder.text_vocab_size", "decoder.source"),
    "tokenizer": ("data", "tokenizer"),
    "pretrain": ("data", "tokenizer", "decoder", "pretrain"),
    "multitask": ("data", "tokenizer", "decoder", "multitask"),
}
"""The stages in their order, and the parts of a recipe that decide what comes out of each."""
VOCABULARY = "vocabulary.json"


@dataclass(frozen=True, slots=True)
class Course:
    """A recipe, trained in a folder by so many processes."""

    recipe: Recipe
    folder: Path
    num_ranks: int

    def artefact(self, stage: str) -> Path:
        """Where a stage leaves what it made."""
        return self.folder / stage / "artefact"


def default_ranks() -> int:
    """One for every GPU; on a CPU two of one thread each, which beat one of two threads."""
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    return 2 if (os.cpu_count() or 1) > 1 else 1


def run_stage(course: Course, stage: str, *, is_anew: bool = False, say: Say = print) -> Path:
    """Runs a stage to its end, from where an interruption left it, unless it has ended; returns its artefact.

    is_anew: forgets what the stage did before. Mutates: the stage's folder.
    Raises: StartupError when the stage before has not ended, or this one was begun with other numbers.
    """
    folder, artefact = course.folder / stage, course.artefact(stage)
    if is_anew:
        shutil.rmtree(folder, ignore_errors=True)
    before = _before(course, stage)
    _sign(course, stage)
    if artefact.is_dir():
        say(f"{stage}: has ended before; its artefact is {artefact}")
        return artefact
    is_resumed = any(folder.rglob("checkpoint.pt"))
    start = "its last checkpoint" if is_resumed else f"the artefact of {before}" if before else "the recipe"
    say(f"{stage}: starts from {start}, {course.num_ranks} process{'es' if course.num_ranks > 1 else ''}")
    _WORK[stage](course)
    write_json(folder / MACHINE, circumstances(device_of(Rank())))
    say(f"{stage}: has ended; its artefact is {artefact}")
    return artefact


def _before(course: Course, stage: str) -> str | None:
    """The stage that this one starts from. Raises: StartupError when it has not ended."""
    order = list(SECTIONS)
    if stage == order[0]:
        return None
    before = order[order.index(stage) - 1]
    if not course.artefact(before).is_dir():
        raise StartupError(f"{stage} starts from the artefact of {before}, which has not ended: run `braid-train {before}` first")
    return before


def _sign(course: Course, stage: str) -> None:
    """Writes down what the stage is run with. Raises: StartupError when it was begun with something else."""
    recipe = asdict(course.recipe)
    parts = {key: reduce(operator.getitem, key.split("."), recipe) for key in SECTIONS[stage]}
    own: dict[str, Any] = {**parts, "seed": course.recipe.seed}
    if stage != "data":  # which is the work of one process
        own["ranks"] = course.num_ranks
    path = course.folder / stage / "recipe.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, own)
        return
    begun = json.loads(path.read_text(encoding="utf-8"))
    if course.artefact(stage).is_dir():  # how many processes made it no longer matters
        begun["ranks"] = own["ranks"] = course.num_ranks
    if changed := _differences(begun, json.loads(json.dumps(own))):
        raise StartupError(f"{stage} was begun with another {', '.join(changed)}; --restart begins anew, --out chooses another folder")


def _differences(one: Any, other: Any, prefix: str = "") -> list[str]:
    """Keys, written with dots, under which two JSON values are not the same."""
    if isinstance(one, dict) and isinstance(other, dict):
        return [
            each for key in {**one, **other} for each in _differences(one.get(key), other.get(key), f"{prefix}.{key}" if prefix else key)
        ]
    return [] if one == other else [prefix]


def read_vocabulary(course: Course) -> tokenizers.Tokenizer:
    """The text's vocabulary, which the data stage learned."""
    return tokenizers.Tokenizer.from_file(str(course.artefact("data") / VOCABULARY))


def _data(course: Course) -> None:
    recipe = course.recipe
    materials = load_materials(recipe.data)
    vocabulary = _vocabulary(recipe, materials)
    counts = {
        "emoji": {style: int(present.sum()) for style, present in materials.emoji.present.items()},
        "memorised": [materials.emoji.entries[place].key for place in materials.chosen],
        "texts": {"train": len(materials.texts.train), "held_out": len(materials.texts.held_out)},
        "stamps": list(materials.world.stamps),
    }
    with whole_folder(course.artefact("data")) as folder:
        vocabulary.save(str(folder / VOCABULARY))
        write_json(folder / "counts.json", counts)


def _vocabulary(recipe: Recipe, materials: Materials) -> tokenizers.Tokenizer:
    """Learned from the materials, or that of the checkpoint which the decoder begins as."""
    size, source = recipe.decoder.text_vocab_size, recipe.decoder.source
    if not source:
        return train_tokenizer(vocabulary_texts(materials), size)
    checkpoint = resolve(source).path
    check_borrowed(checkpoint, recipe.model_config())  # now, not after hours of the image tokenizer
    return borrowed_vocabulary(checkpoint)


def device_of(rank: Rank) -> torch.device:
    """A rank's own GPU, or the CPU."""
    return torch.device("cuda", rank.index) if torch.cuda.is_available() else torch.device("cpu")


def _tokenizer_rank(course: Course, rank: Rank) -> None:
    """Reconstruction, then the adversary; each in a folder of its own."""
    own, seed, folder = course.recipe.tokenizer, course.recipe.seed, course.folder / "tokenizer"
    materials = load_materials(course.recipe.data)
    source = PictureMix(materials.pictures(is_watched=False), materials.world, materials.brush, own.scene_share, own.recoloured_share)
    watched = materials.watched_pictures()
    torch.manual_seed(seed)
    model = VQTokenizer(own.model).to(device_of(rank), memory_format=torch.channels_last)  # type: ignore[call-overload]
    first = ReconstructionStage(model, source, watched, own.settings, rank, seed)
    run(first, own.reconstruction, folder / "reconstruction", rank, seed)
    if own.adversarial.steps:
        torch.manual_seed(seed)
        second = AdversarialStage(model, source, watched, own.settings, rank, seed + 1)
        run(second, own.adversarial, folder / "adversarial", rank, seed + 1)
    if rank.is_first:
        with whole_folder(course.artefact("tokenizer")) as artefact:
            save_image_tokenizer(model, artefact / FOLDER)


def _language_rank(course: Course, name: str, rank: Rank) -> None:
    recipe, device = course.recipe, device_of(rank)
    own = recipe.pretrain if name == "pretrain" else recipe.multitask
    vq = load_image_tokenizer(course.artefact("tokenizer"), device)
    vocabulary = read_vocabulary(course)
    streams = open_streams(recipe, load_materials(recipe.data), vocabulary, vq)
    elsewhere: Elsewhere | None = None
    if workers := num_workers(device, rank.count):
        later = CodesLater((streams.scribe.pictures.rows, streams.scribe.pictures.columns))
        elsewhere = Elsewhere(workers, later, streams.scribe.encode)
    mix = partial(streams.mix, encode=elsewhere.later if elsewhere else None)
    adapters: list[Adapters] = []
    source = new_weights(recipe, vq.codebook) if name == "pretrain" else open_weights(course.artefact("pretrain"), recipe.model_config())
    model = teachable(recipe.model_config(), source, device, adapted_ops(adapters))
    if own.settings.lora_rank:
        torch.manual_seed(recipe.seed)
        adapters.append(Adapters(model, own.settings.lora_rank, 2.0 * own.settings.lora_rank, first_layer=0))
    stage = LanguageStage(
        name,
        model,
        mix(own.mix),
        streams.watched(own.sources),
        own.settings,
        later=[(each.step, mix(each.mix)) for each in own.later],
        adapters=adapters[0] if adapters else None,
        near=nearest_codes(vq.codebook),
        elsewhere=elsewhere,
        pad_id=PAD_ID,
        rank=rank,
        seed=recipe.seed,
    )
    run(stage, own.schedule, course.folder / name, rank, recipe.seed)
    if rank.is_first:
        for each in adapters:
            each.merge()
        with whole_folder(course.artefact(name)) as artefact:
            save_decoder(model, vocabulary, course.artefact("tokenizer") / FOLDER, artefact)


def new_weights(recipe: Recipe, codebook_KE: Tensor) -> NamedSource:
    """What a decoder begins with: nothing, or a text model, and in any case which codes are alike. Their rows are one random linear map of
    the codebook. Raises: StartupError when the checkpoint that it begins as can't be had, or is of other sizes."""
    config = recipe.model_config()
    generator = torch.Generator().manual_seed(recipe.seed + 1)
    spread = torch.randn(codebook_KE.shape[1], config.width, generator=generator) * INITIAL_STD  # codes are of length 1
    codes_KD = codebook_KE.cpu() @ spread
    if recipe.decoder.source:
        return borrowed_weights(resolve(recipe.decoder.source).path, config, codes_KD)
    weights = fresh_weights(config, recipe.seed)
    weights.tensors["embedding"][-len(codes_KD) :] = codes_KD
    return weights


_WORK: dict[str, Callable[[Course], None]] = {
    "data": _data,
    "tokenizer": lambda course: run_ranks(course.num_ranks, partial(_tokenizer_rank, course)),
    "pretrain": lambda course: run_ranks(course.num_ranks, partial(_language_rank, course, "pretrain")),
    "multitask": lambda course: run_ranks(course.num_ranks, partial(_language_rank, course, "multitask")),
}
