"""What int8 costs on real weights and real text, and that a row's numbers do not depend on its neighbours."""

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


def build(path: Path, *, is_int8: bool = False) -> Transformer:
    config = read_config(path).with_max_context(1024)
    with torch.inference_mode():
        return build_transformer(config, open_weights(path, config), select_ops("cpu"), precision=Precision(torch.float32, is_int8))


def bits_per_byte(steps: Steps, ids: list[int], text: str) -> float:
    logits = torch.cat([steps.run([(0, ids[at : at + 256])])[0] for at in range(0, len(ids), 256)])
    nats = torch.nn.functional.cross_entropy(logits[:-1].double(), torch.tensor(ids[1:]), reduction="sum")
    return float(nats) / math.log(2) / len(text.encode())


@pytest.fixture(scope="module")
def int8_steps(smollm2_path: Path) -> Steps:
    return Steps(build(smollm2_path, is_int8=True), block_size=16, num_blocks=96, dtype=torch.bfloat16)


def test_int8_bits_per_byte_within_one_percent(smollm2_path: Path, int8_steps: Steps) -> None:
    ids = load_codec(smollm2_path).encode_text(PASSAGE)
    exact = bits_per_byte(Steps(build(smollm2_path), block_size=16, num_blocks=96), ids, PASSAGE)
    quantised = bits_per_byte(int8_steps, ids, PASSAGE)
    print(f"bits per byte: float32 {exact:.4f}, int8 {quantised:.4f}, ratio {quantised / exact:.4f}")
    assert 0.5 < exact < 1.2, "the model must be able to read: a wrong rotary or tokenizer shows here"
    assert abs(quantised / exact - 1) < 0.01


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
