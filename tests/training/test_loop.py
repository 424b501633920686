"""The loop: a run that was interrupted ends as one that was not, training stops when nothing improves, and rates follow the schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from training.log import read_csv
from training.loop import Schedule, products_in, run, step_seed
from training.ranks import Rank


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """They cost more than all else here; test_log looks at them."""
    monkeypatch.setattr("training.log.plot_curves", lambda folder, name: None)


class Interruption(Exception):
    pass


class Line:
    """Fits a line with dropout, so that a step depends on torch's own generator; held-out figures are as told, else the loss."""

    name = "line"

    def __init__(self, told: list[float] | None = None, stop_at: int | None = None) -> None:
        torch.manual_seed(7)
        self.module = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.optimizers = [torch.optim.AdamW(self.module.parameters(), lr=0.1)]
        self.told, self.stop_at = told, stop_at
        self.rates: list[float] = []
        self.evaluated: list[bool] = []

    def step(self, step: int) -> Mapping[str, float]:
        if step == self.stop_at:
            raise Interruption
        self.rates.append(self.optimizers[0].param_groups[0]["lr"])
        x = torch.randn(16, 4)
        loss = (self.module(x)[:, 0] - x.sum(1)).square().mean()
        loss.backward()
        self.optimizers[0].step()
        self.optimizers[0].zero_grad()
        return {"loss": loss.item()}

    def evaluate(self) -> Mapping[str, float]:
        self.evaluated.append(self.module.training or torch.is_grad_enabled())
        x = torch.linspace(-1, 1, 64).view(16, 4)
        return {"held_out": self.told.pop(0) if self.told else (self.module(x)[:, 0] - x.sum(1)).square().mean().item()}

    def picture(self, folder: Path) -> None:
        (folder / "sheet.txt").write_text("drawn")


SCHEDULE = Schedule(steps=30, warmup_steps=5, evaluate_every=7, save_every=4)


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(one.state_dict()[name], tensor) for name, tensor in other.state_dict().items())


@pytest.mark.parametrize("stop_at", [3, 4, 13, 28])
def test_an_interrupted_run_ends_in_the_same_weights(tmp_path: Path, stop_at: int) -> None:
    whole = Line()
    run(whole, SCHEDULE, tmp_path / "whole", Rank())
    first = Line(stop_at=stop_at)
    with pytest.raises(Interruption):
        run(first, SCHEDULE, tmp_path / "parts", Rank())
    second = Line()
    assert not same(second.module, whole.module)
    run(second, SCHEDULE, tmp_path / "parts", Rank())
    assert same(second.module, whole.module)
    assert len(second.rates) == 30 - stop_at // 4 * 4  # from the last checkpoint, not from the beginning
    logs = [read_csv(tmp_path / name / "held_out.csv") for name in ("whole", "parts")]
    assert [log["step"] for log in logs] == [[7, 14, 21, 28, 30]] * 2
    assert logs[0]["held_out"] == logs[1]["held_out"]


def test_a_finished_run_does_nothing_more(tmp_path: Path) -> None:
    first, second = Line(), Line()
    seconds = run(first, SCHEDULE, tmp_path, Rank())
    assert run(second, SCHEDULE, tmp_path, Rank()) == seconds > 0
    assert second.rates == []
    assert same(first.module, second.module)


def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    """The control of the tests above: the generator's seed does decide."""
    one, other = Line(), Line()
    run(one, SCHEDULE, tmp_path / "one", Rank(), seed=0)
    run(other, SCHEDULE, tmp_path / "other", Rank(), seed=1)
    assert not same(one.module, other.module)


