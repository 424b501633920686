"""Fine-tuning: the files, the figures, what adapters and the mask do to a model, and whole runs on a tiny one, exported and read again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from kernels.ops import AttentionSpec
from kernels.training_ops import empty_kv, training_ops, whole_documents
from service.codec.prompt import Codec, load_codec
from service.errors import StartupError
from service.model.config import LayerAttention, ModelConfig, expected_shapes
from service.model.families import read_config
from service.model.weights import half_split_rows, open_weights
from tests.codec import tiny
from tests.model import checkpoints
from tests.model.test_experts import write_file
from training.adapt import BothWays
from training.export import hf_name
from training.finetune.cli import main
from training.finetune.examples import Example, dialogue_example, labelled_example, tagging_example
from training.finetune.export import interleaved_rows, load_exported
from training.finetune.files import Dialogue, Labelled, Sentence, read_dialogues, read_labelled, read_sentences, write_sentences
from training.finetune.learner import Adaptation, Learner
from training.finetune.measures import Score, class_scores, entities, entity_scores, has_entities, macro_f1, total
from training.finetune.proof import tagged_scene
from training.finetune.run import Plan, finetune, measure
from training.finetune.stage import Settings, TaskStage
from training.finetune.tasks import Split, Task, figures_of, read_task
from training.world.scene import Placed, Thing, scene_of


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plotting costs more than these runs do, and test_log asks for it where it matters."""
    monkeypatch.setattr("training.log.plot_curves", lambda folder, name: None)


# --- a tiny model --------------------------------------------------------------------------------------------------------------------

CONFIG = ModelConfig(
    vocab_size=len(tiny.byte_level_metadata()["tokenizer.ggml.tokens"]),
    width=32,
    feed_forward_width=48,
    num_heads=4,
    num_kv_heads=2,
    head_width=8,
    layers=(LayerAttention(),) * 2,
    max_context=128,
    has_tied_head=True,
    eos_ids=(2,),
    bos_id=1,
)


def small_tensors() -> dict[str, np.ndarray]:
    """Random, at the scale of a model that was trained."""
    return {name: np.ones_like(values) if "norm" in name else values * 0.1 for name, values in checkpoints.random_tensors(CONFIG).items()}


