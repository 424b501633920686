"""The image tokenizer's training: losses and measures against numbers computed by hand, the codebook, the pictures, both stages."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from service.model.vq import VQConfig, VQTokenizer
from training.loop import Schedule, run
from training.picture.codebook import DEAD_STEPS, DECAY, MovingCodebook
from training.picture.discriminator import PatchDiscriminator
from training.picture.losses import commitment, edges, feature_matching, hinge_draw, hinge_judge, reconstruction
from training.picture.measures import code_use, decode, encode, gradient_energy_ratio, psnr, stability, to_pictures, to_tensor
from training.picture.sheet import write_sheet
from training.picture.source import PictureMix, augment, draw_scenes, throw_scenes
from training.picture.stage import AdversarialStage, PictureSettings, ReconstructionStage
from training.ranks import Rank
from training.world.draw import Brush
from training.world.scene import World, is_trained

TINY = VQConfig(
    num_codes=16,
    code_width=4,
    channels=(8, 8, 16),
    latent_channels=8,
    num_res_blocks=1,
    norm="position",
    has_encoder_attention=False,
    has_decoder_attention=True,
    encoder_kernel=1,
    is_unit=True,
)
SETTINGS = PictureSettings(batch=2, free_steps=3, alone_steps=1, ramp_steps=4, precision="fp32")


def scenes(random: np.random.Generator, count: int) -> np.ndarray:
    return PictureMix(np.empty((0, 32, 32, 3), np.uint8), World(), Brush({}), 1.0)(random, count)


def held_out() -> np.ndarray:
    return scenes(np.random.default_rng(9), 4)


def fresh() -> VQTokenizer:
    torch.manual_seed(0)
    return VQTokenizer(TINY)


# --- measures ---------------------------------------------------------------------------------------------------------------------


def test_psnr_by_hand() -> None:
    real = np.zeros((3, 4, 4, 3), dtype=np.uint8)
    drawn = real.copy()
    drawn[0] = 16  # mean square 256
    drawn[1, 0, 0, 0] = 48  # one of 48 values: again 48
    assert psnr(drawn, real) == pytest.approx([10 * math.log10(255**2 / 256), 10 * math.log10(255**2 / 48), 60.0])


def test_gradient_energy_by_hand() -> None:
    """A step edge of half the height has a quarter of the energy; what is flat has none."""
    real = np.zeros((1, 8, 8, 3), dtype=np.uint8)
    real[:, :, 4:] = 200
    half = real // 2
    assert gradient_energy_ratio(half, real) == pytest.approx(0.25, rel=1e-5)
    assert gradient_energy_ratio(np.full_like(real, 77), real) == pytest.approx(0, abs=1e-9)
    assert gradient_energy_ratio(real, real) == 1.0


def test_edges_by_hand() -> None:
    ramp = torch.arange(5.0).expand(1, 3, 5, 5)  # grows by 1 to the right: Sobel gives 8 / 4
    assert torch.equal(edges(ramp), torch.stack((torch.full((3, 3), 2.0), torch.zeros(3, 3))).expand(3, 2, 3, 3))


def test_code_use_by_hand() -> None:
    use = code_use(np.array([[[0, 0], [1, 3]]]), 8)
    assert use.share == 3 / 8
    assert use.perplexity == pytest.approx(2 ** (0.5 * 1 + 2 * 0.25 * 2))
    assert code_use(np.arange(8), 8).perplexity == pytest.approx(8)


def test_stability_looks_only_where_the_thing_is() -> None:
    one, other = np.array([[[1, 2], [3, 4]]]), np.array([[[1, 9], [3, 9]]])
    assert stability(one, other, np.array([[[True, False], [True, True]]])) == pytest.approx(2 / 3)


def test_pictures_survive_the_way_there_and_back() -> None:
    pictures = np.random.default_rng(0).integers(256, size=(2, 8, 8, 3), dtype=np.uint8)
    tensor = to_tensor(pictures)
    assert tensor.shape == (2, 3, 8, 8)
    assert tensor.abs().max() <= 1
    assert np.array_equal(to_pictures(tensor), pictures)
    assert to_pictures(torch.tensor([-3.0, 0.0, 3.0]).view(1, 3, 1, 1)).ravel().tolist() == [0, 128, 255]


def test_encoding_in_parts_is_encoding_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pictures = fresh().eval(), held_out()
    whole = encode(model, pictures)
    monkeypatch.setattr("training.picture.measures.BATCH", 3)
    assert np.array_equal(encode(model, pictures), whole)
    assert whole.shape == (4, 8, 8)
    assert decode(model, whole).shape == pictures.shape


# --- losses -----------------------------------------------------------------------------------------------------------------------


def test_losses_by_hand() -> None:
    real, drawn = torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.5)
    assert reconstruction(drawn, real).item() == 0.5  # no edges in either
    assert hinge_judge(torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 1.0])).item() == 0.5 + 1.0
    assert hinge_draw(torch.tensor([1.0, 3.0])).item() == -2.0
    assert feature_matching([torch.zeros(2), torch.zeros(3)], [torch.ones(2), torch.full((3,), 3.0)]).item() == 2.0


def test_commitment_pulls_latents_and_leaves_codes() -> None:
    latents, codes = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    commitment(latents, codes).backward()
    assert latents.grad is not None
    assert latents.grad.tolist() == pytest.approx([2 / 3] * 3)
    assert codes.grad is None


def test_the_judge_scores_patches_and_cannot_grow_without_bound() -> None:
    torch.manual_seed(0)
    judge = PatchDiscriminator(8).train()
    for _ in range(20):
        scores, features = judge(torch.randn(2, 3, 32, 32))
    assert scores.shape == (2, 1, 8, 8)
    assert len(features) == 3
    for conv in judge.convs:
        assert torch.linalg.matrix_norm(conv.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.05)


# --- codebook ---------------------------------------------------------------------------------------------------------------------


def unit(*values: list[float]) -> torch.Tensor:
    return F.normalize(torch.tensor(values), dim=-1)


def test_used_codes_move_towards_their_means_on_the_sphere() -> None:
    table = unit([1.0, 0.0], [0.0, 1.0], [-1.0, 0.0])
    latents = unit([1.0, 1.0], [1.0, 0.0], [0.0, 1.0])
    book = MovingCodebook(3)
    assert book.update(table, latents, torch.tensor([0, 0, 1]), Rank()) == 0
    mean = latents[:2].mean(0)
    assert torch.allclose(table[0], F.normalize(DECAY * torch.tensor([1.0, 0.0]) + (1 - DECAY) * mean, dim=0))
    assert torch.allclose(table[1:], unit([0.0, 1.0], [-1.0, 0.0]))  # one has arrived, one is not used
    assert torch.allclose(table.norm(dim=-1), torch.ones(3))
    assert book.idle.tolist() == [0, 0, 1]


def test_a_code_that_nobody_uses_begins_again_at_a_latent() -> None:
    torch.manual_seed(0)
    table, latents = unit([1.0, 0.0], [-1.0, 0.0]), unit([1.0, 0.1], [1.0, 0.2])
    book, codes = MovingCodebook(2), torch.tensor([0, 0])
    assert [book.update(table, latents, codes, Rank()) for _ in range(DEAD_STEPS)] == [0] * (DEAD_STEPS - 1) + [1]
    assert any(torch.equal(table[1], latent) for latent in latents)
    assert book.idle.tolist() == [0, 0]


# --- pictures ---------------------------------------------------------------------------------------------------------------------


def test_augmented_pictures_keep_size_and_white() -> None:
    white = np.full((50, 16, 16, 3), 255, dtype=np.uint8)
    assert np.array_equal(augment(white, np.random.default_rng(0)), white)
    black = np.zeros((200, 16, 16, 3), dtype=np.uint8)
    out = augment(black, np.random.default_rng(0))
    assert out.shape == black.shape
    filled = {int((picture == 255).all(-1).sum()) for picture in out}
    assert filled >= {0, 16, 32}  # shifted by none, by one, by two
    assert max(filled) <= 16 * 16 - 14 * 14
    assert len({tuple(picture[8, 8]) for picture in out}) > 50  # recoloured


def test_augmenting_leaves_the_originals_alone() -> None:
    pictures = np.random.default_rng(1).integers(256, size=(20, 16, 16, 3), dtype=np.uint8)
    before = pictures.copy()
    augment(pictures, np.random.default_rng(0))
    assert np.array_equal(pictures, before)


def test_the_mix_has_its_shares_and_scenes_as_they_are() -> None:
    emoji = np.full((3, 32, 32, 3), 17, dtype=np.uint8)
    brush = Brush({})
    mix = PictureMix(emoji, World(), brush, 0.25)
    found = mix(np.random.default_rng(0), 400)
    assert found.shape == (400, 32, 32, 3)
    read = brush.read(found)
    redrawn = np.stack([brush.draw(scene) for scene in read])
    is_scene = (redrawn == found).all((1, 2, 3))
    assert 70 < is_scene.sum() < 130
    assert all(is_trained(scene) for scene, own in zip(read, is_scene, strict=True) if own)
    assert np.array_equal(found, mix(np.random.default_rng(0), 400))
    assert not np.array_equal(found, mix(np.random.default_rng(1), 400))


def test_scenes_in_a_larger_size_are_the_same_pixels() -> None:
    from random import Random

    thrown = throw_scenes(World(), Random(0), 3)
    small, large = draw_scenes(Brush({}), thrown), draw_scenes(Brush({}), thrown, 64)
    assert large.shape == (3, 64, 64, 3)
    assert np.array_equal(large[:, ::2, ::2], small)
    assert np.array_equal(large[:, 1::2, 1::2], small)
    assert draw_scenes(Brush({}), [], 64).shape == (0, 64, 64, 3)


def test_a_sheet_shows_every_picture(tmp_path: Path) -> None:
    rows = [np.stack([np.full((4, 4, 3), 10 * row + index, dtype=np.uint8) for index in range(5)]) for row in (1, 2)]
    write_sheet(tmp_path / "sheet.png", rows, columns=3, scale=2, gap=1)
    with Image.open(tmp_path / "sheet.png") as picture:
        found = np.asarray(picture)
    assert found.shape == (2 * 2 * (2 * 5 + 1), 2 * (3 * 5 + 1), 3)
    assert set(np.unique(found)) == {10, 11, 12, 13, 14, 20, 21, 22, 23, 24, 255}


# --- stages -----------------------------------------------------------------------------------------------------------------------


def test_reconstruction_learns() -> None:
    stage = ReconstructionStage(fresh(), scenes, held_out(), PictureSettings(batch=8, free_steps=10, precision="fp32"), Rank(), 0)
    begin = -stage.evaluate()["minus_psnr"]
    torch.manual_seed(0)
    for step in range(40):
        stage.step(step)
    assert -stage.evaluate()["minus_psnr"] > begin + 3


def test_the_adversary_teaches_the_decoder_alone() -> None:
    model = fresh()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stage = AdversarialStage(model, scenes, held_out(), SETTINGS, Rank(), 0)
    judged = stage.judge.convs[0].bias.clone()
    codes = encode(model, held_out())
    figures = [stage.step(step) for step in range(4)]
    changed = {name.split(".")[0] for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"decoder", "post_quant_conv"}
    assert np.array_equal(encode(model, held_out()), codes)
    assert not torch.equal(stage.judge.convs[0].bias, judged)
    assert set(figures[0]) == {"loss", "fooled", "matched", "judge"}


@pytest.mark.parametrize("kind", [ReconstructionStage, AdversarialStage])
def test_steps_are_functions_of_seed_step_and_rank(kind: type[ReconstructionStage] | type[AdversarialStage]) -> None:
    def batch(seed: int, step: int, rank: int) -> torch.Tensor:
        return kind(fresh(), scenes, held_out(), SETTINGS, Rank(rank, 2), seed).batch(step)

    first = batch(0, 0, 0)
    assert torch.equal(first, batch(0, 0, 0))
    assert not any(torch.equal(first, batch(*other)) for other in ((1, 0, 0), (0, 1, 0), (0, 0, 1)))


@pytest.mark.parametrize("kind", [ReconstructionStage, AdversarialStage])
def test_an_interrupted_stage_ends_in_the_same_weights(
    kind: type[ReconstructionStage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.log.plot_curves", lambda folder, name: None)
    schedule = Schedule(steps=26, warmup_steps=3, evaluate_every=20, save_every=5)  # codes restart from step 20 on

    def stage() -> ReconstructionStage:
        return kind(fresh(), scenes, held_out(), SETTINGS, Rank(), 3)

    whole, first, second = stage(), stage(), stage()
    run(whole, schedule, tmp_path / "whole", Rank(), 3)

    def interrupted(step: int) -> dict[str, float]:
        if step == 18:
            raise KeyboardInterrupt
        return dict(kind.step(first, step))

    monkeypatch.setattr(first, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(first, schedule, tmp_path / "parts", Rank(), 3)
    run(second, schedule, tmp_path / "parts", Rank(), 3)
    wanted = whole.module.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in second.module.state_dict().items())
    assert (tmp_path / "parts" / "sheet.png").exists()
