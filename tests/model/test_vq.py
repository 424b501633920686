"""The image tokenizer: the same numbers as transformers' Janus from the same weights, codes that stay local, and its files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import JanusVQVAE, JanusVQVAEConfig

from service.errors import WeightsError
from service.model.vq import VQConfig, VQTokenizer
from service.model.vq_files import read_image_tokenizer, read_vq_config, vq_config_values

JANUS = VQConfig(num_codes=64, code_width=4, channels=(32, 32, 64), latent_channels=16, num_res_blocks=2)
LOCAL = replace(JANUS, norm="position", has_encoder_attention=False, encoder_kernel=1, is_unit=True)
SIDE = 32


def pictures(count: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def roughened(model: torch.nn.Module) -> None:
    """Weights that make all parts count: norms that are not 1, biases that are not 0. Mutates: the model."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.fixture(scope="module")
def janus() -> Any:
    torch.manual_seed(0)
    model = JanusVQVAE(
        JanusVQVAEConfig(
            num_embeddings=64,
            embed_dim=4,
            base_channels=32,
            channel_multiplier=[1, 1, 2],
            latent_channels=16,
            num_res_blocks=2,
            num_patches=8,
        )
    ).eval()
    roughened(model)
    return model


@pytest.fixture(scope="module")
def local() -> VQTokenizer:
    torch.manual_seed(0)
    model = VQTokenizer(LOCAL).eval()
    roughened(model)
    return model


def test_weights_of_janus_load_as_they_are(janus: Any) -> None:
    model = VQTokenizer(JANUS)
    model.load_state_dict(janus.state_dict(), strict=True)
    assert sum(each.numel() for each in model.parameters()) == sum(each.numel() for each in janus.parameters())


@torch.no_grad()
def test_codes_and_pixels_are_those_of_janus(janus: Any) -> None:
    model = VQTokenizer(JANUS).eval()
    model.load_state_dict(janus.state_dict())
    pixels = pictures()
    wanted = janus.encode(pixels)
    codes = model.encode(pixels)
    assert torch.allclose(model.encoder(pixels), wanted.last_hidden_state, atol=1e-4, rtol=1e-4)
    assert torch.equal(codes.flatten(), wanted.image_tokens.flatten())
    assert len(codes.unique()) > 3  # else equal codes would say little
    assert torch.allclose(model.decode(codes), janus.decode(codes.flatten(1)), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_janus_itself_sees_far(janus: Any) -> None:
    """The control of the next test: with group norm and attention a far pixel reaches every latent."""
    model = VQTokenizer(JANUS).eval()
    model.load_state_dict(janus.state_dict())
    one, other = pictures(1), pictures(1)
    other[..., -1, -1] = 1 - other[..., -1, -1]
    assert not torch.equal(model.latents(one)[0, 0, 0], model.latents(other)[0, 0, 0])


@torch.no_grad()
def test_a_far_pixel_changes_no_local_code(local: VQTokenizer) -> None:
    """Its convolutions reach 19 pixels: 5 at full resolution, 4 of 2 pixels at half, and the strides between."""
    one = torch.cat((pictures(1), pictures(1, seed=1)), dim=-1)
    other = torch.cat((pictures(1), pictures(1, seed=2)), dim=-1)  # 64 wide; from 32 on it is another picture
    before, after = local.latents(one), local.latents(other)
    assert torch.equal(before[:, :, :3], after[:, :, :3])
    assert not torch.equal(before[:, :, 8:], after[:, :, 8:])
    assert torch.equal(local.encode(one)[:, :, :3], local.encode(other)[:, :, :3])


@torch.no_grad()
def test_unit_latents_and_codes_have_length_1(local: VQTokenizer) -> None:
    assert torch.allclose(local.latents(pictures()).norm(dim=-1), torch.ones(2, 8, 8), atol=1e-5)
    assert torch.allclose(local.codebook.norm(dim=-1), torch.ones(64), atol=1e-5)


@torch.no_grad()
def test_the_nearest_code_is_the_nearest(local: VQTokenizer) -> None:
    latents = local.latents(pictures())
    apart = (latents[..., None, :] - local.codebook).norm(dim=-1)
    assert torch.equal(local.nearest(latents), apart.argmin(-1))
    assert local.nearest(local.codebook[None, :8].view(1, 2, 4, 4)).flatten().tolist() == list(range(8))


@torch.no_grad()
def test_pictures_need_not_be_square(local: VQTokenizer) -> None:
    codes = local.encode(torch.zeros(1, 3, 16, 32))
    assert codes.shape == (1, 4, 8)
    assert local.decode(codes).shape == (1, 3, 16, 32)


def test_group_norm_needs_channels_that_fit() -> None:
    with pytest.raises(WeightsError, match="multiples of 32"):
        VQConfig(channels=(16, 32))


def saved(model: VQTokenizer, folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps(vq_config_values(model.config)))
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    return folder


@torch.no_grad()
def test_a_folder_gives_the_same_tokenizer_back(local: VQTokenizer, tmp_path: Path) -> None:
    model = read_image_tokenizer(saved(local, tmp_path))
    assert model.config == local.config
    assert torch.equal(model.encode(pictures()), local.encode(pictures()))
    assert torch.allclose(model.decode(model.encode(pictures())), local.decode(local.encode(pictures())), atol=1e-5)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("num_codes", 0, "num_codes"),
        ("num_codes", 2**40, "num_codes"),
        ("num_res_blocks", 10**9, "num_res_blocks"),
        ("channels", [], "channels"),
        ("channels", [32, 10**9], "channels"),
        ("channels", "many", "channels"),
        ("norm", "batch", "norm"),
        ("encoder_kernel", 2, "odd"),
        ("surprise", 1, "surprise"),
        ("model_type", "diffusion", "diffusion"),
    ],
)
def test_a_config_that_cannot_be_is_refused_by_name(key: str, value: object, wanted: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**vq_config_values(LOCAL), key: value}))
    with pytest.raises(WeightsError, match=wanted):
        read_vq_config(tmp_path / "config.json")


def test_a_config_that_lacks_a_key_is_refused(tmp_path: Path) -> None:
    values = vq_config_values(LOCAL)
    del values["is_unit"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(WeightsError, match="is_unit"):
        read_vq_config(tmp_path / "config.json")


def test_damaged_weights_are_refused(local: VQTokenizer, tmp_path: Path) -> None:
    path = saved(local, tmp_path) / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "more": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match="more"):
        read_image_tokenizer(tmp_path)
    save_file({**tensors, "quant_conv.weight": torch.zeros(4, 16, 3, 3)}, path)
    with pytest.raises(WeightsError, match=r"quant_conv\.weight"):
        read_image_tokenizer(tmp_path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(WeightsError, match="damaged"):
        read_image_tokenizer(tmp_path)
    path.unlink()
    with pytest.raises(WeightsError, match="missing"):
        read_image_tokenizer(tmp_path)
