"""Pictures drawn by scheduler and runner have the ids of a plain loop over one sequence without a cache, and the same ids whoever else is
there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.ops import SampleRows, select_ops
from kernels.sample.reference import sample
from service.model.families import read_config
from service.model.transformer import Precision, Transformer, build_transformer
from service.model.weights import open_weights
from service.scheduling.picture_grammar import PictureGrammar, PictureRule
from service.scheduling.sampling import SamplingParams
from service.scheduling.sequence import Request
from tests.parity.braid import CONFIG, OTHER, PICTURES, STREAM, codes, random_weights, text, write_folder
from tests.parity.generate import Desk
from tests.parity.steps import Steps

TIE = 1e-3
SIZE = PICTURES.num_places
GREEDY = SamplingParams(max_tokens=100, temperature=0.0)
SAMPLED = SamplingParams(max_tokens=100, temperature=0.9, min_p=0.1, seed=5)
NARROW = SamplingParams(max_tokens=100, temperature=1.3, top_k=7, top_p=0.8, seed=9)
PROMPT = (1, *text(3, 7), PICTURES.begin_id)
BARE = (1, PICTURES.begin_id)
HALF = tuple(code if place % 3 else -1 for place, code in enumerate(codes(8)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("braid"), random_weights())


def load(folder: Path, back_end: str, *, is_int8: bool = False) -> Transformer:
    config = read_config(folder)
    assert config == CONFIG
    with torch.inference_mode():
        precision = Precision(torch.float32, "int8" if is_int8 else "dense")
        return build_transformer(config, open_weights(folder, config), select_ops(back_end), precision=precision)


@pytest.fixture(scope="module", params=["reference", "cpu"])
def model(request: pytest.FixtureRequest, folder: Path) -> Transformer:
    return load(folder, request.param)


def order(
    name: str,
    params: SamplingParams,
    rule: PictureRule,
    *,
    prompt: Sequence[int] = PROMPT,
    guidance: float = 1.0,
    draft_len: int = 0,
    num_choices: int = 1,
    priority: int = 0,
) -> Request:
    given = rule.kept[: rule.num_known]
    prompts = [(*prompt, *given)] if guidance == 1.0 else [(*prompt, *given), (*BARE, *given)]
    grammars = tuple(PictureGrammar(PICTURES, rule, params.max_tokens) for _ in range(num_choices))
    return Request(name, tuple(prompts), params, num_choices, priority, guidance=guidance, grammars=grammars, draft_len=draft_len)


# -- the plain loop --


def plain(model: Transformer, params: SamplingParams, rule: PictureRule, prompt: Sequence[int], guidance: float) -> list[tuple[int, float]]:
    """Each drawn or given id, and by how much its score beat the next one's; the whole sequence is computed anew for each."""
    rows = [[*prompt, *rule.kept[: rule.num_known]], [*BARE, *rule.kept[: rule.num_known]]][: 1 if guidance == 1.0 else 2]
    found: list[tuple[int, float]] = []
    for frame in range(rule.num_frames):
        kept = rule.kept if rule.kept and not frame else (-1,) * SIZE
        start = rule.num_known if not frame else 0
        if frame:
            found.append((PICTURES.frame_id, math.inf))
            for row in rows:
                row.append(PICTURES.frame_id)
        for place in range(start, SIZE):
            if kept[place] >= 0:
                token, gap = kept[place], math.inf
            else:
                logits = [Steps(model).run([(0, row)])[0][-1] for row in rows]
                token, gap = choose(logits, params, len(rows[0]), guidance)
            found.append((token, gap))
            for row in rows:
                row.append(token)
    return found


def choose(logits: Sequence[Tensor], params: SamplingParams, position: int, guidance: float) -> tuple[int, float]:
    """The rule in its own words: codes alone, candidates by the conditional row, then guidance, then temperature and filters."""
    is_code = torch.zeros(CONFIG.vocab_size, dtype=torch.bool)
    is_code[PICTURES.first_code : PICTURES.first_code + PICTURES.num_codes] = True
    row, min_p = logits[0].clone(), params.min_p
    if guidance != 1.0:
        heat = params.temperature or 1.0
        chances = torch.softmax(logits[0].masked_fill(~is_code, -math.inf).double() / heat, -1)
        row = logits[1] + guidance * (logits[0] - logits[1])
        if min_p:
            # A hair's breadth of room: what lies on the edge is decided by the rounding of a logarithm.
            row = row.masked_fill(chances < min_p * chances.max() * (1 - 1e-6), -math.inf)
        min_p = 0.0
    row = row.masked_fill(~is_code, -math.inf)

    def drawn(scores: Tensor) -> int:
        one = SampleRows(
            temperature=torch.tensor([params.temperature]),
            top_k=torch.tensor([params.top_k], dtype=torch.int32),
            top_p=torch.tensor([params.top_p]),
            min_p=torch.tensor([min_p]),
            seeds=torch.tensor([params.seed]),
            positions=torch.tensor([position]),
        )
        return int(sample(scores[None].clone(), one).ids)

    token = drawn(row)
    # The least change of its logit that gives another id, found to the width that counts as a tie.
    lower = row.clone()
    lower[token] -= TIE
    return token, math.inf if drawn(lower) == token else 0.0


