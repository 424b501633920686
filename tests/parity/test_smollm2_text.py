"""What int8 and 4 bits cost on real weights and real text, and that a row's numbers do not depend on its neighbours."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from kernels.ops import select_ops
from service.codec.prompt import load_codec
from service.model.families import read_config
from service.model.transformer import Precision, Transformer, build_transformer
from service.model.weights import open_weights
from tests.parity.steps import Steps

pytestmark = pytest.mark.e2e
PASSAGE = (Path(__file__).parents[1] / "data" / "passage.txt").read_text()


def build(path: Path, weights: str = "dense") -> Transformer:
    config = read_config(path).with_max_context(1024)
    precision = Precision(torch.float32, weights)  # type: ignore[arg-type]
    with torch.inference_mode():
        return build_transformer(config, open_weights(path, config), select_ops("cpu"), precision=precision)


def bits_per_byte(logits: torch.Tensor, ids: list[int]) -> float:
    nats = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum")
    return float(nats) / math.log(2) / len(PASSAGE.encode())


@pytest.fixture(scope="module")
def int8_steps(smollm2_path: Path) -> Steps:
    return Steps(build(smollm2_path, "int8"), block_size=16, num_blocks=96, dtype=torch.int8)


def logits_of(steps: Steps, ids: list[int]) -> torch.Tensor:
    return torch.cat([steps.run([(0, ids[at : at + 256])])[0] for at in range(0, len(ids), 256)]).double()


@pytest.fixture(scope="module")
def passage(smollm2_path: Path) -> tuple[list[int], torch.Tensor]:
    """Ids, and float32's logits of them."""
    ids = load_codec(smollm2_path).encode_text(PASSAGE)
    return ids, logits_of(Steps(build(smollm2_path), block_size=16, num_blocks=96), ids)


def compared(steps: Steps, name: str, passage: tuple[list[int], torch.Tensor]) -> float:
    """Bits per byte over float32's; prints how else the two agree."""
    ids, exact = passage
    found = logits_of(steps, ids)
    true, ours = bits_per_byte(exact, ids), bits_per_byte(found, ids)
    log_p, log_q = exact.log_softmax(-1), found.log_softmax(-1)
    divergence = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    agreement = float((exact.argmax(-1) == found.argmax(-1)).double().mean())
    print(f"bits per byte: float32 {true:.4f}, {name} {ours:.4f}, ratio {ours / true:.4f}")
    print(f"KL divergence from float32 {divergence:.4f} nats, the same likeliest id in {agreement:.1%} of places")
    assert 0.5 < true < 1.2, "the model must be able to read: a wrong rotary or tokenizer shows here"
    return ours / true


def test_int8_bits_per_byte_within_half_a_percent(int8_steps: Steps, passage: tuple[list[int], torch.Tensor]) -> None:
    assert abs(compared(int8_steps, "int8", passage) - 1) < 0.005


def test_a_files_own_4_bits_within_half_a_percent(smollm2_path: Path, passage: tuple[list[int], torch.Tensor]) -> None:
    """They are what float32 computes with too: only activations and K/V are coarser."""
    steps = Steps(build(smollm2_path, "int4"), block_size=16, num_blocks=96, dtype=torch.int8)
    assert abs(compared(steps, "int4", passage) - 1) < 0.005


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=str)
def test_keys_and_values_alone_within_half_a_percent(
    smollm2_path: Path, passage: tuple[list[int], torch.Tensor], dtype: torch.dtype
) -> None:
    """Beside float32 weights, so that nothing else is coarser. Every layer of this model sees everything."""
    steps = Steps(build(smollm2_path), block_size=16, num_blocks=96, dtype=dtype)
    assert abs(compared(steps, f"K/V in {dtype}", passage) - 1) < 0.005


@pytest.mark.long
def test_4_bits_that_are_made_at_load_within_three_percent(
    smollm2_path: Path, passage: tuple[list[int], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the file had none; the hardest case there is, because its numbers have been rounded to 4 bits once already."""
    monkeypatch.setattr("service.model.weights.WeightSource.layers_have_groups", lambda source, config: False)
    steps = Steps(build(smollm2_path, "int4"), block_size=16, num_blocks=96, dtype=torch.int8)
    assert abs(compared(steps, "int4, made at load", passage) - 1) < 0.03


def test_int8_rows_are_bit_equal_alone_and_in_a_crowd(smollm2_path: Path, int8_steps: Steps) -> None:
    ids = load_codec(smollm2_path).encode_text(PASSAGE)[:240]
    for sequence in range(20, 40):
        if sequence in int8_steps.tables:
            int8_steps.forget(sequence)
    alone = int8_steps.run([(20, ids[:60])])[0][-1]
    alone_next = int8_steps.run([(20, ids[60:61])])[0][0]
    int8_steps.run([(21, ids[:60])])
    crowd = int8_steps.run([(22, ids[100:101]), (21, ids[60:61]), (23, ids[10:50]), (24, ids[:60])])
    assert torch.equal(crowd[1][0], alone_next)
    assert torch.equal(crowd[3][-1], alone)