@pytest.fixture(scope="module")
def gguf_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file with a vocabulary, a template and weights."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    metadata = {**checkpoints.metadata_of(CONFIG, "llama"), **tiny.byte_level_metadata(), "llama.context_length": CONFIG.max_context}
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        add[type(value)](key, value)
    for name, values in small_tensors().items():
        part = name.rpartition(".")[2]
        heads = {"q": CONFIG.num_heads, "k": CONFIG.num_kv_heads}.get(part)
        writer.add_tensor(checkpoints.gguf_name(name), checkpoints.interleave(values, heads) if heads else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def folder_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shape of model as a folder of safetensors, whose vocabulary is of the Llama 3 kind."""
    library = tiny.llama3_library()
    folder = tmp_path_factory.mktemp("folder")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": CONFIG.vocab_size,
        "hidden_size": CONFIG.width,
        "intermediate_size": CONFIG.feed_forward_width,
        "num_hidden_layers": 2,
        "num_attention_heads": CONFIG.num_heads,
        "num_key_value_heads": CONFIG.num_kv_heads,
        "head_dim": CONFIG.head_width,
        "max_position_embeddings": CONFIG.max_context,
        "rms_norm_eps": CONFIG.norm_eps,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "eos_token_id": library.token_to_id("<|eot|>"),
    }
    tiny.write_folder(folder, library, config=config)
    save_file({hf_name(name): torch.from_numpy(values) for name, values in small_tensors().items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def codec(gguf_path: Path) -> Codec:
    return load_codec(gguf_path)


def learner_of(path: Path, num_classes: int | None = 3, **adaptation: Any) -> Learner:
    return Learner(path, Adaptation(**{"rank": 2, **adaptation}), num_classes, seed=0)


def test_gemma_is_not_taught(tmp_path: Path) -> None:
    config = replace(checkpoints.TINY, has_post_norms=True)
    path = checkpoints.write_gguf(tmp_path / "gemma.gguf", config, checkpoints.random_tensors(config), family="gemma2")
    with pytest.raises(StartupError, match=r"gemma.gguf can't be taught: Gemma's families are served alone"):
        Learner(path, Adaptation(rank=2), 3, seed=0)


def test_a_mixture_of_experts_is_not_taught(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"tiny.gguf can't be taught: mixtures of experts are served alone"):
        Learner(write_file(tmp_path / "tiny.gguf", "qwen3moe"), Adaptation(rank=2), 3, seed=0)


def examples_of(*texts: tuple[int, ...]) -> list[Example]:
    return [Example(ids, tuple(range(len(ids))), (0,) * len(ids)) for ids in texts]


# --- files -----------------------------------------------------------------------------------------------------------------------------


def test_sentences_are_read_from_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.conll"
    path.write_text("-DOCSTART- -X- O\n\nThe DT O\nHague\tNNP\tB-LOC\r\n\n\n. . O", encoding="utf-8")
    assert read_sentences(path) == [Sentence(("The", "Hague"), ("O", "B-LOC")), Sentence((".",), ("O",))]


def test_written_sentences_read_the_same(tmp_path: Path) -> None:
    sentences = [Sentence(("a", "b"), ("O", "B-X")), Sentence(("c",), ("O",))]
    write_sentences(tmp_path / "a.conll", sentences)
    assert read_sentences(tmp_path / "a.conll") == sentences


@pytest.mark.parametrize(
    ("read", "name", "text", "said"),
    [
        (read_sentences, "a.conll", "a O\nb\n", "line 2 of a.conll has one column"),
        (read_sentences, "a.conll", "\n\n", "holds no examples"),
        (read_labelled, "a.jsonl", '{"text": "a", "label": "x"}\n{"text": "a"}', "entry 2 of a.jsonl"),
        (read_labelled, "a.jsonl", "{", "line 1 of a.jsonl is no JSON"),
        (read_labelled, "a.jsonl", "[]", "is no JSON object"),
        (read_labelled, "a.csv", "text,kind\na,b\n", "entry 1 of a.csv"),
        (read_dialogues, "a.jsonl", '{"prompt": "a"}', "entry 1 of a.jsonl must have a prompt"),
        (read_dialogues, "a.jsonl", '{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}', "entry 1"),
        (read_dialogues, "b.jsonl", '{"messages": [{"role": "tool", "content": "a"}, {"role": "assistant", "content": "b"}]}', "entry 1"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, read: Any, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(StartupError, match=said):
        read(tmp_path / name)


def test_labels_come_from_csv_and_jsonl_alike(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('label,text\n1,"two\nlines, and a comma"\n', encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "two\nlines, and a comma", "label": 1}), encoding="utf-8")
    assert read_labelled(tmp_path / "a.csv") == read_labelled(tmp_path / "a.jsonl") == [Labelled("two\nlines, and a comma", "1")]


# --- figures ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("B-A I-A O B-B", {("A", 0, 2), ("B", 3, 4)}),
        ("B-A B-A", {("A", 0, 1), ("A", 1, 2)}),
        ("I-A I-A I-B", {("A", 0, 2), ("B", 2, 3)}),  # spans that nothing begins
        ("O I-A O", {("A", 1, 2)}),
        ("B-A I-B", {("A", 0, 1), ("B", 1, 2)}),
        ("B-A E-A S-A B-B", {("A", 0, 2), ("A", 2, 3), ("B", 3, 4)}),
        ("B-A E-A I-A", {("A", 0, 2), ("A", 2, 3)}),
        ("B-A-B I-A-B", {("A-B", 0, 2)}),
        ("O O", set()),
    ],
)
def test_entities(tags: str, found: set[tuple[str, int, int]]) -> None:
    assert entities(tags.split()) == found


@given(st.lists(st.tuples(st.sampled_from(["A", "B", ""]), st.integers(1, 3)), max_size=8))
def test_spans_written_as_tags_are_found_again(runs: list[tuple[str, int]]) -> None:
    tags, expected = [], set()
    for kind, size in runs:
        if kind:
            expected.add((kind, len(tags), len(tags) + size))
        tags += [f"B-{kind}", *[f"I-{kind}"] * (size - 1)] if kind else ["O"] * size
    assert entities(tags) == expected


def test_scores_by_hand() -> None:
    scores = class_scores(["O", "O", "A", "A", "B"], ["O", "A", "A", "B", "B"])
    assert scores == {"A": Score(1, 2, 2), "B": Score(1, 2, 1), "O": Score(1, 1, 2)}
    assert (scores["A"].precision, scores["B"].precision, scores["B"].recall) == (0.5, 0.5, 1.0)
    assert total(list(scores.values())).f1 == 3 / 5  # accuracy, when every place has one class
    assert macro_f1(scores) == pytest.approx((1 / 2 + 2 / 3 + 2 / 3) / 3)
    assert Score(0, 0, 0).f1 == Score(0, 0, 0).precision == Score(0, 0, 0).recall == 0.0


def test_an_entity_needs_both_borders_and_its_kind() -> None:
    true, said = ["B-A I-A O B-B".split(), ["B-A"]], ["B-A O O B-B".split(), ["B-B"]]
    assert entity_scores(true, said) == {"A": Score(0, 1, 2), "B": Score(1, 2, 1)}
    assert has_entities(["O", "B-A"])
    assert not has_entities(["O", "NN"])
    assert not has_entities(["O"])


def test_figures_leave_o_out_where_they_say_so() -> None:
    task = Task("tokens", ("B-A", "O"), {})
    split = Split((), (("O", "O", "B-A"), ("O", "B-A")))
    figures = figures_of(task, split, [1, 1, 0, 1, 1], nats=0.5)
    assert figures.summary["token_micro_f1"] == 4 / 5
    assert figures.summary["token_micro_f1_without_o"] == figures.summary["token_macro_f1_without_o"] == pytest.approx(2 / 3)
    assert figures.summary["token_macro_f1"] == pytest.approx((2 / 3 + 6 / 7) / 2)
    assert figures.summary["entity_f1"] == pytest.approx(2 / 3)
    worse = figures_of(task, split, [1, 1, 0, 1, 1], nats=0.6)
    assert figures.watched < worse.watched  # a tie goes to the smaller loss
    assert figures_of(task, split, [1, 1, 0, 1, 0], nats=9.0).watched < figures.watched


# --- examples --------------------------------------------------------------------------------------------------------------------------


def test_a_word_is_answered_for_at_its_first_id(codec: Codec) -> None:
    words = ("hello", "Zürich", "(", "hello", "日本")
    (example,) = tagging_example(Sentence(words, ("O",) * 5), codec, {"O": 0}, 64)
    tokenizer = codec.tokenizer
    head = len(example.ids) - len(tokenizer.encode(" ".join(words)))
    for word, begin in zip(words, example.places, strict=True):
        before = tokenizer.decode(example.ids[head:begin])
        with_it = b"".join(tokenizer.token_bytes(token) for token in example.ids[begin:]).lstrip(b" ")
        assert with_it.startswith(word.encode()), (word, before)
    assert len(set(example.places)) == 5


def test_a_word_is_found_behind_the_space_that_a_vocabulary_begins_with(tmp_path: Path) -> None:
    codec = load_codec(tiny.write_gguf(tmp_path / "spm.gguf", tiny.sentencepiece_metadata()))
    (example,) = tagging_example(Sentence(("hello", "x"), ("O", "O")), codec, {"O": 0}, 64)
    for word, place in zip(("hello", "x"), example.places, strict=True):
        rest = b"".join(codec.tokenizer.token_bytes(token) for token in example.ids[place:])
        assert rest.lstrip(b" ").startswith(word.encode())


def test_a_long_sentence_keeps_every_word(codec: Codec) -> None:
    words = tuple(f"word{index}" for index in range(20))
    tags = tuple(f"T{index}" for index in range(20))
    parts = tagging_example(Sentence(words, tags), codec, {tag: index for index, tag in enumerate(tags)}, 30)
    assert len(parts) > 1
    assert [target for part in parts for target in part.targets] == list(range(20))
    assert all(len(part.ids) <= 30 for part in parts)
    with pytest.raises(StartupError, match="a word of 40 letters"):
        tagging_example(Sentence(("x" * 40,), ("T0",)), codec, {"T0": 0}, 30)


def test_a_text_is_answered_for_at_its_last_id(codec: Codec) -> None:
    example = labelled_example(Labelled("hello ab cd", "b"), codec, {"a": 0, "b": 1}, 4)
    assert len(example.ids) == 4
    assert (example.places, example.targets) == ((3,), (1,))


def test_an_answer_is_all_that_is_to_be_predicted(codec: Codec) -> None:
    messages = ({"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello you"})
    example = dialogue_example(Dialogue(messages), codec, 128)
    assert example is not None
    head = codec.encode_chat(messages[:1])
    assert list(example.ids[: len(head)]) == head
    assert example.targets == example.ids[len(head) :]
    assert codec.tokenizer.decode(example.targets).startswith("hello you")
    assert dialogue_example(Dialogue(messages), codec, len(head)) is None


def test_a_dialogue_that_the_template_refuses_is_named(codec: Codec, tmp_path: Path) -> None:
    rows = [[{"role": "user", "content": text}, {"role": "assistant", "content": "x"}] for text in ("hello", "\ud800")]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"messages": row}) for row in rows), encoding="utf-8")
    with pytest.raises(StartupError, match=r"entry 2 of a\.jsonl: messages hold half a surrogate"):
        read_task("instructions", {"train": tmp_path / "a.jsonl"}, codec, 64)


# --- the model -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [True, False])
def test_company_and_padding_change_no_answer(gguf_path: Path, is_causal: bool) -> None:
    learner = learner_of(gguf_path, is_causal=is_causal)
    one, other = examples_of((3, 4, 5), (6, 7, 8, 9, 10, 11))
    with torch.no_grad():
        together = learner.answers([one, other])
        apart = torch.cat([learner.answers([one]), learner.answers([other])])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("is_causal", "changes"), [(True, False), (False, True)])
def test_only_both_directions_see_what_follows(gguf_path: Path, is_causal: bool, changes: bool) -> None:
    learner = learner_of(gguf_path, is_causal=is_causal)
    with torch.no_grad():
        first, second = (learner.answers(examples_of(ids))[0] for ids in ((3, 4, 5), (3, 4, 6)))
    assert (not torch.equal(first, second)) == changes


def test_both_ways_is_the_causal_formula_where_all_is_seen() -> None:
    """The last place sees everything under either mask, windows and soft caps included."""
    torch.manual_seed(0)
    batch = whole_documents(2, 9, None)
    q = torch.randn(18, 4, 8)
    kv = empty_kv(batch, 2, 8)
    kv.keys, kv.values = torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    for spec in (AttentionSpec(0.3), AttentionSpec(0.3, softcap=2.0), AttentionSpec(0.3, window=4, sink=2)):
        both = BothWays(torch.tensor([9, 9])).attend(q, kv, spec).view(2, 9, -1)
        causal = training_ops().attend(q, kv, spec).view(2, 9, -1)
        torch.testing.assert_close(both[:, -1], causal[:, -1], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(both[:, 0], causal[:, 0])


def test_a_window_looks_as_far_ahead_as_back() -> None:
    batch = whole_documents(1, 9, None)
    q, kv = torch.randn(9, 4, 8), empty_kv(batch, 2, 8)
    kv.keys, kv.values = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    spec = AttentionSpec(0.3, window=3, sink=1)
    before = BothWays(torch.tensor([9])).attend(q, kv, spec)
    kv.values = kv.values.clone()
    kv.values[:, :, 6] += 1
    changed = (BothWays(torch.tensor([9])).attend(q, kv, spec) != before).any(-1)
    assert changed.tolist() == [False] * 4 + [True] * 5  # places 4 to 8 are less than 3 away from place 6


def test_adapters_begin_as_nothing_and_merge_into_the_matrices(gguf_path: Path) -> None:
    plain, adapted = learner_of(gguf_path, None, rank=0), learner_of(gguf_path, None, rank=3, alpha=6.0)
    examples = examples_of((3, 4, 5, 6))
    with torch.no_grad():
        torch.testing.assert_close(adapted.answers(examples), plain.answers(examples), rtol=0, atol=0)
        assert adapted.adapters is not None
        for parameter in adapted.adapters.parameters():
            parameter.normal_(std=0.1)
        beside = adapted.answers(examples)
        adapted.adapters.merge()
        merged = adapted.answers(examples)
    torch.testing.assert_close(merged, beside, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(beside, plain.answers(examples), atol=1e-2)


@pytest.mark.parametrize(("rank", "frozen"), [(2, 0), (2, 1), (0, 0), (0, 1)])
def test_what_is_frozen_gets_no_gradient_and_the_rest_does(gguf_path: Path, rank: int, frozen: int) -> None:
    learner = learner_of(gguf_path, rank=rank, frozen_layers=frozen)
    learner.answers(examples_of((3, 4, 5))).square().sum().backward()
    moved = {name for name, each in learner.module.named_parameters() if each.grad is not None and each.grad.abs().sum() > 0}
    if rank:  # at first the product's other factor is 0, so the first gets no gradient yet
        layers = {name.split(".")[2].split("_")[0] for name in moved if name.endswith("_b")}
    else:
        layers = {name.split(".")[2] for name in moved if ".layers." in name}
        assert ("decoder.embedding" in moved) == (frozen == 0)
    assert layers == {"1"} if frozen else layers == {"0", "1"}
    assert {"head.weight", "head.bias"} <= moved
    assert all(each.grad is None for each in learner.model.parameters()) == bool(rank)


def test_more_frozen_layers_than_there_are_is_refused(gguf_path: Path) -> None:
    with pytest.raises(StartupError, match="the model has 2"):
        learner_of(gguf_path, frozen_layers=3)


def test_every_example_is_seen_once_an_epoch(gguf_path: Path) -> None:
    examples = tuple(Example(tuple(range(3, 4 + index % 7)), (0,), (0,)) for index in range(50))
    task = Task("sequences", ("a", "b", "c"), {"train": Split(examples, ())})
    stage = TaskStage(learner_of(gguf_path), task, Settings(batch=4), seed=0)
    for epoch in (0, 1):
        batches = stage._batches(epoch)
        assert len(batches) == stage.epoch_steps == 13
        assert sorted(place for batch in batches for place in batch) == list(range(50))
    assert stage._batches(0) == stage._batches(0) != stage._batches(1)


# --- files out -------------------------------------------------------------------------------------------------------------------------


def test_rows_are_put_back_as_the_file_had_them() -> None:
    rows = torch.randn(32, 5)
    assert torch.equal(half_split_rows(interleaved_rows(rows, 4), 4), rows)
    assert interleaved_rows(rows, 4).tolist() == checkpoints.interleave(rows.numpy(), 4).tolist()


def tag_file(path: Path, count: int) -> Path:
    """The word before "he" is X; everything else is O: only who reads ahead can tell."""
    random = np.random.default_rng(count)
    sentences = []
    for _ in range(count):
        words = ["ab", "cd", "he"[random.integers(2)], "he"[random.integers(2)]]
        tags = ["O", "B-X" if words[2] == "h" else "O", "O", "O"]
        sentences.append(Sentence(tuple(words), tuple(tags)))
    write_sentences(path, sentences)
    return path


def plan_of(kind: Any, model: Path, tmp_path: Path, **changes: Any) -> Plan:
    """A run of seconds."""
    files = {name: tmp_path / f"{name}.{'conll' if kind == 'tokens' else 'jsonl'}" for name in ("train", "dev")}
    for count, path in zip((64, 24), files.values(), strict=True):
        if kind == "tokens":
            tag_file(path, count)
            continue
        rows: list[dict[str, str]] = [
            {"text": f"hello {'ab' if at % 2 else 'cd'} he", "label": str(at % 2)}
            if kind == "sequences"
            else {"prompt": f"hello {'ab' if at % 2 else 'cd'}", "completion": "he" if at % 2 else "hello"}
            for at in range(count)
        ]
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    settings = Settings(batch=8, learning_rate=5e-3, head_learning_rate=1e-2)
    return Plan(**{"kind": kind, "model": str(model), "files": files, "settings": settings, "epochs": 6, "patience": 0, **changes})


@pytest.mark.parametrize(("is_causal", "is_learned"), [(True, False), (False, True)])
def test_tags_that_need_what_follows_are_learned_without_the_mask_alone(
    gguf_path: Path, tmp_path: Path, is_causal: bool, is_learned: bool
) -> None:
    plan = plan_of("tokens", gguf_path, tmp_path, adaptation=Adaptation(rank=4, is_causal=is_causal))
    figures = finetune(plan, tmp_path / "out", "cpu", lambda line: None)
    assert (figures.summary["entity_f1"] == 1.0) == is_learned
    # The export, read again, says the same of the same file.
    again = measure(tmp_path / "out" / "model", plan.files["dev"], tmp_path / "again", "cpu")
    assert again.summary == pytest.approx(figures.summary, abs=1e-6)
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["summary"] == figures.summary
    assert report["about"]["attention"] == ("causal" if is_causal else "both directions")
    assert "| X |" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    write_sentences(tmp_path / "odd.conll", [Sentence(("ab",), ("B-Y",))])
    with pytest.raises(StartupError, match="was not taught B-Y"):
        measure(tmp_path / "out" / "model", tmp_path / "odd.conll", tmp_path / "again", "cpu")


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("source", ["gguf_path", "folder_path"])
def test_texts_are_learned_and_the_export_can_be_loaded(source: str, rank: int, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(source)
    plan = plan_of("sequences", path, tmp_path, adaptation=Adaptation(rank=rank))
    figures = finetune(plan, tmp_path / "out", "cpu", lambda line: None)
    assert figures.summary["accuracy"] == 1.0
    exported = tmp_path / "out" / "model"
    config = read_config(exported)
    assert (config.vocab_size, len(config.layers), config.bos_id) == (CONFIG.vocab_size, 2, read_config(path).bos_id)
    source_weights, weights = (open_weights(each, config) for each in (path, exported))
    assert not torch.equal(weights.get("layers.1.q").float(), source_weights.get("layers.1.q").float())
    assert load_codec(exported).tokenizer.encode("hello (ab)") == load_codec(path).tokenizer.encode("hello (ab)")
    learner, card, classes = load_exported(exported)
    assert (card.kind, card.is_causal, classes) == ("sequences", True, ("0", "1"))
    for name, shape in expected_shapes(config).items():
        assert tuple(weights.get(name).shape) == shape
    assert learner.head is not None


def test_answers_are_learned(gguf_path: Path, tmp_path: Path) -> None:
    plan = plan_of("instructions", gguf_path, tmp_path, adaptation=Adaptation(rank=0))
    figures = finetune(plan, tmp_path / "out", "cpu", lambda line: None)
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert figures.summary["nats"] < report["about"]["nats before training"] / 3
    assert not (tmp_path / "out" / "model" / "task" / "labels.json").exists()
    assert measure(tmp_path / "out" / "model", plan.files["dev"], tmp_path / "again", "cpu").summary["nats"] == pytest.approx(
        figures.summary["nats"], abs=1e-5
    )


def test_an_interrupted_run_ends_as_one_that_was_not(gguf_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of("tokens", gguf_path, tmp_path, epochs=3, adaptation=Adaptation(rank=2, is_causal=False))
    whole = finetune(plan, tmp_path / "whole", "cpu", lambda line: None)
    step = TaskStage.step

    def broken(self: TaskStage, number: int) -> Any:
        if number == 19:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(TaskStage, "step", broken)
    with pytest.raises(KeyboardInterrupt):
        finetune(plan, tmp_path / "parts", "cpu", lambda line: None)
    monkeypatch.setattr(TaskStage, "step", step)
    assert finetune(plan, tmp_path / "parts", "cpu", lambda line: None) == whole
    for name in ("task/head.safetensors", "model.gguf"):
        assert (tmp_path / "parts" / "model" / name).read_bytes() == (tmp_path / "whole" / "model" / name).read_bytes()
    with pytest.raises(StartupError, match="other options"):
        finetune(plan_of("tokens", gguf_path, tmp_path, epochs=4), tmp_path / "parts", "cpu", lambda line: None)


def test_the_command_trains_and_measures(gguf_path: Path, tmp_path: Path) -> None:
    plan = plan_of("tokens", gguf_path, tmp_path)
    train, dev, out = (str(each) for each in (plan.files["train"], plan.files["dev"], tmp_path / "out"))
    options = ["--train", train, "--dev", dev, "--model", str(gguf_path), "--out", out, "--epochs", "1", "--full", "--device", "cpu"]
    result = CliRunner().invoke(main, ["tokens", *options], catch_exceptions=False)
    assert result.exit_code == 0
    assert "entity_f1" in result.output
    assert "report.md" in result.output
    again = CliRunner().invoke(
        main, ["measure", f"{out}/model", dev, "--out", str(tmp_path / "b"), "--device", "cpu"], catch_exceptions=False
    )
    assert again.output.splitlines()[0] in result.output
    assert CliRunner().invoke(main, ["tokens", "--train", train]).exit_code == 2


# --- the proof's data ------------------------------------------------------------------------------------------------------------------


def test_a_scene_is_tagged_by_its_last_words() -> None:
    from random import Random

    things = [Placed(0, 1, Thing("shape", "star", "red", "big")), Placed(2, 2, Thing("digit", "7", "blue"))]
    for seed in range(40):
        sentence = tagged_scene(scene_of("sand", things), Random(seed))
        spans = {(kind, " ".join(sentence.words[begin:end])) for kind, begin, end in entities(sentence.tags)}
        names = {kind: text for kind, text in spans if kind != "PLACE"}
        assert names["STAR"] in ("big red star", "large red star")
        assert names["DIGIT"] == "blue digit 7"
        assert names["BACKGROUND"] == "sand"
        assert {text for kind, text in spans if kind == "PLACE"} == {"row 1 , column 2", "row 3 , column 3"}
