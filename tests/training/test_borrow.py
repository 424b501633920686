"""A decoder that begins as a text checkpoint: its text stays what it was, bit for bit, and it learns pictures through adapters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import save_file

from service.codec.prompt import load_codec
from service.errors import StartupError
from service.model.config import LayerAttention, ModelConfig
from service.model.families import read_config
from service.model.weights import open_weights
from tests.codec import tiny
from tests.model import checkpoints
from training.adapt import Adapters, adapted_ops
from training.arms import changed
from training.borrow import borrowed_vocabulary, borrowed_weights, check_borrowed
from training.decoder import named_tensors, teachable
from training.export import hf_name
from training.language import LanguageSettings, LanguageStage
from training.ranks import Rank
from training.recipe import Recipe, read_recipe
from training.stages import Course, new_weights, read_vocabulary, run_stage
from training.stream.document import Document
from training.tokens import PAD_ID, SPECIALS, train_tokenizer

TEXTS = ["a big red star in row 1, column 2, on sand. ", "Draw a small blue circle! ", "What is this? A strawberry, noto style. "] * 40
OTHERS = tuple(f"<|other_{index}|>" for index in range(len(SPECIALS) + 1))
SIZE = 300
CONFIG = replace(checkpoints.TINY, vocab_size=SIZE, max_context=512, layers=(LayerAttention(rope_base=5000.0),) * 2, norm_eps=1e-5)
SIZES = {
    "decoder.text_vocab_size": SIZE,
    "decoder.width": CONFIG.width,
    "decoder.feed_forward_width": CONFIG.feed_forward_width,
    "decoder.num_heads": CONFIG.num_heads,
    "decoder.num_kv_heads": CONFIG.num_kv_heads,
    "decoder.head_width": CONFIG.head_width,
    "decoder.rope_base": 5000.0,
    "decoder.norm_eps": 1e-5,
    "decoder.has_qk_norm": False,
    "decoder.global_every": 1,
}


@pytest.fixture(scope="module")
def library() -> tokenizers.Tokenizer:
    return train_tokenizer(TEXTS, SIZE, OTHERS)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory, library: tokenizers.Tokenizer) -> Path:
    """A Llama as others write it, in bfloat16."""
    folder = tmp_path_factory.mktemp("theirs")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": SIZE,
        "hidden_size": CONFIG.width,
        "intermediate_size": CONFIG.feed_forward_width,
        "num_hidden_layers": len(CONFIG.layers),
        "num_attention_heads": CONFIG.num_heads,
        "num_key_value_heads": CONFIG.num_kv_heads,
        "head_dim": CONFIG.head_width,
        "max_position_embeddings": 8192,
        "rms_norm_eps": CONFIG.norm_eps,
        "rope_theta": 5000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "eos_token_id": 2,
    }
    tiny.write_folder(folder, library, config=config)
    tensors = {name: torch.from_numpy(values) * 0.1 for name, values in checkpoints.random_tensors(CONFIG).items()}
    save_file({hf_name(name): tensor.bfloat16() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def recipe_of(theirs: Path, **changes: Any) -> Recipe:
    lora = {f"{stage}.settings.lora_rank": 2 for stage in ("pretrain", "multitask")}
    return changed(read_recipe("smoke"), {**SIZES, "decoder.source": str(theirs), **lora, **changes})


def test_the_vocabulary_is_theirs_under_our_names(theirs: Path, library: tokenizers.Tokenizer) -> None:
    found = borrowed_vocabulary(theirs)
    assert found.get_vocab_size() == SIZE
    assert [found.id_to_token(index) for index in range(len(SPECIALS) + 1)] == [*SPECIALS, OTHERS[-1]]
    for text in (*TEXTS[:3], "\nunseen: ünïcode 画 🙂  <|other_1|>"):
        ids = found.encode(text, add_special_tokens=False).ids
        assert found.decode(ids) == text
        if "<|" not in text:
            assert ids == library.encode(text, add_special_tokens=False).ids
    assert found.encode("a<|bos|>", add_special_tokens=False).ids[-1] == 1


def letters() -> list[str]:
    """Of a vocabulary whose first ids are special."""
    return [*OTHERS, *(each for each in tiny.byte_level_metadata()["tokenizer.ggml.tokens"] if each not in tiny.CONTROL)]


def full_gguf(folder: Path, config: ModelConfig) -> Path:
    """A whole checkpoint in one file."""
    tokens = letters()
    vocabulary = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [3] * len(OTHERS) + [1] * (len(tokens) - len(OTHERS))}
    metadata = {**checkpoints.metadata_of(config, "llama"), **tiny.byte_level_metadata(**vocabulary)}
    writer = gguf.GGUFWriter(folder / "full.gguf", "llama")
    for key, value in metadata.items():
        if key != "general.architecture":
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
            add[type(value)](key, value)
    for name, values in checkpoints.random_tensors(config).items():
        writer.add_tensor(checkpoints.gguf_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "full.gguf"


def test_a_gguf_files_vocabulary_needs_as_many_special_tokens(tmp_path: Path) -> None:
    path = tiny.write_gguf(tmp_path / "few.gguf", tiny.byte_level_metadata())
    with pytest.raises(StartupError, match="are no special tokens"):
        borrowed_vocabulary(path)
    tokens = letters()
    types = [3] * len(OTHERS) + [1] * (len(tokens) - len(OTHERS))
    changes: Mapping[str, Any] = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    found = borrowed_vocabulary(tiny.write_gguf(tmp_path / "many.gguf", tiny.byte_level_metadata(**changes)))
    assert found.get_vocab_size() == len(tokens)
    assert found.token_to_id("<|eoi|>") == 7
    assert found.decode(found.encode("hello hello", add_special_tokens=False).ids) == "hello hello"


def test_a_gguf_files_sizes_are_float32(tmp_path: Path) -> None:
    config = replace(CONFIG, vocab_size=len(letters()), layers=(LayerAttention(),) * 2)
    path = full_gguf(tmp_path, config)
    sizes = {"decoder.text_vocab_size": config.vocab_size, "decoder.rope_base": 1e4}
    recipe = recipe_of(path, **sizes)
    assert read_config(path).norm_eps != recipe.decoder.norm_eps
    check_borrowed(path, recipe.model_config())
    with pytest.raises(StartupError, match=r"decoder\.norm_eps must be 1e-05, as full\.gguf has it"):
        check_borrowed(path, recipe_of(path, **sizes, **{"decoder.norm_eps": 1e-6}).model_config())


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"hidden_act": "gelu_pytorch_tanh"}, "activation is 'gelu_tanh'"), ({"tie_word_embeddings": False}, "has_tied_head is False")],
)
def test_what_no_recipe_can_have_is_not_borrowed(theirs: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = Path(shutil.copytree(theirs, tmp_path / "other"))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))
    with pytest.raises(StartupError, match=f"other can't be borrowed: its {message}"):
        check_borrowed(folder, recipe_of(folder).model_config())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder.text_vocab_size": 299}, f"text_vocab_size must be {SIZE}"),
        ({"decoder.num_layers": 3}, "num_layers must be 2"),
        ({"decoder.rope_base": 1e4}, "rope_base must be 5000"),
        ({"decoder.has_qk_norm": True}, "has_qk_norm must be 0"),
        ({"decoder.width": 32, "decoder.norm_eps": 1e-6}, r"decoder\.width must be 64, decoder\.norm_eps must be 1e-05"),
    ],
)
def test_other_sizes_than_theirs_are_named(theirs: Path, changes: dict[str, Any], message: str) -> None:
    config = recipe_of(theirs, **changes).model_config()
    with pytest.raises(StartupError, match=message):
        check_borrowed(theirs, config)


def test_codes_get_rows_as_long_as_the_texts(theirs: Path) -> None:
    recipe = recipe_of(theirs)
    codebook = torch.nn.functional.normalize(torch.randn(32, 4), dim=-1)
    found = new_weights(recipe, codebook).tensors
    source = open_weights(theirs, read_config(theirs))
    assert torch.equal(found["embedding"][:SIZE], source.get("embedding").float())
    assert found["embedding"][SIZE:].norm(dim=-1).mean() == pytest.approx(float(found["embedding"][:SIZE].norm(dim=-1).mean()), rel=1e-4)
    assert torch.equal(found["layers.1.down"], source.get("layers.1.down").float())
    assert not found["grid_rows"].any()


def _documents(config: ModelConfig) -> list[Document]:
    assert config.pictures is not None
    codes = [config.pictures.first_code + place % config.pictures.num_codes for place in range(config.pictures.num_places)]
    ids = np.array([1, 3, 40, 41, 4, 5, *codes, 7, 2])
    is_target = np.arange(len(ids)) > 4
    return [Document("drawing", ids, is_target)]


def test_a_step_moves_adapters_and_codes_and_nothing_else(theirs: Path) -> None:
    recipe = recipe_of(theirs)
    config = recipe.model_config()
    weights = new_weights(recipe, torch.nn.functional.normalize(torch.randn(32, 4), dim=-1))
    adapters: list[Adapters] = []
    model = teachable(config, weights, ops=adapted_ops(adapters))
    adapters.append(Adapters(model, 2, 4.0, 0))
    before = {name: tensor.clone() for name, tensor in named_tensors(model).items()}
    settings = LanguageSettings(lora_rank=2, weight_decay=0.1)
    documents = _documents(config)
    stage = LanguageStage(
        "x", model, lambda random, tokens: documents, {}, settings, adapters=adapters[0], pad_id=PAD_ID, rank=Rank(), seed=0
    )
    for step in range(3):
        stage.step(step)
    after = named_tensors(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"embedding", "grid_rows", "grid_columns"}
    rows = (before["embedding"] != after["embedding"]).any(1)
    assert not rows[len(SPECIALS) : SIZE].any()
    assert rows[SIZE:].all()
    assert rows[4]
    adapters[0].merge()
    assert not torch.equal(named_tensors(model)["layers.0.down"], before["layers.0.down"])


def test_every_stage_runs_from_a_text_checkpoint(theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.log.plot_curves", lambda folder, name: None)
    course = Course(recipe_of(theirs), tmp_path / "run", 1)
    for stage in ("data", "tokenizer", "pretrain", "multitask"):
        run_stage(course, stage, say=lambda text: None)
    assert read_vocabulary(course).get_vocab_size() == SIZE
    artefact = course.artefact("multitask")
    config = read_config(artefact)
    assert config == course.recipe.model_config()
    found, text = open_weights(artefact, config), open_weights(theirs, read_config(theirs))
    assert torch.equal(found.get("embedding")[len(SPECIALS) : SIZE], text.get("embedding")[len(SPECIALS) :])
    assert not torch.equal(found.get("layers.0.q"), text.get("layers.0.q"))
    assert json.loads((artefact / "config.json").read_text())["use_qk_norm"] is False
    assert load_codec(artefact).eos_ids == (2,)


def test_base_is_a_recipe_of_smollm2s_sizes() -> None:
    config = read_recipe("base").model_config()
    assert config.num_parameters == pytest.approx(134.5e6 + 2048 * 576, rel=0.001)


@pytest.mark.long
def test_smollm2s_vocabulary_can_be_borrowed() -> None:
    from service.catalog import resolve

    path = resolve("smollm2-135m-instruct").path
    found, codec = borrowed_vocabulary(path), load_codec(path)
    recipe = read_recipe("base")
    assert found.get_vocab_size() == recipe.decoder.text_vocab_size
    assert found.id_to_token(1) == "<|bos|>"
    for text in (*TEXTS[:3], "12 + 30 = 42\n\n\tdéjà vu 画"):
        ids = found.encode(text, add_special_tokens=False).ids
        assert ids == codec.tokenizer.encode(text)
        assert found.decode(ids) == text
    weights = borrowed_weights(path, recipe.model_config(), torch.randn(2048, 576))
    assert weights.tensors["embedding"].shape == (51200, 576)
