"""What surrounds a CUDA graph, run eagerly on the CPU: static inputs, filling them, and padding that writes nothing."""

from __future__ import annotations

from dataclasses import replace

import torch

from bench.models import SHAPES, build_runner, step_of
from kernels.ops import select_ops
from service.runner.graphs import DecodeGraphs, _fill
from service.runner.inputs import build_inputs
from service.vocabulary import PictureIds


def test_padded_static_inputs_equal_the_plain_step() -> None:
    device = torch.device("cpu")
    runner = build_runner(SHAPES["tiny"], select_ops("reference"), device=device, dtype=torch.float32, num_blocks=3 * 2 * 4)
    runner.cache.pool.normal_()
    kept = runner.cache.pool.clone()
    plan = step_of(runner, [(40, [5]), (0, [6]), (63, [7])], 64)
    want = runner.logits(runner.forward(plan))
    written = runner.cache.pool.clone()

    graphs = DecodeGraphs(runner._compute, num_groups=2, max_context=64, block_size=16, max_sequences=8, device=device)
    static = graphs._static_inputs(8)
    runner.cache.pool.copy_(kept)
    with torch.inference_mode():
        runner._compute(static)
        assert torch.equal(runner.cache.pool, kept), "capturing must not write"
        inputs = build_inputs(plan, 2, 16, device)
        static.ids[:3], static.positions[:3] = inputs.ids, inputs.positions
        for target, source in zip(static.batches, inputs.batches, strict=True):
            _fill(target, source, 3)
        got = runner.model.project(runner._compute(static)[:3])
    torch.testing.assert_close(runner.cache.pool, written, atol=1e-4, rtol=1e-4)
    assert torch.equal(runner.cache.pool == kept, written == kept), "the same places are written"
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_static_inputs_say_where_pictures_begin() -> None:
    """Codes beside text, then text alone in the same graph: nothing of the step before stays."""
    device = torch.device("cpu")
    tiny = SHAPES["tiny"]
    layers = tuple(replace(layer, radius=(1, 1) if layer.window else None) for layer in tiny.layers)
    config = replace(tiny, layers=layers, pictures=PictureIds(100, 64, 4, 4, 1, 2, 3))
    runner = build_runner(config, select_ops("reference"), device=device, dtype=torch.float32, num_blocks=3 * 2 * 4)
    runner.cache.pool.normal_()
    graphs = DecodeGraphs(runner._compute, num_groups=2, has_pictures=True, max_context=64, block_size=16, max_sequences=8, device=device)
    static = graphs._static_inputs(8)
    text = step_of(runner, [(40, [5]), (0, [6]), (63, [7])], 64)
    codes = step_of(runner, [(40, [105]), (0, [106]), (63, [7])], 64)
    starts = ((31,), (0,), ())
    codes = replace(codes, slices=tuple(replace(piece, grid_starts=own) for piece, own in zip(codes.slices, starts, strict=True)))
    with torch.inference_mode():
        for plan in (codes, text):
            inputs = build_inputs(plan, 2, 16, device)
            static.ids[:3], static.positions[:3] = inputs.ids, inputs.positions
            for target, source in zip(static.batches, inputs.batches, strict=True):
                _fill(target, source, 3)
            torch.testing.assert_close(
                runner.model.project(runner._compute(static)[:3]), runner.logits(runner.forward(plan)), atol=1e-5, rtol=1e-5
            )
            assert static.batches[0].grid_start is not None
            assert static.batches[0].grid_start.tolist() == ([31, 0, -1] if plan is codes else [-1] * 3) + [-1] * 5
