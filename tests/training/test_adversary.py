"""Reranking by a discriminator: diversity and the two-sample test against what is known of them, and the experiment on invented texts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import exp, log
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.ops import select_ops
from service.errors import StartupError
from service.model.transformer import Precision, build_transformer
from tests.model.checkpoints import TINY, random_tensors
from training.adversary.classifier import choose_penalty, fit, two_sample_test
from training.adversary.diversity import distinct, ngrams, self_bleu
from training.adversary.experiment import Design, Experiment, Ids, Point, Tools, gain_at_equal_diversity, record
from training.adversary.features import decoder_features
from training.decoder import NamedSource, hidden, teachable
from training.generate import Sampling, generate

# --- diversity -------------------------------------------------------------------------------------------------------------------------


def plain_self_bleu(texts: Sequence[Sequence[str]]) -> float:
    """As defined: every text against the list of all others."""
    scores = []
    for index, words in enumerate(texts):
        others = [each for at, each in enumerate(texts) if at != index]
        mean = 0.0
        for order in range(1, 5):
            own = ngrams(words, order)
            limit: Counter[tuple[str, ...]] = Counter()
            for other in others:
                limit |= ngrams(other, order)
            mean += log(max((own & limit).total(), 0.5) / max(own.total(), 1)) / 4
        closest = min((len(each) for each in others), key=lambda each: (abs(each - len(words)), each))
        scores.append(exp(mean) * min(1.0, exp(1 - closest / max(len(words), 1))))
    return sum(scores) / len(scores)


@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=9), min_size=2, max_size=6))
def test_self_bleu_is_bleu_against_all_others(texts: list[list[str]]) -> None:
    assert self_bleu(texts) == pytest.approx(plain_self_bleu(texts))


def test_diversity_at_its_ends() -> None:
    same, other = ["a b c d e".split()] * 3, [f"a{i} b{i} c{i} d{i} e{i}".split() for i in range(3)]
    assert self_bleu(same) == pytest.approx(1.0)
    assert self_bleu(other) < 0.2
    assert distinct(same) == pytest.approx(4 / 12)
    assert distinct(other) == 1.0
    with pytest.raises(ValueError, match="another"):
        self_bleu(["a".split()])


# --- the classifier --------------------------------------------------------------------------------------------------------------------


def test_sides_of_one_distribution_cannot_be_told_apart() -> None:
    random = np.random.default_rng(0)
    same = two_sample_test(random.normal(size=(400, 8)), random.normal(size=(400, 8)), 0.1)
    assert abs(same.accuracy - 0.5) < 3 * same.error < 0.1


def test_two_normal_distributions_are_told_apart_as_well_as_can_be() -> None:
    """Means 2 apart in one of 8 directions: the best accuracy is the normal distribution's share below 1, 0.841."""
    random = np.random.default_rng(1)
    real, other = random.normal(size=(600, 8)), random.normal(size=(600, 8))
    other[:, 3] += 2
    found = two_sample_test(real, other, 0.01)
    assert abs(found.accuracy - 0.841) < 3 * found.error
    weight = fit(real, other, 0.01).weight
    assert abs(weight[3]) > 5 * np.abs(np.delete(weight, 3)).max()
    assert weight[3] < 0  # above 0 it says real, and the generated ones lie higher


def test_a_prompt_never_lies_in_training_and_test_at_once() -> None:
    """Both sides of a prompt share a random vector, whose label nothing but memory could tell."""
    random = np.random.default_rng(2)
    prompt = random.normal(size=(60, 200))
    found = two_sample_test(prompt, prompt + 1e-3 * random.normal(size=prompt.shape), 0.003)
    assert abs(found.accuracy - 0.5) < 0.1
    with pytest.raises(ValueError, match="same prompts"):
        two_sample_test(prompt, prompt[1:], 0.1)


def test_many_useless_features_want_a_larger_penalty() -> None:
    random = np.random.default_rng(3)
    real, other = random.normal(size=(60, 300)), random.normal(size=(60, 300))
    other[:, :150] += 0.3  # each direction tells a little: no weight should be trusted much
    few = random.normal(size=(60, 2))
    assert choose_penalty(real, other) > choose_penalty(few, few + np.array([4.0, 0.0]))


# --- the generator ---------------------------------------------------------------------------------------------------------------------


def test_decoder_features_are_means_of_the_training_forward() -> None:
    """Paged, ragged and batched as in serving, against one document at a time under autograd's formulas."""
    tensors = {name: torch.from_numpy(values) * 0.1 for name, values in random_tensors(TINY).items()}
    serving = build_transformer(TINY, NamedSource(tensors), select_ops("reference"), precision=Precision(torch.float32))
    training = teachable(TINY, NamedSource(tensors))
    random = np.random.default_rng(0)
    prompts, replies = ([random.integers(3, 96, size=size).tolist() for size in sizes] for sizes in ((5, 17, 16, 30), (3, 20, 1, 4)))
    found = decoder_features(serving, prompts, replies, batch=3)
    for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        with torch.no_grad():
            x, residual = hidden(training, torch.tensor([[*prompt, *reply]]), None)
            states = training.hidden(x, residual, torch.arange(len(prompt), len(x)))
        np.testing.assert_allclose(found[row], states.mean(0).numpy(), rtol=1e-4, atol=1e-5)


