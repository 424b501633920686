"""Evaluation: that its figures are right where they are known, and that any checkpoint can be measured and written up.

Long, because an oracle and a memory are made for every part of evaluation alike.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from kernels.ops import select_ops
from service.model.transformer import Precision, build_transformer
from service.model.vq import VQConfig, VQTokenizer
from training import report
from training.chapters import ablations, goals, table
from training.data.emoji import Emoji, EmojiSet
from training.data.text import TextSet
from training.decoder import NamedSource, fresh_decoder, named_tensors
from training.evaluate import reconstruction, text
from training.evaluate import run as evaluation
from training.evaluate.apart import told_apart
from training.evaluate.memory import f1, memory_figures
from training.evaluate.nearest import NearestPicture
from training.evaluate.run import Amounts, evaluate
from training.evaluate.shares import digest_of, share_of, wilson
from training.evaluate.subject import GREEDY, Subject, subject_of
from training.evaluate.text import WINDOW, bits_per_byte, windows_of
from training.evaluate.world import COMBINATIONS, attempt, figures_of, free_figures, tasks_of, world_figures
from training.export import save_decoder, save_image_tokenizer
from training.generate import FREE, Sampling, generate
from training.materials import Materials
from training.picture.measures import decode
from training.picture.source import draw_scenes
from training.recipe import DataRecipe, read_recipe
from training.stream.document import Codes, Pixels, Talk
from training.stream.sources import Memory
from training.tokens import train_tokenizer
from training.world.draw import Brush
from training.world.scene import World, is_trained
from training.world.tasks import TASK_NAMES, make

RECIPE = read_recipe("smoke")
VQ = VQConfig(32, 4, (8, 8, 16), 8, 1, "position", False, True, 1, True)
STYLES = ("noto", "twemoji")
NUM_EMOJI = 40
TINY = Amounts(tasks=3, scenes=6, emoji=8, pictures=6, texts=2)


def emoji_set() -> EmojiSet:
    """Each emoji is a pattern of its own in each of two styles, on white."""
    random = np.random.default_rng(0)
    shapes = random.random((NUM_EMOJI, 8, 8)) < 0.4
    colours = random.integers(0, 200, (NUM_EMOJI, 3))
    pictures = {}
    for style, factor in zip(STYLES, (1.0, 0.6), strict=True):
        small = np.where(shapes[..., None], (colours * factor)[:, None, None, :], 255).astype(np.uint8)
        pictures[style] = small.repeat(4, axis=1).repeat(4, axis=2)
    entries = tuple(
        Emoji(f"{0x1F600 + index:x}", f"thing {index}", ("odd", f"tag {index}"), f"物{index}", ("怪",), "Objects", "other", 1.0)
        for index in range(NUM_EMOJI)
    )
    return EmojiSet(entries, pictures, {style: np.ones(NUM_EMOJI, dtype=np.bool_) for style in STYLES})


@pytest.fixture(scope="module")
def materials() -> Materials:
    recipe = DataRecipe(size=32, styles=STYLES, memory_styles=STYLES, memory_count=NUM_EMOJI, texts=("wikipedia",), num_watched=4)
    return Materials(recipe, World(), Brush({}), emoji_set(), tuple(range(NUM_EMOJI)))


@pytest.fixture(scope="module")
def subject(materials: Materials) -> Subject:
    random = Random(0)
    turns = [make(TASK_NAMES[index % len(TASK_NAMES)], World(), random, "zh" if index % 3 else "en").turn for index in range(600)]
    texts = [piece for turn in turns for piece in (*turn.prompt, *turn.reply) if isinstance(piece, str)]
    vocabulary = train_tokenizer(texts, RECIPE.decoder.text_vocab_size)
    torch.manual_seed(0)
    vq = VQTokenizer(VQ).requires_grad_(False).eval()
    return subject_of(fresh_decoder(RECIPE.model_config(), 0), vocabulary, vq, materials)


@dataclass(frozen=True, eq=False)
class Oracle(Subject):
    """Gives every talk's own reply. Its codes are numbers of pictures in a book, so nothing depends on an image tokenizer.

    answer: what it draws instead of a wanted picture.
    """

    book: dict[bytes, Pixels] = field(default_factory=dict)
    answer: Callable[[Codes], Codes] = lambda codes: codes

    def texts(self, talks: Sequence[Talk], sampling: Sampling = GREEDY) -> list[str]:
        return ["".join(piece for piece in talk.reply if isinstance(piece, str)) for talk in talks]

    def drawings(self, talks: Sequence[Talk], sampling: Sampling = GREEDY, num_frames: int = 1) -> Codes:
        return np.stack([np.stack([self.answer(self._codes(piece)) for piece in talk.reply]) for talk in talks])

    def free_replies(self, talks: Sequence[Talk], max_tokens: int) -> list[tuple[str, Codes]]:
        texts, empty = self.texts(talks), np.empty((0, 8, 8), dtype=np.int64)
        return [
            (text, empty if text else np.stack([self.answer(self._codes(piece)) for piece in talk.reply]))
            for text, talk in zip(texts, talks, strict=True)
        ]

    def pixels(self, codes: Codes) -> Pixels:
        flat = np.stack([self.book[each.tobytes()] for each in codes.reshape(-1, 8, 8)])
        return flat.reshape(*codes.shape[:-2], *flat.shape[1:])

    def _codes(self, piece: Any) -> Codes:
        if isinstance(piece, np.ndarray):
            return piece.astype(np.int64)
        picture = draw_scenes(self.materials.brush, [piece])[0]
        codes = np.random.default_rng(list(picture.tobytes()[::7])).integers(VQ.num_codes, size=(8, 8))
        self.book[codes.tobytes()] = picture
        return codes


@pytest.fixture
def oracle(subject: Subject, materials: Materials) -> Oracle:
    """With a memory whose codes are all different."""
    random = np.random.default_rng(1)
    codes = {style: random.integers(VQ.num_codes, size=(NUM_EMOJI, 8, 8)) for style in STYLES}
    memory = Memory(materials.emoji, materials.chosen, codes)
    streams = replace(subject.streams)
    streams.__dict__["memory"] = memory
    book = {codes[style][place].tobytes(): materials.emoji.pictures[style][place] for style in STYLES for place in range(NUM_EMOJI)}
    return Oracle(subject.model, subject.learner, streams, book=book)


@pytest.mark.parametrize(("right", "count", "low", "high"), [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962)])
def test_wilson_agrees_with_published_intervals(right: int, count: int, low: float, high: float) -> None:
    assert wilson(right, count) == pytest.approx((low, high), abs=1e-4)


def test_the_share_of_nothing_says_that_nothing_is_known() -> None:
    assert share_of([]) == {"share": 0.0, "low": 0.0, "high": 1.0, "n": 0}


def test_the_judge_of_pictures_knows_them_under_noise_and_not_by_chance(materials: Materials) -> None:
    known = np.concatenate(list(materials.emoji.pictures.values()))
    judge, random = NearestPicture(known), np.random.default_rng(0)
    noisy = np.clip(known + random.normal(0, 25, known.shape), 0, 255).astype(np.uint8)
    assert (judge.to(known) == np.arange(len(known))).all()
    assert (judge.to(noisy) == np.arange(len(known))).mean() > 0.95
    assert (judge.to(random.permuted(known, axis=1)) == np.arange(len(known))).mean() < 0.5


def test_larger_pictures_are_judged_alike(materials: Materials) -> None:
    known = materials.emoji.pictures["noto"].repeat(2, axis=1).repeat(2, axis=2)
    assert (NearestPicture(known).to(known[::-1]) == np.arange(len(known))[::-1]).all()


@pytest.mark.parametrize("length", [2, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW + 17])
def test_windows_predict_every_id_but_the_first_once_and_with_what_came_before(length: int) -> None:
    ids = list(range(1000, 1000 + length))
    windows = windows_of(ids)
    said = [int(each) for window in windows for each in window.ids[window.is_target]]
    assert said == ids[1:]
    assert all(len(window.ids) <= WINDOW and not window.is_target[0] for window in windows)
    assert all(window.is_target.argmax() >= 20 for window in windows[1:])  # never without context


def test_bits_per_byte_of_a_model_that_knows_nothing(subject: Subject) -> None:
    blank = fresh_decoder(RECIPE.model_config(), 0)
    with torch.no_grad():
        blank.embedding.zero_()  # type: ignore[operator]  # tied to the head: every id is equally likely
    found = bits_per_byte(replace(subject, learner=blank), ["a red star", "第1行 ü"])
    assert found["bytes"] == len("a red star第1行 ü".encode())
    assert found["nats_per_token"] == pytest.approx(math.log(RECIPE.model_config().vocab_size), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(found["tokens"] * math.log2(RECIPE.model_config().vocab_size) / found["bytes"], rel=1e-5)


def test_nats_per_code_are_of_codes_alone(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Talk("world_draw", ("words",), (np.zeros((8, 8), dtype=np.int64),))
    monkeypatch.setattr(Subject, "nats", lambda self, documents: np.array([each.is_target.sum() for each in documents]))
    assert subject.nats_per_code([talk]) == 64


def test_losses_do_not_depend_on_company(subject: Subject) -> None:
    talks = [Talk("x", ("a red star" * count,), ("yes",)) for count in (1, 3, 5)]
    documents = subject.scribe.write(talks)
    alone = np.concatenate([subject.nats([each]) for each in documents])
    assert np.sort(subject.nats(documents)) == pytest.approx(np.sort(alone), rel=1e-4)


def test_whoever_gives_the_right_replies_scores_everything(oracle: Oracle, tmp_path: Path) -> None:
    found = world_figures(oracle, tmp_path, count=6)
    assert {kinds[kind]["right"]["share"] for kinds in found.values() for kind in COMBINATIONS} == {1.0}
    assert [frame["share"] for frame in found["move"]["pair"]["frames"]] == [1.0] * 4
    free = [found[name][kind]["free"] for name in found for kind in COMBINATIONS]
    assert {each[key]["share"] for each in free for key in ("form", "right")} == {1.0}
    assert all(0 < found["edit"][kind]["copy"]["attributes"] < 1 for kind in COMBINATIONS)
    assert "copy" not in found["draw"]["pair"]
    memory = memory_figures(oracle, tmp_path, most=None)
    assert memory["trained"]["sampled"]["codes"]["share"] == memory["trained"]["greedy"]["picture"]["share"] == 1.0
    assert memory["named"]["held out"]["zh"]["whole"]["share"] == memory["named"]["trained"]["tags"]["f1"] == 1.0
    assert (tmp_path / "world.png").exists()
    assert (tmp_path / "emoji-held-out.png").exists()


@pytest.mark.parametrize(("count", "text"), [(2, ""), (0, ""), (1, "and words")])
def test_the_wrong_kind_of_answer_is_told_from_a_wrong_answer(
    oracle: Oracle, monkeypatch: pytest.MonkeyPatch, count: int, text: str
) -> None:
    tasks = tasks_of(oracle, "draw", "trained", 6)
    codes = np.stack([oracle._codes(World().scene(Random(3)))] * count) if count else np.empty((0, 8, 8), dtype=np.int64)
    monkeypatch.setattr(Oracle, "free_replies", lambda self, talks, max_tokens: [(text, codes)] * len(talks))
    assert free_figures(oracle, tasks)["form"]["share"] == 0.0
    one = np.stack([oracle._codes(World().scene(Random(3)))])
    monkeypatch.setattr(Oracle, "free_replies", lambda self, talks, max_tokens: [("", one)] * len(talks))
    found = free_figures(oracle, tasks)
    assert (found["form"]["share"], found["right"]["share"]) == (1.0, 0.0)


def test_a_free_model_is_held_to_whole_pictures_alone(subject: Subject) -> None:
    pictures = subject.pictures
    prompts = [[1, 3, 40 + index, 4] for index in range(24)]
    found = generate(subject.model, prompts, Sampling(1.5, max_tokens=180), eos_id=-1, num_frames=[FREE] * 24)
    kinds = {pictures.begin_id: "b", pictures.frame_id: "f", pictures.end_id: "e"}
    said = ["".join("c" if pictures.is_code(token) else kinds.get(token, "t") for token in ids) for ids in found]
    assert all(re.fullmatch(r"(t|bc{64}(fc{64})*e)*(bc*)?(bc{64}(fc{64})*(fc*)?)?", each) for each in said)
    assert sum(each.count("c" * 64) for each in said) > 2
    assert {len(each) for each in said} == {180}
    drawn = [(text, len(codes)) for text, codes in subject.free_replies([Talk("x", ("draw",), ())] * 3, 80)]
    assert len(set(drawn)) == 1  # greedy


def test_whoever_copies_the_other_style_is_found_out(oracle: Oracle, tmp_path: Path) -> None:
    codes = oracle.streams.memory.codes
    other = {codes[one][place].tobytes(): codes[two][place] for one, two in (STYLES, STYLES[::-1]) for place in range(NUM_EMOJI)}
    found = memory_figures(replace(oracle, answer=lambda each: other[each.tobytes()]), tmp_path, most=None)["held_out"]
    assert found["sampled"]["emoji"]["share"] == 1.0
    assert found["sampled"]["picture"]["share"] == found["sampled"]["style"]["share"] == 0.0
    assert found["copied_codes"] == found["copied_pictures"]["share"] == 1.0
    assert found["copy_baseline"] == found["sampled"]


def test_whoever_draws_one_scene_for_all_is_wrong_in_all_but_the_parts(oracle: Oracle) -> None:
    scene = World().scene(Random(3))
    fixed = oracle._codes(scene)
    found = figures_of(attempt(replace(oracle, answer=lambda codes: fixed), tasks_of(oracle, "draw", "triple", 24)))
    assert found["right"]["share"] == 0.0
    assert 0.0 < found["background"] < 1.0


def test_tasks_are_the_same_for_every_model_and_of_the_kind_asked_for(subject: Subject, oracle: Oracle) -> None:
    assert tasks_of(subject, "edit", "pair", 9) == tasks_of(oracle, "edit", "pair", 9)
    assert tasks_of(subject, "edit", "pair", 9) != tasks_of(replace(subject, seed=1), "edit", "pair", 9)
    assert all(is_trained(task.scenes[0]) == (kind == "trained") for kind in COMBINATIONS for task in tasks_of(subject, "draw", kind, 20))


def test_a_fresh_classifier_tells_blurred_pictures_but_not_equal_ones(materials: Materials) -> None:
    random = Random(0)
    real = draw_scenes(materials.brush, [World().scene(random) for _ in range(90)])
    blurred = np.stack([np.roll(real, shift, axis=2) for shift in (-1, 0, 1)]).mean(0).astype(np.uint8)
    assert told_apart(real, real, 0, steps=25)["share"] == 0.5
    assert told_apart(real, blurred, 0, steps=25)["share"] > 0.8


def test_scenes_are_read_at_any_size(materials: Materials) -> None:
    scenes = [World().scene(Random(index)) for index in range(12)]
    assert materials.brush.read(reconstruction.to_world_size(draw_scenes(materials.brush, scenes, 64))) == scenes


def test_stable_pairs_share_one_thing_and_its_places_are_its_codes() -> None:
    random = Random(0)
    for _ in range(50):
        first, second, kept = reconstruction._pair(World(), random)
        assert kept in first.things
        assert kept in second.things
        assert first.background == second.background
        assert first != second
    places = reconstruction._places(kept, 8)
    assert places.sum() == 4 * kept.thing.span**2
    assert places[2 * kept.row, 2 * kept.column]


def test_the_first_stage_is_found_only_when_it_led_to_these_codes(subject: Subject, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer" / "reconstruction"
    folder.mkdir(parents=True)
    (tmp_path / "tokenizer" / "adversarial").mkdir()
    assert reconstruction.first_stage(subject.vq, tmp_path) is None
    state = {f"model.{name}": tensor for name, tensor in subject.vq.state_dict().items()}
    torch.save({"module": {**state, "book.idle": torch.zeros(32)}}, folder / "checkpoint.pt")
    found = reconstruction.first_stage(subject.vq, tmp_path)
    assert found is not None
    codes = np.arange(64).reshape(1, 8, 8) % 32
    assert (decode(found, codes) == decode(subject.vq, codes)).all()
    torch.manual_seed(9)
    assert reconstruction.first_stage(VQTokenizer(VQ).requires_grad_(False), tmp_path) is None


def test_f1_of_tags() -> None:
    assert f1({"a", "b"}, {"b", "c", "d"}) == pytest.approx(0.4)
    assert f1(set(), set()) == 1.0


@pytest.fixture(scope="module")
def artefact(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model where a run would have left it."""
    folder = tmp_path_factory.mktemp("run") / "multitask" / "artefact"
    folder.mkdir(parents=True)
    vq = folder.parent / "image_tokenizer"
    save_image_tokenizer(subject.vq, vq)
    save_decoder(subject.learner, subject.scribe.tokenizer, vq, folder)
    (folder.parent / "held_out.csv").write_text("step,seconds,held_out\n2,30,5.5\n4,60,5.25\n", encoding="utf-8")
    return folder