def assert_same(got: Sequence[int], want: Sequence[tuple[int, float]]) -> None:
    """Up to the first tie."""
    for place, (token, (other, gap)) in enumerate(zip(got, want, strict=True)):
        if token != other:
            assert gap < TIE, f"id {place} is {token} and not {other}, and it was no tie"
            return


TAIL = (*codes(4)[:9], *[-1] * 11)
RULES = {"one": PictureRule(1), "two": PictureRule(2), "half": PictureRule(1, kept=HALF), "tail": PictureRule(1, kept=TAIL)}


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, NARROW], ids=["greedy", "sampled", "narrow"])
@pytest.mark.parametrize("guidance", [1.0, 2.5], ids=["plain", "guided"])
@pytest.mark.parametrize("rule", RULES)
def test_ids_are_those_of_the_plain_loop(model: Transformer, params: SamplingParams, guidance: float, rule: str) -> None:
    want = plain(model, params, RULES[rule], PROMPT, guidance)
    for draft_len in (0, 5, 64):
        desk = Desk(model, kv_dtype=torch.float32)
        desk.run([order("a", params, RULES[rule], guidance=guidance, draft_len=draft_len)])
        assert_same(desk.ids["a", 0], want)
        assert len(set(desk.ids["a", 0])) > 3, "a picture of one code would show little"


def test_the_plain_loop_can_fail(model: Transformer) -> None:
    """Each part of the rule changes ids, so that an engine without it would be seen."""
    strict = replace(SAMPLED, min_p=0.5)
    base = [token for token, _ in plain(model, strict, PictureRule(1), PROMPT, 2.5)]
    others = (
        plain(model, strict, PictureRule(1), PROMPT, 1.0),
        plain(model, replace(strict, seed=6), PictureRule(1), PROMPT, 2.5),
        plain(model, replace(strict, min_p=0.0), PictureRule(1), PROMPT, 2.5),
        plain(model, strict, PictureRule(1), (1, *text(5, 7), PICTURES.begin_id), 2.5),
    )
    assert all([token for token, _ in other] != base for other in others)


# -- company --


@pytest.fixture(scope="module", params=["float32", "int8"])
def served(request: pytest.FixtureRequest, folder: Path) -> Callable[..., Desk]:
    """A desk on the back end that serves on a CPU."""
    model = load(folder, "cpu", is_int8=request.param == "int8")
    dtype = torch.float32 if request.param == "float32" else torch.int8
    return lambda **sizes: Desk(model, kv_dtype=dtype, **sizes)


CASES = {
    "sampled": {},
    "guided": {"guidance": 2.5},
    "guessed": {"draft_len": 8},
    "guided and guessed": {"guidance": 2.5, "draft_len": 8},
}


@pytest.mark.parametrize("rule", RULES)
def test_the_same_pictures_and_texts_when_steps_are_begun_ahead(served: Callable[..., Desk], rule: str) -> None:
    """With few blocks, so that some lose theirs; beside texts without a grammar, whose next ids could be codes."""
    desks = [served(num_blocks=40, is_ahead=is_ahead) for is_ahead in (False, True)]
    for desk in desks:
        crowd = [order(f"p{i}", replace(SAMPLED, seed=i), RULES[rule], guidance=1.0 + i % 2, draft_len=8 * (i == 3)) for i in range(4)]
        desk.run([*crowd, *(Request(f"t{i}", (tuple(text(i, 9 + i)),), replace(SAMPLED, max_tokens=40)) for i in range(3))])
    one_by_one, ahead = desks
    assert ahead.ids == one_by_one.ids
    assert one_by_one.num_pending == 0
    # Where every free place has a kept one behind it, each id is followed by one that is forced, and waits for it.
    assert (ahead.num_pending > 10) == (rule != "half")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rule", RULES)
