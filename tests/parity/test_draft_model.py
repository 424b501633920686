"""Real runners of tiny random models: with a draft model every answer has the ids that it has without, however good the guesses are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kernels.cpu.library import load as native_library
from service.engine.messages import Load, ModelSource
from service.errors import StartupError
from service.runner import load as runner_load
from service.runner.load import load_models
from service.scheduling.roster import MAX_DRAFTING
from service.scheduling.sampling import SamplingParams
from service.scheduling.sequence import Request
from service.worker import Loaded, build_lane
from tests.model.checkpoints import TINY, random_tensors, write_gguf
from tests.parity.braid import random_weights, write_folder

pytestmark = pytest.mark.skipif(native_library() is None, reason="ids are guessed only with the compiled kernels")
CONFIG = dataclasses.replace(TINY, max_context=512)
SMALL = dataclasses.replace(CONFIG, width=32, feed_forward_width=64, num_heads=2, num_kv_heads=1, layers=CONFIG.layers[:1])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "model": write_gguf(folder / "model.gguf", CONFIG, tensors(CONFIG, 0)),
        "small": write_gguf(folder / "small.gguf", SMALL, tensors(SMALL, 1)),
        "others": write_gguf(
            folder / "others.gguf", dataclasses.replace(SMALL, vocab_size=95), tensors(dataclasses.replace(SMALL, vocab_size=95), 1)
        ),
        "pictures": write_folder(folder, random_weights()),
    }


def tensors(config: object, seed: int) -> dict[str, object]:
    """Small enough for logits that leave room for noise."""
    return {name: 0.2 * value for name, value in random_tensors(config, seed).items()}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Loading in int8 leaves torch with one."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def message(model: Path, draft: Path | None, **more: object) -> Load:
    values: dict[str, object] = {"dtype": "auto", "memory_bytes": 2**23, "max_sequences": 8, "prefix_cache": True, **more}
    source = None if draft is None else ModelSource("draft", str(draft))
    return Load(models=(ModelSource("model", str(model)),), draft=source, device="cpu", max_context=0, max_batch_tokens=64, **values)


def loaded(load: Load) -> Loaded:
    (one,) = load_models(load, lambda phase, fraction: None)
    return one


class Table:
    """A lane, stepped as the engine does, whose draft model guesses four ids whatever they cost."""

    def __init__(self, load: Load) -> None:
        self.lane = build_lane(loaded(load), load)
        self.ids: dict[tuple[str, int], list[int]] = {}
        self.num_steps = 0
        if self.lane.drafting is not None:
            self.lane.drafting.pace.choose = lambda case: min(4, case.most)
            self.lane.drafting.pace.is_plain_due = lambda: False

    def add(self, *requests: Request) -> Table:
        for request in requests:
            self.lane.scheduler.add(request, 0.0)
        return self

    def step(self) -> None:
        lane = self.lane
        guesses = lane.drafting.guess(lane.scheduler.draft_wishes()) if lane.drafting is not None else {}
        plan, _ = lane.scheduler.plan(0.0, guesses)
        assert plan is not None
        self.num_steps += 1
        for output in lane.scheduler.commit(plan, lane.runner.sample(lane.runner.forward(plan)), 0.0):
            if output.token is not None:
                self.ids.setdefault((output.request_id, output.choice), []).append(output.token)
        lane.scheduler.check()
        if lane.drafting is not None:
            lane.drafting.learn(plan)
            lane.drafting.check()

    def drain(self) -> Table:
        while self.lane.scheduler.has_work:
            self.step()
        return self

    @property
    def drafts(self) -> tuple[int, int]:
        return self.lane.scheduler.stats.drafts["model"]


def order(name: str, prompt: list[int], max_tokens: int = 40, *, num_choices: int = 1, **sampling: object) -> Request:
    return Request(name, (tuple(prompt),), SamplingParams(max_tokens=max_tokens, **sampling), num_choices=num_choices, draft_len=8)


def prompt(seed: int, length: int) -> list[int]:
    return torch.randint(3, 96, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


CASES = {
    "greedy": [order("a", prompt(0, 20), temperature=0.0)],
    "sampled": [order("a", prompt(0, 20), seed=5)],
    "nucleus": [order("a", prompt(0, 20), seed=6, temperature=0.7, top_p=0.8, top_k=20)],
    "biased": [order("a", prompt(0, 20), seed=6, logit_bias=((7, 3.0),), logprobs=2)],
    "choices": [order("a", prompt(0, 30), num_choices=3, seed=7)],
    "two users": [order("a", prompt(1, 70), seed=8), order("b", prompt(2, 9), temperature=0.0)],
    "stop ids": [order("a", prompt(3, 9), 80, seed=9, stop_ids=tuple(range(3, 8)), min_tokens=10)],
    "penalties beside": [order("a", prompt(4, 9), seed=10), order("b", prompt(5, 9), seed=11, repetition_penalty=1.3)],
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("draft", ["model", "small"])
def test_ids_are_those_without_a_draft_model(files: dict[str, Path], case: str, draft: str) -> None:
    plain = Table(message(files["model"], None)).add(*CASES[case]).drain()
    table = Table(message(files["model"], files[draft])).add(*CASES[case]).drain()
    assert table.ids == plain.ids
    guessed, right = table.drafts
    assert guessed > 0
    if draft == "model":
        assert right >= guessed - 8 * len(table.ids), "the model itself is right up to the end of a text"
        assert table.num_steps < plain.num_steps or case == "penalties beside"
    else:
        assert right < guessed, "the test needs wrong guesses too"


def test_preempted_and_met_again_in_the_prefix_cache(files: dict[str, Path]) -> None:
    requests = [order(name, [*prompt(6, 40), index], 60, seed=index) for index, name in enumerate("abcd")]
    plain = Table(message(files["model"], None)).add(*requests).drain()
    for draft in ("model", "small"):
        table = Table(message(files["model"], files[draft]))
        pool = table.lane.scheduler._pool
        taken = [pool.allocate() for _ in range(pool.num_available - 17)]
        table.lane.scheduler.check = lambda: None  # it would miss the blocks that are held here
        table.add(*requests).drain()
        assert taken
        assert table.ids == plain.ids
        assert table.lane.scheduler.stats.preemptions > 0
        assert table.lane.scheduler.stats.prefix_hits > 0
        again = order("z", [*prompt(6, 40), 1], 60, seed=1)
        assert table.add(again).drain().ids["z", 0] == plain.ids["b", 0]


def test_aborted_in_the_middle(files: dict[str, Path]) -> None:
    one, other = order("a", prompt(7, 20), 100, seed=1), order("b", prompt(8, 20), 60, seed=2)
    plain = Table(message(files["model"], None)).add(one, other).drain()
    table = Table(message(files["model"], files["small"])).add(one, other)
    for _ in range(15):
        table.step()
    table.lane.scheduler.abort("a", None, "stop", 0.0)
    table.drain()
    assert table.ids["b", 0] == plain.ids["b", 0]
    given = table.ids["a", 0]
    assert 0 < len(given) < 100
    assert plain.ids["a", 0][: len(given)] == given
    assert table.lane.drafting is not None
    table.lane.drafting.guess(table.lane.scheduler.draft_wishes())
    assert table.lane.drafting.num_blocks_used == 0


def test_what_can_not_be_a_draft_model_is_refused(files: dict[str, Path]) -> None:
    for model, draft, words, more in (
        ("model", "others", "95 ids and the first of the models 96", {}),
        ("model", "pictures", "a draft model must write plain text", {}),
        ("pictures", "small", "writes no plain text", {}),
        ("model", "small", "int8 and int4 on a CPU", {"dtype": "float32"}),
    ):
        with pytest.raises(StartupError, match=words):
            load_models(message(files[model], files[draft], **more), lambda phase, fraction: None)


def test_a_draft_models_blocks_are_for_as_many_as_are_guessed_for(files: dict[str, Path]) -> None:
    assert runner_load.DRAFTED_SEQUENCES == MAX_DRAFTING
    one = loaded(message(files["model"], files["small"], memory_bytes=2**28))
    assert one.draft is not None
    assert one.draft.info.num_kv_blocks == MAX_DRAFTING * 512 // 16
    assert one.info.num_kv_blocks == 8 * 512 // 16
