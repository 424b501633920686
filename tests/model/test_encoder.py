"""An encoder against the transformers library: what it computes, that company does not change it, and which folders are refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM, BertModel

from service.errors import WeightsError
from service.model.encoder import TILE, Encoder, build_encoder
from service.model.encoder_config import encoder_shapes, read_encoder_config
from service.model.families import read_config
from service.model.weights import open_encoder_weights
from tests.model.checkpoints import TINY, random_tensors, write_gguf
from tests.model.encoders import bert, change_config, write_encoder

LENGTHS = (3, 64, 1, 10, 200, 65, 2, 128, 7)


def load(folder: Path) -> Encoder:
    config = read_encoder_config(folder)
    assert config is not None
    return build_encoder(config, open_encoder_weights(folder, config), dtype=torch.float32)


def texts(vocab_size: int = 21, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    generator = random.Random(1)
    return [[generator.randrange(vocab_size) for _ in range(length)] for length in lengths]


def states(model: Encoder, given: list[list[int]]) -> list[torch.Tensor]:
    with torch.inference_mode():
        return list(torch.split(model(given), [len(text) for text in given]))


@pytest.mark.parametrize("changes", [{}, {"hidden_act": "gelu_new"}, {"hidden_act": "relu", "type_vocab_size": 1}], ids=str)
def test_it_computes_what_transformers_does(tmp_path: Path, changes: dict[str, Any]) -> None:
    reference = bert(**changes)
    model = load(write_encoder(tmp_path, reference))
    for text, ours in zip(texts(), states(model, texts()), strict=True):
        with torch.inference_mode():
            theirs = reference(input_ids=torch.tensor([text])).last_hidden_state[0]
        # float32 sums of up to 80 products in another order: some 1e-6 of numbers of about 3.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
        assert torch.cosine_similarity(ours.mean(0), theirs.mean(0), dim=0) > 0.9999


def test_company_changes_no_bit(tmp_path: Path) -> None:
    model = load(write_encoder(tmp_path, bert(hidden_size=64, intermediate_size=256)))
    given = texts()
    alone = [states(model, [text])[0] for text in given]
    for order in (range(len(given)), reversed(range(len(given))), (4, 4, 0, 3, 3, 3)):
        chosen = list(order)
        for index, found in zip(chosen, states(model, [given[index] for index in chosen]), strict=True):
            assert torch.equal(found, alone[index])


def test_texts_do_not_see_one_another(tmp_path: Path) -> None:
    model = load(write_encoder(tmp_path, bert()))
    first, second = texts(lengths=(TILE - 3, 9))
    changed = [(token + 1) % 21 for token in second]
    assert torch.equal(states(model, [first, second])[0], states(model, [first, changed])[0])
    assert not torch.equal(states(model, [first, second])[1], states(model, [first, changed])[1])


def test_every_token_sees_those_behind_it(tmp_path: Path) -> None:
    model = load(write_encoder(tmp_path, bert()))
    (text,) = texts(lengths=(12,))
    changed = [*text[:-1], (text[-1] + 1) % 21]
    assert not torch.equal(states(model, [text])[0][0], states(model, [changed])[0][0])


def test_numbers_of_the_config(tmp_path: Path) -> None:
    config = read_encoder_config(write_encoder(tmp_path, bert()))
    assert config is not None
    assert (config.num_positions, config.max_context, config.pool, config.norm_eps) == (300, 256, "mean", 1e-12)
    assert config.within(100).max_context == 100
    assert config.within(0).max_context == config.within(1000).max_context == 256
    tensors = load_file(tmp_path / "model.safetensors")
    assert config.num_parameters == sum(tensor.numel() for name, tensor in tensors.items() if "pooler" not in name)


def test_files_of_sentence_transformers_may_be_missing(tmp_path: Path) -> None:
    write_encoder(tmp_path, bert(), sentence_bert_config=None, **{"1_Pooling/config": None})
    config = read_encoder_config(tmp_path)
    assert config is not None
    assert (config.max_context, config.pool) == (300, "mean")


def test_a_checkpoint_with_a_head_is_the_same_encoder(tmp_path: Path) -> None:
    body = bert()
    whole = BertForMaskedLM(body.config)
    whole.bert.load_state_dict({name: tensor for name, tensor in body.state_dict().items() if "pooler" not in name}, strict=False)
    write_encoder(tmp_path / "a", body)
    write_encoder(tmp_path / "b", whole)
    assert any(name.startswith("bert.") for name in load_file(tmp_path / "b" / "model.safetensors"))
    given = texts()
    ours, other = states(load(tmp_path / "a"), given), states(load(tmp_path / "b"), given)
    assert all(torch.equal(a, b) for a, b in zip(ours, other, strict=True))


def test_what_is_no_encoder_is_left_to_others(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "a.gguf", TINY, random_tensors(TINY))
    assert read_encoder_config(file) is None
    write_encoder(tmp_path / "b", bert())
    change_config(tmp_path / "b", architectures=["LlamaForCausalLM"])
    assert read_encoder_config(tmp_path / "b") is None
    change_config(tmp_path / "b", architectures=None)
    assert read_encoder_config(tmp_path / "b") is None
    with pytest.raises(WeightsError, match="architecture is None"):
        read_config(tmp_path / "b")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "swish"}, "activation is 'swish'"),
        ({"hidden_act": ["gelu"]}, "activation is"),
        ({"position_embedding_type": "relative_key"}, "positions are 'relative_key'"),
        ({"is_decoder": True}, "is_decoder"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised"),
        ({"num_attention_heads": 5}, "can't be cut into 5 heads"),
        ({"num_hidden_layers": 0}, "num_layers = 0"),
        ({"num_hidden_layers": 5000}, "5000 layers"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"layer_norm_eps": 0}, "layer_norm_eps"),
    ],
    ids=str,
)
def test_a_config_that_is_not_built_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    change_config(write_encoder(tmp_path, bert()), **changes)
    with pytest.raises(WeightsError, match=words):
        read_encoder_config(tmp_path)


@pytest.mark.parametrize(
    ("pooling", "words"),
    [
        ({"pooling_mode_max_tokens": True}, "made by pooling_mode_max_tokens"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "made by pooling_mode_mean_tokens, pooling_mode_cls_token"),
        ({"word_embedding_dimension": 32}, "made by nothing"),
    ],
    ids=str,
)
def test_other_poolings_are_refused(tmp_path: Path, pooling: dict[str, Any], words: str) -> None:
    write_encoder(tmp_path, bert(), **{"1_Pooling/config": pooling})
    with pytest.raises(WeightsError, match=words):
        read_encoder_config(tmp_path)


def test_a_dense_module_is_refused(tmp_path: Path) -> None:
    (write_encoder(tmp_path, bert()) / "2_Dense").mkdir()
    with pytest.raises(WeightsError, match="dense layer behind its pooling"):
        read_encoder_config(tmp_path)


def rewritten(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("encoder.layer.1.output.dense.bias", None, r"lacks encoder.layer.1.output.dense.bias"),
        ("encoder.layer.1.output.dense.bias", torch.zeros(31), r"has shape \[31\]; the config asks for \[32\]"),
        ("embeddings.LayerNorm.weight", torch.zeros(32, dtype=torch.float64), "of type F64"),
        ("encoder.layer.2.output.dense.bias", torch.zeros(32), "does not have: encoder.layer.2.output.dense.bias"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, name: str, tensor: torch.Tensor | None, words: str) -> None:
    rewritten(write_encoder(tmp_path, bert()), **{name: tensor})
    config = read_encoder_config(tmp_path)
    assert config is not None
    with pytest.raises(WeightsError, match=words):
        open_encoder_weights(tmp_path, config)


def test_every_tensor_is_read(tmp_path: Path) -> None:
    """Each one that the config asks for changes what comes out, so none is mixed up or left out."""
    reference: BertModel = bert()
    config = read_encoder_config(write_encoder(tmp_path, reference))
    assert config is not None
    source = open_encoder_weights(tmp_path, config)
    given = texts(lengths=(21,))
    before = states(load(tmp_path), given)[0]

    class Changed:
        def __init__(self, name: str) -> None:
            self.name = name

        def get(self, name: str) -> torch.Tensor:
            tensor = source.get(name)
            if name != self.name:
                return tensor
            # A bias of the keys alone moves all scores of a query alike, so its effect hides in rounding; every other one shows.
            return tensor + torch.linspace(-1, 1, tensor.numel()).view(tensor.shape)

    for name in encoder_shapes(config):
        model = build_encoder(config, Changed(name), dtype=torch.float32)
        if not name.endswith("k_bias"):
            assert (states(model, given)[0] - before).abs().max() > 1e-3, name