def test_training_stops_when_nothing_improves_and_keeps_the_best(tmp_path: Path) -> None:
    schedule = Schedule(steps=100, evaluate_every=2, save_every=50, patience=3)
    stage = Line(told=[5.0, 4.0, 4.5, 4.0, 4.1, 9.9])
    run(stage, schedule, tmp_path, Rank())
    assert len(stage.rates) == 10  # the best at step 4, then three without
    best = Line()
    run(best, Schedule(steps=4, evaluate_every=2, save_every=4, warmup_steps=100), tmp_path / "best", Rank())
    assert set(torch.load(tmp_path / "best.pt", weights_only=True)) == set(best.module.state_dict())
    kept = torch.load(tmp_path / "best.pt", weights_only=True)
    assert all(torch.equal(kept[name], tensor) for name, tensor in stage.module.state_dict().items())
    last = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["module"]
    assert not torch.equal(kept["0.weight"], last["0.weight"])


def test_a_run_that_stopped_early_stays_stopped(tmp_path: Path) -> None:
    schedule = Schedule(steps=100, evaluate_every=2, save_every=50, patience=1)
    first, second = Line(told=[1.0, 2.0]), Line(told=[0.5])
    run(first, schedule, tmp_path, Rank())
    run(second, schedule, tmp_path, Rank())
    assert (len(first.rates), second.rates, second.told) == (4, [], [0.5])
    assert same(first.module, second.module)


def test_without_patience_nothing_stops_it(tmp_path: Path) -> None:
    stage = Line(told=[1.0] + [2.0] * 9)
    run(stage, Schedule(steps=20, evaluate_every=2, save_every=10), tmp_path, Rank())
    assert len(stage.rates) == 20


def test_rates_rise_and_fall_as_the_schedule_says(tmp_path: Path) -> None:
    schedule = Schedule(steps=30, warmup_steps=5, final_share=0.1)
    factors = [schedule.factor(step) for step in range(31)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5] == 1.0
    assert factors[15] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 10 / 25)))
    assert factors[30] == pytest.approx(0.1)
    assert factors[5:] == sorted(factors[5:], reverse=True)
    stage = Line()
    run(stage, schedule, tmp_path, Rank())
    assert stage.rates == pytest.approx([0.1 * factor for factor in factors[:30]])


def test_rates_go_on_after_a_resume(tmp_path: Path) -> None:
    """A checkpoint holds the rate of its step; the peak must not be taken from it."""
    stage = Line(stop_at=20)
    with pytest.raises(Interruption):
        run(stage, SCHEDULE, tmp_path, Rank())
    rest = Line()
    run(rest, SCHEDULE, tmp_path, Rank())
    assert stage.rates + rest.rates == pytest.approx([0.1 * SCHEDULE.factor(step) for step in range(30)])


def test_half_a_checkpoint_is_never_read(tmp_path: Path) -> None:
    with pytest.raises(Interruption):
        run(Line(stop_at=6), SCHEDULE, tmp_path, Rank())
    (tmp_path / "checkpoint.tmp").write_bytes(b"half")
    stage = Line()
    run(stage, SCHEDULE, tmp_path, Rank())
    assert len(stage.rates) == 26


def test_evaluation_sees_a_resting_model_and_draws(tmp_path: Path) -> None:
    stage = Line()
    run(stage, SCHEDULE, tmp_path, Rank())
    assert stage.evaluated == [False] * 5
    assert stage.module.training
    assert (tmp_path / "sheet.txt").exists()


def test_only_the_first_rank_writes(tmp_path: Path) -> None:
    class Second(Rank):
        @property
        def is_first(self) -> bool:
            return False

    run(Line(), SCHEDULE, tmp_path, Second())
    assert list(tmp_path.iterdir()) == []


def test_every_step_of_every_rank_has_a_seed_of_its_own() -> None:
    seeds = {step_seed(seed, step, rank) for seed in range(3) for step in range(200) for rank in range(4)}
    assert len(seeds) == 3 * 200 * 4


def test_products_are_rounded_where_asked_for() -> None:
    x = torch.randn(8, 8)
    with products_in("bf16", torch.device("cpu")):
        assert (x @ x).dtype == torch.bfloat16
    with products_in("fp32", torch.device("cpu")):
        assert (x @ x).dtype == torch.float32
