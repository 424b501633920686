"""How well the image tokenizer keeps pictures: on styles it was taught, on one it never saw, and on scenes; before and after the adversary.

Called by the evaluation's run; the same figures serve the report's tables.
Shape suffixes: N pictures, S pixels of a side, R rows and W columns of codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from service.model.vq import VQTokenizer
from training.data.emoji import load_emoji
from training.evaluate.shares import evenly, share_of
from training.materials import Materials
from training.picture.measures import code_use, decode, encode, gradient_energy_ratio, psnr, stability
from training.picture.sheet import write_sheet
from training.stream.document import Pixels
from training.world.draw import SIDE
from training.world.scene import CELLS, Placed, Scene, World, is_trained, scene_of

UNSEEN_STYLE = "fluent3d"
SHOWN = 24
"""Pictures of a contact sheet."""


def reconstruction(vq: VQTokenizer, sets: Mapping[str, Pixels]) -> dict[str, Any]:
    """Figures of each named set of pictures."""
    return {name: _of_pictures(vq, pictures) for name, pictures in sets.items() if len(pictures)}


def _of_pictures(vq: VQTokenizer, pictures: Pixels) -> dict[str, Any]:
    codes = encode(vq, pictures)
    drawn = decode(vq, codes)
    use = code_use(codes, vq.config.num_codes)
    return {
        "n": len(pictures),
        "psnr_db": float(psnr(drawn, pictures).mean()),
        "gradient_energy": gradient_energy_ratio(drawn, pictures),
        "codes_used": use.share,
        "perplexity": use.perplexity,
    }


def picture_sets(materials: Materials, num_scenes: int, seed: int, most: int | None = None) -> dict[str, Pixels]:
    """What is reconstructed. most: pictures of a set, evenly chosen; None for all.

    Raises: StartupError when the package of the unseen style can't be had.
    """
    random = Random(seed)
    world = materials.world
    trained = [world.scene(random, is_trained) for _ in range(num_scenes)]
    others = [world.scene(random, lambda scene: not is_trained(scene)) for _ in range(num_scenes)]
    sets = {
        "emoji trained on": materials.pictures(is_watched=False),
        "emoji of these styles kept from training": materials.pictures(is_watched=True),
        f"emoji, {UNSEEN_STYLE} (style never trained)": _unseen(materials),
        "scenes": materials.draw(trained),
        "scenes, held-out combinations": materials.draw(others),
    }
    return {name: pictures[evenly(len(pictures), most)] for name, pictures in sets.items()}


def _unseen(materials: Materials) -> Pixels:
    size = materials.recipe.size
    if not materials.recipe.styles:
        return np.empty((0, size, size, 3), dtype=np.uint8)
    found = load_emoji(size, (UNSEEN_STYLE,))
    return np.asarray(found.pictures[UNSEEN_STYLE][found.present[UNSEEN_STYLE]], dtype=np.uint8)


def code_stability(vq: VQTokenizer, materials: Materials, count: int, seed: int) -> dict[str, float]:
    """Share of codes that a thing keeps while everything but its place and the background changes, over `count` pairs of scenes."""
    random = Random(seed)
    pairs = [_pair(materials.world, random) for _ in range(count)]
    one = encode(vq, materials.draw([first for first, _, _ in pairs]))
    other = encode(vq, materials.draw([second for _, second, _ in pairs]))
    shown = np.stack([_places(kept, one.shape[1]) for _, _, kept in pairs])
    return {"share": stability(one, other, shown), "n": count}


def _pair(world: World, random: Random) -> tuple[Scene, Scene, Placed]:
    """Two scenes of one background that share one thing in one place, and that thing."""
    while True:
        first, thrown = world.scene(random, is_trained), world.scene(random, is_trained)
        kept = random.choice(first.things)
        others = [each for each in thrown.things if not each.cells & kept.cells]
        second = scene_of(first.background, [kept, *others[:2]])
        if is_trained(second) and set(second.things) != set(first.things):
            return first, second, kept


def _places(placed: Placed, codes_per_side: int) -> NDArray[np.bool_]:
    """Which codes [R, W] lie in the thing's cells."""
    step = codes_per_side // CELLS
    found = np.zeros((codes_per_side, codes_per_side), dtype=np.bool_)
    for row, column in placed.cells:
        found[row * step : (row + 1) * step, column * step : (column + 1) * step] = True
    return found


def reader(vq: VQTokenizer, materials: Materials, count: int, seed: int) -> dict[str, Any]:
    """How often the program that judges drawings reads a scene right: from the picture itself, and from its reconstruction."""
    random = Random(seed)
    scenes = [materials.world.scene(random, lambda scene: True) for _ in range(count)]
    real = materials.draw(scenes)
    drawn = decode(vq, encode(vq, real))
    shown = {"real": real, "reconstructed": drawn}
    found = {name: materials.brush.read(to_world_size(pictures)) for name, pictures in shown.items()}
    return {name: share_of(one == other for one, other in zip(scenes, read, strict=True)) for name, read in found.items()}


def to_world_size(pictures: Pixels) -> Pixels:
    """uint8 [N, S, S, 3] to the side that the world's reader knows, by means of pixels."""
    count, side = pictures.shape[:2]
    if side == SIDE:
        return pictures
    step = side // SIDE
    tiles = pictures.reshape(count, SIDE, step, SIDE, step, 3).astype(np.float32)
    return np.asarray(np.rint(tiles.mean((2, 4))), dtype=np.uint8)


def first_stage(vq: VQTokenizer, run: Path) -> VQTokenizer | None:
    """The image tokenizer of a run's folder as it was before the adversary; None when the run had no adversary, when its checkpoint is
    gone, or when it led to other codes than `vq` has."""
    folder = run / "tokenizer" / "reconstruction"
    paths = [folder / name for name in ("best.pt", "checkpoint.pt") if (folder / name).exists()]
    if not paths or not (run / "tokenizer" / "adversarial").is_dir():
        return None
    state = torch.load(paths[0], weights_only=True, map_location="cpu")
    tensors = state.get("module", state)
    model = VQTokenizer(vq.config)
    model.load_state_dict({name.removeprefix("model."): each for name, each in tensors.items() if name.startswith("model.")})
    model.requires_grad_(False).eval()
    if not torch.allclose(model.codebook, vq.codebook.cpu(), atol=2**-7):  # vq was rounded to bfloat16
        return None
    return model.to(vq.quantize.embedding.weight.device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def write_reconstructions(path: Path, sets: Mapping[str, Pixels], before: VQTokenizer | None, after: VQTokenizer) -> None:
    """A contact sheet: original, before the adversary (if that is known), after it; the sets in turn. Mutates: the path."""
    each = max(1, SHOWN // max(1, sum(1 for pictures in sets.values() if len(pictures))))
    shown = np.concatenate([pictures[evenly(len(pictures), each)] for pictures in sets.values() if len(pictures)])
    models = [model for model in (before, after) if model is not None]
    write_sheet(path, [shown, *(decode(model, encode(model, shown)) for model in models)])
