"""The image tokenizer: pixels to a grid of codes and back, a VQGAN whose modules are named and wired as Janus's (and LlamaGen's).

One class for our own tokenizer and for such checkpoints; what differs is in `VQConfig`. No losses and no file here: training teaches
it, the runner loads it, both through state dicts.
Shape suffixes: N pictures, C channels, Y and X pixels, R rows and W columns of codes, E numbers of a code.
Source: Sun et al. 2024 (LlamaGen), section 3.1; Chen et al. 2025 (Janus-Pro).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.errors import WeightsError

Norm = Literal["group", "position"]

_GROUPS = 32
_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class VQConfig:
    """channels: of each resolution, finest first; between two of them lies a factor of 2.

    norm: over groups of channels and the whole picture as in Janus ("group"), or over the channels of each position ("position"), where a
    code can't depend on what is drawn far away. has_encoder_attention, has_decoder_attention: at the coarsest resolution. encoder_kernel:
    of the convolutions at the encoder's coarsest resolution, 3 in Janus; 1 keeps a code from seeing its neighbours there.
    is_unit: latents are divided by their length before the nearest code is looked for.
    """

    num_codes: int = 16384
    code_width: int = 8
    channels: tuple[int, ...] = (128, 128, 256, 256, 512)
    latent_channels: int = 256
    num_res_blocks: int = 2
    norm: Norm = "group"
    has_encoder_attention: bool = True
    has_decoder_attention: bool = True
    encoder_kernel: int = 3
    is_unit: bool = False

    def __post_init__(self) -> None:
        if self.norm == "group" and any(each % _GROUPS for each in self.channels):
            raise WeightsError(f"an image tokenizer's channels must be multiples of {_GROUPS}, not {list(self.channels)}")

    @property
    def patch(self) -> int:
        """Pixels of a side that one code stands for."""
        return 1 << (len(self.channels) - 1)


class PositionNorm(nn.Module):
    """Layer norm over the channels of each position: [N, C, Y, X] to the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x_NCYX: Tensor) -> Tensor:
        last = x_NCYX.permute(0, 2, 3, 1)
        normed = F.layer_norm(last, (last.shape[-1],), self.weight, self.bias, _EPS)
        return normed.permute(0, 3, 1, 2)


def _norm(kind: Norm, channels: int) -> nn.Module:
    return nn.GroupNorm(_GROUPS, channels, eps=_EPS) if kind == "group" else PositionNorm(channels)


def _conv(inner: int, outer: int, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, kernel, padding=kernel // 2)


class _ResBlock(nn.Module):
    def __init__(self, inner: int, outer: int, norm: Norm, kernel: int = 3) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(norm, inner), _conv(inner, outer, kernel)
        self.norm2, self.conv2 = _norm(norm, outer), _conv(outer, outer, kernel)
        self.nin_shortcut = _conv(inner, outer, 1) if inner != outer else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return cast(Tensor, h + (x if self.nin_shortcut is None else self.nin_shortcut(x)))


class _Attention(nn.Module):
    """One head over all positions of a picture."""

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        self.norm = _norm(norm, channels)
        self.q, self.k, self.v, self.proj_out = (_conv(channels, channels, 1) for _ in range(4))

    def forward(self, x_NCYX: Tensor) -> Tensor:
        normed = self.norm(x_NCYX)
        q, k, v = (part(normed).flatten(2).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return x_NCYX + cast(Tensor, self.proj_out(y.reshape(x_NCYX.shape)))


class _Mid(nn.Module):
    def __init__(self, channels: int, norm: Norm, has_attention: bool, kernel: int = 3) -> None:
        super().__init__()
        self.block_1 = _ResBlock(channels, channels, norm, kernel)
        self.attn_1 = _Attention(channels, norm) if has_attention else nn.Identity()
        self.block_2 = _ResBlock(channels, channels, norm, kernel)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.block_2(self.attn_1(self.block_1(x))))


class _Resample(nn.Module):
    """A convolution that halves the resolution (stride 2, one column and row of zeros at the far sides), or doubles it."""

    def __init__(self, channels: int, is_up: bool) -> None:
        super().__init__()
        self.is_up = is_up
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if is_up else 2, padding=1 if is_up else 0)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest") if self.is_up else F.pad(x, (0, 1, 0, 1))))


