"""Each option of a request reaches its own row and no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.ops import select_ops
from service.runner.sampler import Sampler
from service.scheduling.plan import Drawn, Sample, StepPlan
from service.scheduling.sampling import SamplingParams

VOCAB = 70  # two words of mask and six bits of a third


def sample_of(row: int, *, history: tuple[int, ...] | None = None, prompt_len: int = 0, **options: Any) -> Sample:
    banned, guidance = options.pop("banned", ()), options.pop("guidance", 1.0)
    slices = options.pop("slices", (row,))
    params = SamplingParams(max_tokens=5, **{"temperature": 0.0, **options})
    return Sample(row, slices, params, 9, 1, history=history, prompt_len=prompt_len, banned=banned, guidance=guidance)


def draw(logits: torch.Tensor, *samples: Sample, sampler: Sampler | None = None) -> list[Drawn]:
    sampler = sampler or Sampler(select_ops("reference"), VOCAB, torch.device("cpu"))
    return sampler.sample(logits.clone(), StepPlan(1, (), samples)).wait()


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(3))


def test_greedy_is_arg_max(logits: torch.Tensor) -> None:
    assert [d.token for d in draw(logits, *(sample_of(row) for row in range(3)))] == logits.argmax(-1).tolist()


def test_no_samples_draw_nothing() -> None:
    assert draw(torch.zeros(0, VOCAB)) == []


def test_bias_moves_only_its_row(logits: torch.Tensor) -> None:
    drawn = draw(logits, sample_of(0), sample_of(1, logit_bias=((69, 100.0),)), sample_of(2))
    assert [d.token for d in drawn] == [int(logits[0].argmax()), 69, int(logits[2].argmax())]


def test_banned_ids_are_not_drawn(logits: torch.Tensor) -> None:
    order = logits[1].argsort(descending=True).tolist()
    drawn = draw(logits, sample_of(0), sample_of(1, banned=tuple(order[:4])), sample_of(2))
    assert drawn[1].token == order[4]
    assert drawn[0].token == int(logits[0].argmax())


@pytest.mark.parametrize("token", [0, 31, 32, 63, 64, 69])
def test_banning_all_but_one_leaves_that_one(logits: torch.Tensor, token: int) -> None:
    assert draw(logits[:1], sample_of(0, banned=tuple(set(range(VOCAB)) - {token})))[0].token == token


def test_logprobs_only_where_asked(logits: torch.Tensor) -> None:
    plain, chosen, top = draw(logits, sample_of(0), sample_of(1, logprobs=0), sample_of(2, logprobs=3))
    assert plain.logprob is None
    assert chosen.logprob == pytest.approx(float(logits[1].log_softmax(-1).max()), abs=1e-5)
    assert chosen.top == ()
    assert [token for token, _ in top.top] == logits[2].topk(3).indices.tolist()


def test_guidance_mixes_two_rows(logits: torch.Tensor) -> None:
    drawn = draw(logits, sample_of(0, slices=(0, 1), guidance=2.5), sample_of(2, slices=(2,)))
    mixed = logits[1] + 2.5 * (logits[0] - logits[1])
    assert [d.token for d in drawn] == [int(mixed.argmax()), int(logits[2].argmax())]


def test_penalties_follow_the_history_step_by_step() -> None:
    """Counting only what is new gives what counting everything gives; prompt ids count as seen, not as generated."""
    sampler = Sampler(select_ops("reference"), VOCAB, torch.device("cpu"))
    row = torch.zeros(1, VOCAB)
    row[0, 5], row[0, 6], row[0, 7] = 3.0, 2.9, 2.8
    first = draw(row, sample_of(0, history=(5,), prompt_len=1, frequency_penalty=0.5), sampler=sampler)
    assert first[0].token == 5, "the prompt does not count for the frequency"
    second = draw(row, sample_of(0, history=(5, 5), prompt_len=1, frequency_penalty=0.5), sampler=sampler)
    assert second[0].token == 6
    third = draw(row, sample_of(0, history=(5, 5, 6), prompt_len=1, frequency_penalty=0.5), sampler=sampler)
    assert third[0].token == 7
    sampler.release([0])
    repeated = draw(row, sample_of(0, history=(5,), prompt_len=1, repetition_penalty=2.0), sampler=sampler)
    assert repeated[0].token == 6, "the prompt counts for the repetition"


def test_noise_does_not_depend_on_the_neighbours(logits: torch.Tensor) -> None:
    samples = [sample_of(row, temperature=1.0, seed=row + 100) for row in range(3)]
    together = [d.token for d in draw(logits, *samples)]
    alone = [draw(logits[row : row + 1], samples[row])[0].token for row in range(3)]
    assert together == alone
