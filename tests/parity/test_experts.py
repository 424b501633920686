"""Logits of tiny random mixtures of experts equal transformers', however the text is cut into steps, in dense and quantised weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from kernels.ops import select_ops
from service.model.families import read_config
from service.model.transformer import Precision, Transformer, build_transformer
from service.model.weights import open_weights
from tests.parity.steps import Steps
from tests.parity.test_llama import OTHER, SIZES, TOKENS, assert_close, expected

# Layers with experts and without, normalised shares and others, with a shared expert and without.
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "norm_topk_prob": True, "mlp_only_layers": [1]},
    "Qwen2Moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
        "decoder_sparse_step": 2,
    },
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 9},
}


@pytest.fixture(scope="module", params=list(FAMILIES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    import transformers

    torch.manual_seed(7)
    config = getattr(transformers, f"{request.param}Config")(**SIZES, **FAMILIES[request.param], attn_implementation="eager")
    model = getattr(transformers, f"{request.param}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # of experts large, so that wrong ones would show
            parameter.normal_(0, 0.3 if parameter.dim() < 2 or "experts" in name else 0.12)
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    return model, path


def build(path: Path, ops: Literal["cpu", "reference"], weights: Literal["dense", "int8", "int4"] = "dense") -> Transformer:
    config = read_config(path)
    with torch.inference_mode():
        return build_transformer(config, open_weights(path, config), select_ops(ops), precision=Precision(torch.float32, weights))


@pytest.fixture(scope="module", params=["reference", "cpu"])
def model(request: pytest.FixtureRequest, pair: tuple[Any, Path]) -> Transformer:
    return build(pair[1], request.param)


@pytest.mark.parametrize("chunk", [1, 17, len(TOKENS)])
def test_chunks_of_any_size(pair: tuple[Any, Path], model: Transformer, chunk: int) -> None:
    steps = Steps(model)
    parts = [steps.run([(0, TOKENS[at : at + chunk])])[0] for at in range(0, len(TOKENS), chunk)]
    assert_close(torch.cat(parts), expected(pair[0], TOKENS))


def test_ragged_batch_of_prefill_and_decode(pair: tuple[Any, Path], model: Transformer) -> None:
    steps = Steps(model)
    first = steps.run([(0, TOKENS[:20]), (1, OTHER[:5])])
    second = steps.run([(0, TOKENS[20:21]), (1, OTHER[5:30])])
    assert_close(torch.cat([first[0], second[0]]), expected(pair[0], TOKENS[:21]))
    assert_close(torch.cat([first[1], second[1]]), expected(pair[0], OTHER[:30]))


@pytest.mark.parametrize(("weights", "most"), [("int8", 3e-3), ("int4", 2e-2)])
def test_quantised_weights_are_near_and_company_changes_no_bit(pair: tuple[Any, Path], weights: Any, most: float) -> None:
    """most: KL divergence from float32, nats, mean over the text. Random weights are harder than trained ones."""
    model = build(pair[1], "cpu", weights)
    together = Steps(model).run([(0, TOKENS), (1, OTHER)])
    assert divergence(together[0], expected(pair[0], TOKENS)) < most
    steps = Steps(model)
    alone = torch.cat([steps.run([(0, [token])])[0] for token in OTHER])
    assert torch.equal(alone, together[1])


def divergence(got: Tensor, want: Tensor) -> float:
    return float((want.softmax(-1) * (want.log_softmax(-1) - got.log_softmax(-1))).sum(-1).mean())