@pytest.fixture
def _offline(materials: Materials, monkeypatch: pytest.MonkeyPatch) -> None:
    unseen = {"fluent3d": materials.emoji.pictures["noto"][:, ::-1]}
    monkeypatch.setattr(evaluation, "load_materials", lambda recipe: materials)
    monkeypatch.setattr(
        reconstruction, "load_emoji", lambda size, styles: EmojiSet((), unseen, {"fluent3d": np.ones(NUM_EMOJI, dtype=np.bool_)})
    )
    monkeypatch.setattr(text, "load_text", lambda sources: TextSet([], ["Braid: a plait\nOf three strands.", "short", "third"]))


@pytest.mark.long
@pytest.mark.usefixtures("_offline")
def test_any_checkpoint_is_measured_and_written_up(artefact: Path, materials: Materials, tmp_path: Path) -> None:
    found = evaluate(artefact, tmp_path / "one", True, data=materials.recipe, amounts=TINY)
    figures = json.loads((tmp_path / "one" / "model.json").read_text(encoding="utf-8"))
    assert found["draw, pair"] == "0.0 % (0.0-56.2, n 3)"
    assert figures["text"]["wikipedia"]["documents"] == 2
    stage = figures["training"]["stages"]["multi-task"]
    assert stage == {"step": 4.0, "seconds": 60.0, "hardware": "an unknown machine", "watched": {"held_out": 5.25}}
    assert set(figures["world"]) == set(TASK_NAMES)
    evaluate(artefact, tmp_path / "two", True, data=materials.recipe, amounts=TINY)
    assert json.loads((tmp_path / "two" / "model.json").read_text(encoding="utf-8")) == figures
    docs, card = tmp_path / "docs", tmp_path / "weights" / "README.md"
    report.write_report(tmp_path / "one", docs, card, None, "braid-test")
    page = (docs / "model.md").read_text(encoding="utf-8")
    assert len(page.splitlines()) < 200
    assert "in 1 minutes of steps" in page
    assert "0 were drawn as the picture that was asked for" in page
    assert "| draw, combinations never trained | at least 80.0 % | 0.0 % | **missed** |" in page
    assert page.count("![") == len(list((docs / "images" / "model").glob("*.png"))) == 4
    assert "braid-test" in card.read_text(encoding="utf-8")


