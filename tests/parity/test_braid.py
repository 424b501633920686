"""A stream of text and pictures gives the logits of the rule written out, however it is cut into steps, and the same ids through the
scheduler, whoever else is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.ops import select_ops
from service.model.families import read_config
from service.model.rotation import RotatedSource
from service.model.transformer import Precision, Transformer, build_transformer
from service.model.weights import open_weights
from service.scheduling.sampling import SamplingParams
from tests.parity.braid import CONFIG, OTHER, PICTURES, STREAM, codes, dense_logits, grid_starts, random_weights, text, write_folder
from tests.parity.generate import generate
from tests.parity.steps import Steps
from training.decoder import NamedSource, hidden, teachable

WEIGHTS = random_weights()
GREEDY = SamplingParams(max_tokens=30, temperature=0.0)


@pytest.fixture(scope="module", params=["reference", "cpu"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    folder = write_folder(tmp_path_factory.mktemp("braid"), WEIGHTS)
    config = read_config(folder)
    assert config == CONFIG
    with torch.inference_mode():
        return build_transformer(config, open_weights(folder, config), select_ops(request.param), precision=Precision(torch.float32))


@pytest.fixture(scope="module")
def expected() -> Callable[[list[int]], Tensor]:
    known: dict[tuple[int, ...], Tensor] = {}
    return lambda tokens: known.setdefault(tuple(tokens), dense_logits(WEIGHTS, tokens))


Expected = Callable[[list[int]], Tensor]


def assert_close(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert float((got - want).abs().max()) <= 1e-4


def test_whole_prefill(model: Transformer, expected: Expected) -> None:
    assert_close(Steps(model).run([(0, STREAM)])[0], expected(STREAM))


def test_the_mask_and_the_places_matter(expected: Expected) -> None:
    """Each of them alone changes the logits by far more than the tolerance, so that a model without it would fail here."""
    for name in ("grid_rows", "grid_columns"):
        without = dense_logits({**WEIGHTS, name: torch.zeros_like(WEIGHTS[name])}, STREAM)
        assert float((without - expected(STREAM)).abs().max()) > 0.1
    for part in ({"radius": None}, {"window": None, "sink": 0}, {"sink": 0}):
        layers = tuple(replace(layer, **part) for layer in CONFIG.layers)  # type: ignore[arg-type]
        assert float((dense_logits(WEIGHTS, STREAM, replace(CONFIG, layers=layers)) - expected(STREAM)).abs().max()) > 0.1


@pytest.mark.parametrize("chunk", [1, 3, 4, 17])
def test_chunks_of_any_size(model: Transformer, expected: Expected, chunk: int) -> None:
    steps = Steps(model)
    parts = [steps.run([(0, STREAM[at : at + chunk])])[0] for at in range(0, len(STREAM), chunk)]
    assert_close(torch.cat(parts), expected(STREAM))


def test_ragged_batch_of_prefill_and_decode(model: Transformer, expected: Expected) -> None:
    """Codes beside text, in decodes and in prefills."""
    steps, plain = Steps(model), text(9, 30)
    first = steps.run([(0, STREAM[:20]), (1, OTHER[:5])])
    second = steps.run([(0, STREAM[20:21]), (1, OTHER[5:33]), (2, plain[:7])])
    third = steps.run([(0, STREAM[21:22]), (1, OTHER[33:34]), (2, plain[7:8])])
    assert_close(torch.cat([first[0], second[0], third[0]]), expected(STREAM)[:22])
    assert_close(torch.cat([first[1], second[1], third[1]]), expected(OTHER)[:34])
    assert_close(torch.cat([second[2], third[2]]), expected(plain)[:8])


def test_prefix_hit_inside_a_picture(model: Transformer, expected: Expected) -> None:
    steps = Steps(model)
    steps.run([(0, STREAM[:30])])
    steps.share(0, 1, 20)
    mixed = [*STREAM[:20], *codes(6)[:8], PICTURES.end_id, *text(7, 4)]
    assert_close(steps.run([(1, mixed[20:])])[0], expected(mixed)[20:])


def test_preempted_and_resumed(model: Transformer, expected: Expected) -> None:
    steps = Steps(model)
    steps.run([(0, STREAM[:24]), (1, OTHER)])
    steps.forget(0)
    steps.run([(1, [70, 61, 5])])
    again = steps.run([(0, STREAM[:30])])[0]
    assert_close(torch.cat([again, steps.run([(0, STREAM[30:31])])[0]]), expected(STREAM)[:31])


def test_rotated_for_int8_it_is_the_same_function(expected: Expected) -> None:
    """The rotation alone: dense weights, so that only its own rounding is left."""
    source = RotatedSource(NamedSource(WEIGHTS), CONFIG)
    turned = build_transformer(replace(CONFIG, has_tied_head=False), source, select_ops("reference"), precision=Precision(torch.float32))
    torch.testing.assert_close(Steps(turned).run([(0, STREAM)])[0], expected(STREAM), atol=2e-3, rtol=1e-3)


def test_it_can_be_taught(expected: Expected) -> None:
    """What is trained gives the logits that are served, and gradients reach the vectors of every row and column of the grid."""
    taught = teachable(CONFIG, NamedSource(WEIGHTS))
    starts = torch.tensor(grid_starts(STREAM))
    logits = taught.logits(*hidden(taught, torch.tensor([STREAM]), starts[None]), torch.arange(len(STREAM)))
    assert_close(logits.detach(), expected(STREAM))
    logits.square().mean().backward()  # type: ignore[no-untyped-call]
    for table in (taught.grid_rows, taught.grid_columns):
        assert table is not None
        assert table.grad is not None
        assert bool((table.grad.abs().sum(-1) > 0).all())


def greedy(prompt: list[int], length: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(length):
        tokens.append(int(dense_logits(WEIGHTS, tokens)[-1].argmax()))
        if tokens[-1] in CONFIG.eos_ids:
            break
    return tokens[len(prompt) :]


def test_ids_through_the_scheduler(model: Transformer) -> None:
    """Alone, together, in small steps, with prefix hits, and preempted: the ids of the dense model each time."""
    prompts = [STREAM[:20], OTHER, STREAM[:20] + codes(9)[:3], STREAM, OTHER[:12]]
    want = [greedy(prompt, GREEDY.max_tokens) for prompt in prompts]
    assert any(PICTURES.is_code(token) for ids in want for token in ids), "a continuation without codes would show little"
    together = generate(model, prompts, GREEDY, kv_dtype=torch.float32)
    assert together.ids == want
    assert generate(model, prompts, GREEDY, kv_dtype=torch.float32, max_batch_tokens=7).ids == want
    tight = generate(model, prompts, GREEDY, kv_dtype=torch.float32, num_blocks=33, max_batch_tokens=16)
    assert tight.ids == want
    assert tight.preemptions > 0
    again = generate(model, [STREAM, STREAM], GREEDY, kv_dtype=torch.float32)
    assert again.ids == [want[3]] * 2
    assert max(again.cached_tokens) > 0
