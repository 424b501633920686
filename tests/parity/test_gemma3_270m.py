"""Gemma 3 270M of the catalog: its ids are the published tokenizer's, float32 writes what transformers writes, int8 and int4 read nearly as
well, and int8 is the same alone and in a crowd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.ops import select_ops
from service.catalog import CATALOG, pull
from service.codec.prompt import Codec, load_codec
from service.model.families import read_config
from service.model.transformer import Precision, Transformer, build_transformer
from service.model.weights import open_weights
from service.scheduling.sampling import SamplingParams
from tests.parity.generate import generate
from tests.parity.steps import Steps
from tests.parity.test_smollm2_ids import agree_up_to_a_tie
from tests.parity.test_smollm2_text import PASSAGE, bits_per_byte

pytestmark = [pytest.mark.e2e, pytest.mark.long]
NEW_TOKENS = 32
COMPLETED = {
    "The opposite of hot is": " cold.",
    "Monday, Tuesday, Wednesday,": " Thursday, Friday, Saturday, Sunday",
    "Paris is the capital of": " France",
    "1, 2, 3, 4,": " 5, 6, 7, 8, 9",
    "The chemical symbol for gold is": " Au.",
}
PROMPTS = (*COMPLETED, "def fibonacci(n):\n    if n < 2:\n        return n\n", PASSAGE)  # the last is longer than the window of 512
# Of the published tokenizer.json.
PUBLISHED = {
    "Hello  world,\n\n  how are you?\t12": [9259, 138, 12392, 236764, 108, 138, 7843, 659, 611, 236881, 255968, 236770, 236778],
    "    return x\n": [140, 2060, 1123, 107],
    "🙂 ẞ": [240731, 65894],
}


@pytest.fixture(scope="module")
def gemma_path() -> Path:
    return pull(CATALOG["gemma-3-270m"]).path


@pytest.fixture(scope="module")
def codec(gemma_path: Path) -> Codec:
    return load_codec(gemma_path)


def build(path: Path, weights: str = "dense") -> Transformer:
    config = read_config(path).with_max_context(2048)
    precision = Precision(torch.float32, weights)  # type: ignore[arg-type]
    with torch.inference_mode():
        return build_transformer(config, open_weights(path, config), select_ops("cpu"), precision=precision)


def test_ids_are_the_published_ones(codec: Codec) -> None:
    for text, ids in PUBLISHED.items():
        assert codec.tokenizer.encode(text) == ids, text
        assert codec.tokenizer.decode(ids) == text
    assert codec.encode_text("Hello") == [2, 9259], "a prompt begins with <bos>"
    assert codec.eos_ids[:1] == (1,)


@pytest.fixture(scope="module")
def reference(gemma_path: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(str(gemma_path.parent), gguf_file=gemma_path.name, dtype=torch.float32).eval()


def test_float32_ids_equal_transformers(gemma_path: Path, codec: Codec, reference: Any) -> None:
    prompts = [codec.encode_text(text) for text in PROMPTS]
    assert len(prompts[-1]) > 512
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0)
    answers = generate(build(gemma_path), prompts, sampling, kv_dtype=torch.float32).ids
    same = [agree_up_to_a_tie(reference, prompt, ids) for prompt, ids in zip(prompts, answers, strict=True)]
    assert sum(same) > 0.8 * sum(map(len, answers)), f"too few positions without a tie: {same}"


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_text_is_completed_as_a_base_model_does(gemma_path: Path, codec: Codec, weights: str) -> None:
    prompts = [codec.encode_text(text) for text in COMPLETED]
    found = generate(build(gemma_path, weights), prompts, SamplingParams(max_tokens=16, temperature=0)).ids
    for ids, beginning in zip(found, COMPLETED.values(), strict=True):
        assert codec.tokenizer.decode(ids).startswith(beginning)


def test_int8_and_int4_bits_per_byte(gemma_path: Path, codec: Codec) -> None:
    ids = codec.encode_text(PASSAGE)
    exact = logits_of(build(gemma_path), ids, torch.float32)
    true = bits_per_byte(exact, ids)
    assert 0.5 < true < 1.2, "the model must be able to read: a wrong rotary or tokenizer shows here"
    for weights, bound in (("int8", 0.005), ("int4", 0.03)):
        found = logits_of(build(gemma_path, weights), ids, torch.int8)
        ours, agreement = bits_per_byte(found, ids), float((exact.argmax(-1) == found.argmax(-1)).float().mean())
        log_p, log_q = exact.log_softmax(-1), found.log_softmax(-1)
        divergence = float(torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum")) / len(ids)
        print(f"bits per byte: float32 {true:.4f}, {weights} {ours:.4f}, ratio {ours / true:.4f}")
        print(f"KL divergence from float32 {divergence:.4f} nats, the same likeliest id in {agreement:.1%} of places")
        assert abs(ours / true - 1) < bound


def logits_of(model: Transformer, ids: list[int], kv_dtype: torch.dtype) -> torch.Tensor:
    """In float32, for 262,144 ids a place are many."""
    steps = Steps(model, block_size=16, num_blocks=256, dtype=kv_dtype)
    return torch.cat([steps.run([(0, ids[at : at + 256])])[0] for at in range(0, len(ids), 256)])


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_ids_are_the_same_alone_in_a_crowd_and_after_preemption(gemma_path: Path, codec: Codec, weights: str) -> None:
    model = build(gemma_path, weights)
    prompts = [codec.encode_text(text) for text in PROMPTS]
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0)
    alone = [generate(model, [prompt], sampling).ids[0] for prompt in prompts]
    assert generate(model, prompts, sampling, max_batch_tokens=96).ids == alone
    short = generate(model, prompts[:6], sampling, num_blocks=60)
    assert short.preemptions >= 1
    assert short.ids == alone[:6]
