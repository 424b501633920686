"""Greedy ids of the default model: equal to transformers' in float32; in int8 equal alone, in a crowd and after preemption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.ops import select_ops
from service.codec.prompt import Codec, load_codec
from service.model.families import read_config
from service.model.transformer import Precision, Transformer, build_transformer
from service.model.weights import open_weights
from service.scheduling.sampling import SamplingParams
from tests.parity.generate import generate
from tests.parity.prompts import PROMPTS

pytestmark = pytest.mark.e2e
NEW_TOKENS = 48
# Where the reference's two top logits are closer than this, rounding decides, and the texts may part.
TIE = 1e-3


@pytest.fixture(scope="module")
def codec(smollm2_path: Path) -> Codec:
    return load_codec(smollm2_path)


def build(path: Path, *, is_int8: bool) -> Transformer:
    config = read_config(path).with_max_context(1024)
    precision = Precision(torch.float32, "int8" if is_int8 else "dense")
    with torch.inference_mode():
        return build_transformer(config, open_weights(path, config), select_ops("cpu"), precision=precision)


def chat(codec: Codec, text: str) -> list[int]:
    return codec.encode_chat([{"role": "user", "content": text}])


@pytest.fixture(scope="module")
def reference(smollm2_path: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        str(smollm2_path.parent), gguf_file=smollm2_path.name, dtype=torch.float32
    ).eval()


def agree_up_to_a_tie(reference: Any, prompt: list[int], ids: list[int]) -> int:
    """How many ids were compared. One pass of the reference over prompt and answer gives its choice at every position."""
    with torch.no_grad():
        logits = reference(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    top = logits.topk(2)
    for position, token in enumerate(ids):
        if float(top.values[position, 0] - top.values[position, 1]) < TIE:
            return position
        assert token == int(top.indices[position, 0]), f"id {position} of the answer differs"
    return len(ids)


@pytest.mark.parametrize("count", [4, pytest.param(30, marks=pytest.mark.long)])
def test_float32_ids_equal_transformers(smollm2_path: Path, codec: Codec, reference: Any, count: int) -> None:
    prompts = [chat(codec, text) for text in PROMPTS[:count]]
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0)
    answers = generate(build(smollm2_path, is_int8=False), prompts, sampling, kv_dtype=torch.float32)
    compared = [agree_up_to_a_tie(reference, prompt, ids) for prompt, ids in zip(prompts, answers.ids, strict=True)]
    assert sum(compared) > 0.8 * NEW_TOKENS * count, f"too few positions without a tie: {compared}"


@pytest.mark.parametrize("count", [6, pytest.param(20, marks=pytest.mark.long)])
def test_int8_ids_are_the_same_alone_in_a_crowd_and_after_preemption(smollm2_path: Path, codec: Codec, count: int) -> None:
    model = build(smollm2_path, is_int8=True)
    prompts = [chat(codec, text) for text in PROMPTS]
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0)
    alone = [generate(model, [prompt], sampling).ids[0] for prompt in prompts[:count]]
    for first in {0, max(count - 16, 0)}:
        crowd = generate(model, prompts[first : first + 16], sampling, max_batch_tokens=96)
        checked = slice(first, min(first + 16, count))
        assert crowd.ids[: checked.stop - first] == alone[checked]
    preempted = generate(model, prompts[:count], sampling, num_blocks=14)
    assert preempted.preemptions >= 1
    assert preempted.ids == alone


def test_a_prompt_that_is_found_to_its_end(smollm2_path: Path, codec: Codec) -> None:
    """Its last token is computed and not written, also while the one who wrote it goes on."""
    prompt = chat(codec, " ".join(PROMPTS[:6]))[:48]
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0)
    answers = generate(build(smollm2_path, is_int8=True), [prompt] * 3 + [prompt[:47]], sampling)
    assert answers.ids[1:3] == [answers.ids[0]] * 2
    assert answers.cached_tokens == [0, 47, 47, 32]
