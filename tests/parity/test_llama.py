"""Logits of tiny random models equal transformers', however the text is cut into steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.ops import select_ops
from service.model.families import read_config
from service.model.transformer import Precision, build_transformer
from service.model.weights import open_weights
from tests.parity.steps import Steps

SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 96,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 96,
}
# Every option that changes the arithmetic appears once.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
    "llama3_scaled": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 24,
        },
        "tie_word_embeddings": True,
    },
    "mistral": {"sliding_window": 9},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma3": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 9,
        "query_pre_attn_scalar": 24,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 2.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        },
    },
}
TOKENS = [(7 * i * i + 3 * i + 1) % 131 for i in range(53)]
OTHER = [(5 * i * i + 11 * i + 2) % 131 for i in range(37)]


def build_reference(family: str) -> Any:
    import transformers

    names = {"llama3_scaled": "Llama", "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma3": "Gemma3"}
    name = names[family]
    torch.manual_seed(7)
    kind = f"{name}TextConfig" if name == "Gemma3" else f"{name}Config"
    config = getattr(transformers, kind)(**SIZES, **FAMILIES[family], attn_implementation="eager")
    model = getattr(transformers, f"{name}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # the default initialisation is so small that wrong attention would not show
            parameter.normal_(0, 0.12 if parameter.dim() > 1 else 0.3)
    return model


@pytest.fixture(scope="module", params=list(FAMILIES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    reference = build_reference(request.param)
    path = tmp_path_factory.mktemp(request.param)
    reference.save_pretrained(path)
    return reference, path


@pytest.fixture(scope="module", params=["reference", "cpu"])
def steps_of(request: pytest.FixtureRequest, pair: tuple[Any, Path]) -> Any:
    config = read_config(pair[1])
    with torch.inference_mode():
        model = build_transformer(config, open_weights(pair[1], config), select_ops(request.param), precision=Precision(torch.float32))
    return lambda: Steps(model)


def expected(reference: Any, tokens: list[int]) -> Tensor:
    with torch.no_grad():
        return reference(torch.tensor([tokens])).logits[0].float()  # type: ignore[no-any-return]


def assert_close(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert float((got - want).abs().max()) <= 1e-4


def test_whole_prefill(pair: tuple[Any, Path], steps_of: Any) -> None:
    assert_close(steps_of().run([(0, TOKENS)])[0], expected(pair[0], TOKENS))


@pytest.mark.parametrize("chunk", [1, 3, 4, 17])
def test_chunks_of_any_size(pair: tuple[Any, Path], steps_of: Any, chunk: int) -> None:
    steps = steps_of()
    parts = [steps.run([(0, TOKENS[at : at + chunk])])[0] for at in range(0, len(TOKENS), chunk)]
    assert_close(torch.cat(parts), expected(pair[0], TOKENS))


def test_ragged_batch_of_prefill_and_decode(pair: tuple[Any, Path], steps_of: Any) -> None:
    steps = steps_of()
    first = steps.run([(0, TOKENS[:20]), (1, OTHER[:5])])
    second = steps.run([(0, TOKENS[20:21]), (1, OTHER[5:30]), (2, TOKENS[:7])])
    third = steps.run([(0, TOKENS[21:22]), (1, OTHER[30:31]), (2, TOKENS[7:8])])
    assert_close(torch.cat([first[0], second[0], third[0]]), expected(pair[0], TOKENS[:22]))
    assert_close(torch.cat([first[1], second[1], third[1]]), expected(pair[0], OTHER[:31]))
    assert_close(torch.cat([second[2], third[2]]), expected(pair[0], TOKENS[:8]))


def test_prefix_hit(pair: tuple[Any, Path], steps_of: Any) -> None:
    steps = steps_of()
    steps.run([(0, TOKENS[:24])])
    steps.share(0, 1, 20)
    mixed = TOKENS[:20] + OTHER[:9]
    assert_close(steps.run([(1, OTHER[:9])])[0], expected(pair[0], mixed)[20:])


def test_preempted_and_resumed(pair: tuple[Any, Path], steps_of: Any) -> None:
    steps = steps_of()
    steps.run([(0, TOKENS[:24]), (1, OTHER)])
    steps.forget(0)
    steps.run([(1, [5, 6, 7])])
    again = steps.run([(0, TOKENS[:30])])[0]
    assert_close(torch.cat([again, steps.run([(0, TOKENS[30:31])])[0]]), expected(pair[0], TOKENS[:31]))