def test_what_only_the_run_knew_is_kept_for_the_same_weights_alone() -> None:
    old = {"model": {"digest": "1"}, "training": {"stages": {"multi-task": {"step": 1.0, "seconds": 1.0}}}}
    new = {"model": {"digest": "1"}, "training": {"stages": {}}}
    assert report.merged(new, old)["training"] == old["training"]
    assert report.merged(new, {**old, "model": {"digest": "2"}}) == new
    assert report.merged({**new, "training": {"stages": {"other": {}}}}, old)["training"] == {"stages": {"other": {}}}
    assert report.merged(new, None) == new


def test_the_digest_is_of_the_weights_wherever_they_lie(artefact: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(artefact, tmp_path / "copy"))
    (copy / "README.md").write_text("a card", encoding="utf-8")
    assert digest_of(copy) == digest_of(artefact)
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    assert digest_of(copy) != digest_of(artefact)


def test_goals_tell_met_from_missed() -> None:
    perfect = {"share": 1.0, "low": 1.0, "high": 1.0, "n": 1}
    pictures = {"psnr_db": 23.7, "gradient_energy": 1.2, "codes_used": 1.0, "perplexity": 9.0, "n": 1}
    world = {name: {kind: {"right": perfect} for kind in COMBINATIONS} for name in TASK_NAMES}
    world["edit"]["pair"] = {"right": {**perfect, "share": 0.69}}
    figures = {
        "reconstruction": {"emoji trained on": pictures},
        "training": {"before_adversary": {"emoji trained on": pictures}},
        "stability": {"share": 0.7},
        "reader": {"real": perfect, "reconstructed": perfect},
        "memory": {},
        "world": world,
    }
    missed = [what for what, _, _, is_met in goals(figures) if not is_met]
    name = "emoji trained on"
    assert missed == [f"PSNR before the adversary, {name}", f"edge energy, {name}", "edit, combinations never trained"]


