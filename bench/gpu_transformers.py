"""The baseline of whole models for `bench.gpu`: continuous batching of transformers (`generate_batch`) on a random model of the same shape.

Without flash-attn, which needs a build of its own, its attention is torch's SDPA over gathered keys; every row says whether that handicap
was there. Called last by the parts that step whole models, so that whatever goes wrong here costs none of our rows.
"""

from __future__ import annotations

import gc
import importlib.util
from functools import partial
from typing import Any

import torch

from bench.gpu_clock import Clock
from bench.gpu_models import config_of, drop
from bench.gpu_score import Line
from service.model.config import ModelConfig

NAME = "transformers generate_batch"


def described(config: ModelConfig) -> Any:
    """The shape as transformers describes it."""
    import transformers

    own: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.feed_forward_width,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_width,
        "max_position_embeddings": config.max_context,
        "tie_word_embeddings": config.has_tied_head,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    if config.has_post_norms:
        kinds = ["full_attention" if layer.window is None else "sliding_attention" for layer in config.layers]
        window = next(layer.window for layer in config.layers if layer.window is not None)
        return transformers.Gemma3TextConfig(**own, layer_types=kinds, sliding_window=window)
    return (transformers.Qwen3Config if config.has_qk_norm else transformers.LlamaConfig)(**own)


def build(clock: Clock, name: str) -> Any:
    from transformers import AutoModelForCausalLM

    drop(clock)
    gc.collect()
    clock.free()
    with clock.device:
        model = AutoModelForCausalLM.from_config(described(config_of(clock, name)), dtype=clock.dtype, attn_implementation="sdpa")
    return model.eval()


def generate(clock: Clock, name: str, count: int, prompt_len: int, num_drawn: int) -> dict[str, Any]:
    """Greedy, all prompts at once. baseline_s: seconds a token; of one sequence between its ids, of several the whole time over all ids,
    from the first prompt taken up to the last answer's end."""
    from transformers import GenerationConfig
    from transformers.generation import ContinuousBatchingConfig

    count, prompt_len, num_drawn = clock.sized((count, prompt_len, num_drawn), (2 if count > 1 else 1, 5, 4))
    model, vocab_size = build(clock, name), config_of(clock, name).vocab_size
    prompts = torch.randint(2, vocab_size, (count, prompt_len)).tolist()
    greedy = GenerationConfig(max_new_tokens=num_drawn, do_sample=False, eos_token_id=-1, pad_token_id=0, bos_token_id=1)
    sizes = (
        ContinuousBatchingConfig(max_memory_percent=0.6) if clock.is_gpu else ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    )
    run = partial(model.generate_batch, generation_config=greedy, continuous_batching_config=sizes, record_timestamps=True)
    run(prompts[:1])  # compiles and captures
    answers = list(run(prompts).values())
    failed = [answer.error for answer in answers if answer.error] or ["too few ids"] * (sum(len(a.generated_tokens) for a in answers) == 0)
    if failed:
        raise RuntimeError(f"transformers: {failed[0]}")
    # Without the capturing of graphs, which comes before.
    wall_s = max(answer.lifespan[1] for answer in answers) - min(answer.lifespan[0] for answer in answers)
    num_ids = sum(len(answer.generated_tokens) for answer in answers)
    stamps = answers[0].timestamps or []
    token_s = (stamps[-1] - stamps[0]) / (len(stamps) - 1) if count == 1 and len(stamps) > 2 else wall_s / num_ids
    has_flash = importlib.util.find_spec("flash_attn") is not None
    handicap = "none: flash-attn is there" if has_flash else "flash-attn is missing, so attention is torch's SDPA"
    return {"baseline": NAME, "baseline_s": token_s, "wall_s": wall_s, "tokens": num_ids, "handicap": handicap}


def lines_of(works: dict[str, tuple[str, int, int, int]], lines: tuple[Line, ...]) -> list[Line]:
    """works: line -> (model, prompts, ids of each, ids drawn). The same lines, with the baseline as their one case."""
    about = {line.name: line for line in lines}
    return [
        Line(
            name,
            about[name].workload,
            about[name].limit,
            about[name].floor,
            about[name].target,
            {NAME: lambda clock, work=work: generate(clock, *work)},  # type: ignore[misc]
        )
        for name, work in works.items()
    ]