def test_the_same_picture_whoever_else_is_there(served: Callable[..., Desk], case: str, rule: str) -> None:
    more = CASES[case]
    wanted = order("a", SAMPLED, RULES[rule], **more)  # type: ignore[arg-type]
    alone = served()
    alone.run([wanted])
    want = alone.ids["a", 0]

    # Among fifteen others: pictures, films, guided ones, and chats of text.
    seeds = [(f"p{i}", replace(SAMPLED, seed=i)) for i in range(8)]
    crowd = [order(*pair, RULES[name], guidance=1.0 + i % 2) for i, (pair, name) in enumerate(zip(seeds, [*RULES] * 2, strict=True))]
    crowd += [Request(f"t{i}", (tuple(text(i, 9 + i)),), replace(SAMPLED, max_tokens=40)) for i in range(4)]
    crowd += [Request(f"s{i}", (tuple([STREAM, OTHER, STREAM[:30]][i]),), replace(GREEDY, max_tokens=12)) for i in range(3)]
    among = served()
    among.run([*crowd[:8], order("a", SAMPLED, RULES[rule], **more), *crowd[8:]])  # type: ignore[arg-type]
    assert among.ids["a", 0] == want

    # As the third of four choices.
    four = served()
    four.run([order("a", replace(SAMPLED, seed=SAMPLED.seed - 2), RULES[rule], num_choices=4, **more)])  # type: ignore[arg-type]
    assert four.ids["a", 2] == want
    assert four.ids["a", 1] != want

    # Behind itself: all but the last block comes from the prefix cache.
    alone.run([order("again", SAMPLED, RULES[rule], prompt=(*PROMPT[:-1], *[7] * 20, PICTURES.begin_id), **more)])  # type: ignore[arg-type]
    fresh = served()
    fresh.run([order("again", SAMPLED, RULES[rule], prompt=(*PROMPT[:-1], *[7] * 20, PICTURES.begin_id), **more)])  # type: ignore[arg-type]
    alone.run([order("hit", SAMPLED, RULES[rule], prompt=(*PROMPT[:-1], *[7] * 20, PICTURES.begin_id), **more)])  # type: ignore[arg-type]
    assert alone.usages["hit", 0].cached_tokens > 0
    assert alone.ids["again", 0] == alone.ids["hit", 0] == fresh.ids["again", 0]

    # Preempted in the middle and resumed, both rows of a guided gang together.
    tight = served(num_blocks=24, max_batch_tokens=24)
    tight.run(
        [
            *(order(f"p{i}", replace(SAMPLED, seed=i), PictureRule(2), priority=-1) for i in range(4)),
            order("a", SAMPLED, RULES[rule], priority=1, **more),  # type: ignore[arg-type]
        ]
    )
    assert tight.ids["a", 0] == want


def test_a_gang_is_preempted_in_the_middle_of_its_picture(served: Callable[..., Desk]) -> None:
    """The case above is empty unless it is."""
    desk = served(num_blocks=24)
    first = order("a", SAMPLED, PictureRule(2), guidance=2.5, priority=1)
    desk.scheduler.add(first, 0.0)
    desk.ids["a", 0] = []
    alone = served()
    alone.run([order("a", SAMPLED, PictureRule(2), guidance=2.5)])
    for _ in range(15):
        plan, _ = desk.scheduler.plan(0.0)
        assert plan is not None
        for output in desk.scheduler.commit(plan, desk.runner.sample(desk.runner.forward(plan), desk._masks(plan)), 0.0):
            assert output.token is not None
            desk.ids["a", 0].append(output.token)
    kept = list(desk.ids["a", 0])
    desk.run([order("urgent", replace(SAMPLED, seed=1), PictureRule(6), priority=-1)])
    assert desk.usages["a", 0].preemptions > 0
    assert 0 < len(kept) < len(alone.ids["a", 0])
    assert kept + desk.ids["a", 0][len(kept) :] == alone.ids["a", 0]


def test_local_layers_give_back_what_lies_behind_their_window(served: Callable[..., Desk]) -> None:
    """Of a film of four frames a layer that sees everything holds all blocks, one with a window its sink and the window alone."""
    desk = served()
    desk.run([order("film", SAMPLED, PictureRule(4))])
    num_tokens = len(PROMPT) + 4 * (SIZE + 1) - 2  # the last one is drawn and never computed
    windowed, whole = desk.most_used[0], desk.most_used[2]
    assert [group.window for group in desk.scheduler._tables.groups] == [17, 17, None]
    assert whole == -(-num_tokens // 16)
    assert windowed <= 1 + (17 + 14) // 16 + 1 < whole
    stats = desk.scheduler.stats
    assert (stats.kv_blocks_used, stats.running) == (0, 0)
