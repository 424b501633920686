"""What a template tells about its model: the dialect of its calls, its marks of reasoning, and where a prompt leaves the reply."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers

from service.codec.prompt import Codec, load_codec
from service.codec.reply_parser import Marks
from service.codec.special import Special, SpecialTokens
from service.codec.template import ChatTemplate
from service.codec.tokenizer import Ends, Tokenizer
from tests.codec.replies import NOW, TEMPLATES, THINK, offered
from tests.codec.tiny import byte_level_metadata, write_gguf

USER = {"role": "user", "content": "Why <think> so?"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_codec(write_gguf(tmp_path_factory.mktemp("codec") / "tiny.gguf", byte_level_metadata())).tokenizer


def codec_of(tokenizer: Tokenizer, source: str) -> Codec:
    return Codec("model", tokenizer, ChatTemplate(source, {}), {}, 512)


@pytest.mark.parametrize("family", list(TEMPLATES))
def test_families_are_known_by_their_templates(tokenizer: Tokenizer, family: str) -> None:
    source, marks = TEMPLATES[family]
    form = codec_of(tokenizer, source).format
    assert form.dialect.name == family.split()[0]
    assert form.marks == marks
    assert form.knows_tools is (family != "generic")


def test_the_default_model_is_told_of_tools_in_words(smollm2_path: Path) -> None:
    form = load_codec(smollm2_path).format
    assert (form.dialect.name, form.marks, form.knows_tools, form.knows_system) == ("generic", None, False, True)
    assert form.is_plain(None)
    assert not form.is_plain(offered(NOW))


def test_templates_that_fail_on_a_probe_still_have_a_format(tokenizer: Tokenizer) -> None:
    for source in ("{{ raise_exception('never') }}", "{{ nothing.inside }}"):
        form = codec_of(tokenizer, source).format
        assert (form.dialect.name, form.knows_tools, form.knows_system) == ("generic", False, False)
    assert Codec("base", tokenizer, None, {}, 512).format.dialect.name == "generic"


@pytest.mark.parametrize(
    ("ending", "options", "is_reasoning"),
    [
        ("", {}, False),
        ("<think>\n", {}, True),
        ("<think>\n\n</think>\n\n", {}, False),
        ("{% if enable_thinking %}<think>{% endif %}", {"template_kwargs": {"enable_thinking": True}}, True),
        ("{% if enable_thinking %}<think>{% endif %}", {"reasoning_effort": "none"}, False),
    ],
)
def test_where_a_prompt_leaves_the_reply(tokenizer: Tokenizer, ending: str, options: dict[str, Any], is_reasoning: bool) -> None:
    turns = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    codec = codec_of(tokenizer, turns + ending + "{# </think> #}")
    assert codec.format.is_reasoning(codec.encode_chat([USER], **options)) is is_reasoning


def test_a_continued_message_may_be_in_the_middle_of_its_reasoning(tokenizer: Tokenizer) -> None:
    codec = codec_of(tokenizer, TEMPLATES["hermes thinking"][0].replace("<think>\n\n</think>\n\n", "</think>"))
    for content, is_reasoning in (("<think>\nBecause", True), ("<think>x</think> So", False), ("So", False)):
        ids = codec.encode_chat([USER, {"role": "assistant", "content": content}], continue_final_message=True)
        assert codec.format.is_reasoning(ids) is is_reasoning


def test_without_control_tokens_only_the_very_end_counts(tokenizer: Tokenizer) -> None:
    codec = codec_of(tokenizer, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ open }}{# </think> #}")
    assert not codec.format.is_reasoning(codec.encode_chat([USER]))
    assert codec.format.is_reasoning(codec.encode_chat([USER], template_kwargs={"open": "<think>\n"}))


def test_marks_that_are_control_tokens_are_seen() -> None:
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    special = SpecialTokens([Special(256, "[THINK]"), Special(257, "[/THINK]"), Special(258, "[INST]")])
    tokenizer = Tokenizer([*(bytes([byte]) for byte in range(256)), b"", b"", b""], special, Ends(), library, library)
    codec = codec_of(tokenizer, "[INST]{{ messages[0].content }}[THINK]")
    form = codec.format
    assert form.marks == Marks("[THINK]", "[/THINK]")
    assert form.shown(None) == {256, 257}
    assert form.is_reasoning([258, 65, 256])
    assert not form.is_reasoning([256, 65, 258, 65])
    assert not form.is_reasoning([258, 256, 65, 257])
    assert "<[257]>" in form.after_reasoning('"x"', is_reasoning=True)
    assert form.marks != THINK