def test_a_model_without_pictures_generates_what_its_logits_say() -> None:
    tensors = {name: torch.from_numpy(values) * 0.1 for name, values in random_tensors(TINY).items()}
    serving = build_transformer(TINY, NamedSource(tensors), select_ops("reference"), precision=Precision(torch.float32))
    training = teachable(TINY, NamedSource(tensors))
    prompts = [[3, 4, 5], list(range(10, 30))]
    for prompt, reply in zip(prompts, generate(serving, prompts, Sampling(max_tokens=6), eos_id=-1), strict=True):
        ids = list(prompt)
        for token in reply:
            with torch.no_grad():
                x, residual = hidden(training, torch.tensor([ids]), None)
                assert int(training.logits(x, residual, torch.tensor([len(ids) - 1])).argmax()) == token
            ids.append(token)
        assert len(reply) == 6
    with pytest.raises(ValueError, match="pictures"):
        generate(serving, prompts, Sampling(), eos_id=-1, num_frames=[1, 0])


# --- the experiment --------------------------------------------------------------------------------------------------------------------

DESIGN = Design(prompts=80, learned=80, prompt_len=1, reply_len=6, sweep=(0.5,), reranked=(1.0,), candidates=4, draws=2)


class Invented:
    """Real replies are of ids 0 ... 9; generated ones too, but each is spoiled by ids 10 ... 19 half of the time."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)
        self.calls: list[tuple[float, int]] = []

    def documents(self, count: int) -> Ids:
        return [[0, *each] for each in self.random.integers(0, 10, size=(count, 6)).tolist()]

    def generate(self, prompts: Ids, temperature: float, seed: int) -> Ids:
        self.calls.append((temperature, seed))
        random = np.random.default_rng((int(10 * temperature), seed, len(prompts)))
        replies = random.integers(0, 10, size=(len(prompts), 6))
        replies[random.random(len(prompts)) < 0.5, :3] += 10
        return [list(map(int, each)) for each in replies]

    def features(self, prompts: Ids, replies: Ids) -> np.ndarray:
        return np.array([[sum(token >= 10 for token in each), each[0] % 10, len(set(each))] for each in replies], dtype=np.float64)

    def experiment(self, folder: Path, design: Design = DESIGN) -> Experiment:
        tools = Tools(self.generate, lambda ids: " ".join(map(str, ids)), self.features, lambda a, b: -2.0 * self.features(a, b))
        return Experiment(design, tools, self.documents(design.prompts), self.documents(design.learned), folder)


def test_the_best_of_n_is_harder_to_tell_from_real(tmp_path: Path) -> None:
    invented = Invented()
    experiment = invented.experiment(tmp_path)
    points = experiment.run(lambda line: None)
    assert [(each.name, each.temperature, each.candidates) for each in points] == [("sweep", 0.5, 1), ("sweep", 1.0, 1), ("best", 1.0, 4)]
    _, single, best = points
    assert abs(single.accuracy - 0.75) < 3 * single.error  # half of the generated ones are spoiled, and seen through
    assert best.accuracy < 0.6  # of four, one is unspoiled fifteen times in sixteen
    whole = json.loads(record(points, DESIGN, experiment.real_diversity(), {"generator": "invented"}))
    assert whole["gain_at_equal_distinct_2"] == {"1": gain_at_equal_diversity(points, best)}
    assert whole["design"]["candidates"] == 4


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    first = Invented()
    points = first.experiment(tmp_path).run(lambda line: None)
    assert len(first.calls) == 6  # 4 candidates, 1 of the sweep, and 1 to learn from
    (tmp_path / "judged-1-2.json").unlink()
    again = Invented()
    assert again.experiment(tmp_path).run(lambda line: None) == points
    assert again.calls == [(1.0, 2)]
    with pytest.raises(StartupError, match="another design"):
        again.experiment(tmp_path, replace(DESIGN, seed=1)).run(lambda line: None)
    with pytest.raises(StartupError, match="another design"):
        replace(again.experiment(tmp_path), about={"generator": "another"}).run(lambda line: None)


def test_the_gain_is_read_off_the_sweep_at_equal_diversity() -> None:
    sweep = [Point("sweep", t, 1, accuracy, 0.0, diversity, 0.0) for t, accuracy, diversity in ((0.5, 0.8, 0.6), (1.0, 0.7, 0.8))]
    assert gain_at_equal_diversity(sweep, Point("best", 1.0, 8, 0.7, 0.0, 0.7, 0.0)) == pytest.approx(0.05)
    assert gain_at_equal_diversity(sweep, Point("best", 1.0, 8, 0.7, 0.0, 0.9, 0.0)) is None