class _Level(nn.Module):
    """The blocks of one resolution, then the change to the next one. Names as in Janus: block, attn, downsample or upsample."""

    def __init__(self, inner: int, outer: int, count: int, norm: Norm, has_attention: bool, kernel: int = 3) -> None:
        super().__init__()
        self.block = nn.ModuleList(_ResBlock(inner if index == 0 else outer, outer, norm, kernel) for index in range(count))
        self.attn = nn.ModuleList(_Attention(outer, norm) for _ in range(count if has_attention else 0))
        self.downsample: nn.Module | None = None
        self.upsample: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        for change in (self.downsample, self.upsample):
            if change is not None:
                x = change(x)
        return x


class _Encoder(nn.Module):
    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        channels, norm = config.channels, config.norm
        self.conv_in = _conv(3, channels[0])
        self.down = nn.ModuleList()
        for level, outer in enumerate(channels):
            is_last = level == len(channels) - 1
            kernel = config.encoder_kernel if is_last else 3
            stage = _Level(
                channels[max(level - 1, 0)], outer, config.num_res_blocks, norm, is_last and config.has_encoder_attention, kernel
            )
            stage.downsample = None if is_last else _Resample(outer, is_up=False)
            self.down.append(stage)
        self.mid = _Mid(channels[-1], norm, config.has_encoder_attention, config.encoder_kernel)
        self.norm_out = _norm(norm, channels[-1])
        self.conv_out = _conv(channels[-1], config.latent_channels, config.encoder_kernel)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for stage in self.down:
            x = stage(x)
        return cast(Tensor, self.conv_out(F.silu(self.norm_out(self.mid(x)))))


class _Decoder(nn.Module):
    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        channels, norm = config.channels[::-1], config.norm
        self.conv_in = _conv(config.latent_channels, channels[0])
        self.mid = _Mid(channels[0], norm, config.has_decoder_attention)
        self.up = nn.ModuleList()
        for level, outer in enumerate(channels):
            has_attention = level == 0 and config.has_decoder_attention
            stage = _Level(channels[max(level - 1, 0)], outer, config.num_res_blocks + 1, norm, has_attention)
            stage.upsample = None if level == len(channels) - 1 else _Resample(outer, is_up=True)
            self.up.append(stage)
        self.norm_out = _norm(norm, channels[-1])
        self.conv_out = _conv(channels[-1], 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for stage in self.up:
            x = stage(x)
        return cast(Tensor, self.conv_out(F.silu(self.norm_out(x))))


class _Codebook(nn.Module):
    def __init__(self, num_codes: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_codes, width)


class VQTokenizer(nn.Module):
    """Pixels are float32 [N, 3, Y, X] from -1 to 1, codes int64 [N, R, W] with R = Y / patch and W = X / patch."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _Encoder(config)
        self.decoder = _Decoder(config)
        self.quantize = _Codebook(config.num_codes, config.code_width)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.code_width, 1)
        self.post_quant_conv = nn.Conv2d(config.code_width, config.latent_channels, 1)

    @property
    def codebook(self) -> Tensor:
        """[codes, E], as the decoder reads it: every code of length 1."""
        return F.normalize(self.quantize.embedding.weight, dim=-1)

    def latents(self, pixels_N3YX: Tensor) -> Tensor:
        """What the encoder says, before it is rounded to codes: [N, R, W, E]."""
        z = self.quant_conv(self.encoder(pixels_N3YX)).permute(0, 2, 3, 1)
        return F.normalize(z.float(), dim=-1) if self.config.is_unit else z

    def nearest(self, latents_NRWE: Tensor) -> Tensor:
        """The code nearest to each latent, int64 [N, R, W]."""
        table = self.codebook if self.config.is_unit else self.quantize.embedding.weight
        flat = latents_NRWE.reshape(-1, table.shape[-1]).to(table.dtype)
        with torch.autocast(flat.device.type, enabled=False):  # rounded to bfloat16, near codes would be equally near
            distances = table.square().sum(-1) - 2 * flat @ table.T  # the latent's own length is the same for every code
        return distances.argmin(-1).view(latents_NRWE.shape[:-1])

    def encode(self, pixels_N3YX: Tensor) -> Tensor:
        """The codes of pictures."""
        return self.nearest(self.latents(pixels_N3YX))

    def pixels(self, latents_NRWE: Tensor) -> Tensor:
        """Pixels from points of the codebook; not clamped to -1 ... 1."""
        return cast(Tensor, self.decoder(self.post_quant_conv(latents_NRWE.permute(0, 3, 1, 2))))

    def decode(self, codes_NRW: Tensor) -> Tensor:
        """Pixels of codes; not clamped to -1 ... 1."""
        return self.pixels(self.codebook[codes_NRW])