def test_ablations_are_told_with_mean_and_spread() -> None:
    def record(arm: str, seed: int, value: float, setting: str = "a") -> dict[str, Any]:
        return {"arm": arm, "seed": seed, "n": 10, "setting": setting, "steps": 5.0, "seconds": 60.0, "figures": {"draw, right": value}}

    assert ablations([record("base", 0, 0.5)]) == []
    found = ablations([record("base", 0, 0.5), record("base", 1, 0.7), record("all-global", 0, 0.25)])
    assert [each["name"] for each in found] == ["attention"]
    assert "| draw: right | 0.6 (0.5-0.7) | 0.25 (0.25-0.25) |" in found[0]["table"]
    assert found[0]["seeds"] == "base 2, all-global 1"
    with pytest.raises(ValueError, match="the arms of attention were run with different recipes"):
        ablations([record("base", 0, 0.5), record("all-global", 0, 0.25, "b")])


def test_tables_are_markdown() -> None:
    assert table(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


@pytest.mark.gpu
def test_a_gpu_answers_as_a_cpu_does() -> None:
    """Greedy words and pictures from the same weights on both back ends in float32."""
    config = read_recipe("smoke").model_config()
    source = NamedSource(named_tensors(fresh_decoder(config, 0)))
    prompts = [[1, 3, *range(20, 20 + length), 4] for length in (3, 9, 17)]
    found = []
    for device, ops in (("cpu", "reference"), ("cuda", "triton")):
        model = build_transformer(config, source, select_ops(ops), precision=Precision(torch.float32), device=device)  # type: ignore[arg-type]
        found.append(generate(model, prompts, Sampling(max_tokens=12), eos_id=2, num_frames=[0, 1, 2]))
    assert found[0] == found[1]
