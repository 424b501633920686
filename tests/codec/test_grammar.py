"""What clients ask for, checked: what is kept is what the library holds, and what is not is refused by name before anything dear."""

from __future__ import annotations

import contextlib
import json
import re
import time
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from service.codec.grammar import (
    MAX_CHOICES,
    MAX_LARK_CHARS,
    MAX_REGEX_CHARS,
    MAX_RULES,
    choice_rule,
    grammar,
    lark_rule,
    object_rule,
    regex_rule,
    schema_rule,
)
from service.codec.json_schema import MAX_CHARS, MAX_DEPTH, MAX_OPTIONAL, MAX_PROPERTIES, MAX_REFERENCES, MAX_VALUES
from service.errors import RequestError


class _Bytes:
    eos_token_id, bos_token_id = 256, None
    tokens = [bytes([code]) for code in range(256)] + [b"\xff<end>", b"\xff<tool>"]
    special_token_ids = [256, 257]  # noqa: RUF012

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


TOKENIZER = LLTokenizer(TokenizerWrapper(_Bytes()), eos_token=[256])


def admits(rule: str, text: str) -> bool:
    """Is this text one that the rule admits, from end to end?"""
    matcher = LLMatcher(TOKENIZER, grammar(rule), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    data = list(text.encode())
    return matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()


def writes(schema: Any, value: Any, **options: Any) -> bool:
    return admits(schema_rule(schema, "s", **options), json.dumps(value, ensure_ascii=False, separators=(",", ":")))


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


# --- what is refused, and by which name ---

NOT_HELD = {
    "propertyNames": {"type": "object", "propertyNames": {"pattern": "^x"}},
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "contains": {"type": "array", "contains": {"type": "integer"}},
    "minContains": {"type": "array", "minContains": 1},
    "maxContains": {"type": "array", "maxContains": 1},
    "dependentRequired": {"dependentRequired": {"a": ["b"]}},
    "dependentSchemas": {"dependentSchemas": {"a": {"required": ["b"]}}},
    "dependencies": {"dependencies": {"a": ["b"]}},
    "if": {"if": {"type": "integer"}, "else": {"minimum": 3}},
    "then": {"then": {"minimum": 3}},
    "else": {"else": {"minimum": 3}},
    "not": {"not": {"type": "integer"}},
    "unevaluatedProperties": {"unevaluatedProperties": False},
    "unevaluatedItems": {"unevaluatedItems": False},
    "$anchor": {"$defs": {"x": {"$anchor": "q"}}},
    "$dynamicRef": {"$dynamicRef": "#q"},
    "$dynamicAnchor": {"$dynamicAnchor": "q"},
    "$recursiveRef": {"$recursiveRef": "#"},
    "$vocabulary": {"$vocabulary": {}},
    "$id": {"properties": {"a": {"$id": "http://example.org/a"}}},
    "contentEncoding": {"type": "string", "contentEncoding": "base64"},
    "contentMediaType": {"type": "string", "contentMediaType": "application/json"},
    "contentSchema": {"type": "string", "contentSchema": {}},
    "frobnicate": {"type": "integer", "frobnicate": 3},
    "Type": {"Type": "integer"},
    "minProperties": {"type": "object", "minProperties": 2},
}
MALFORMED = {
    "properties": {"properties": ["a"]},
    "properties.a": {"properties": {"a": 3}},
    "patternProperties": {"patternProperties": "x"},
    "required": {"required": "a"},
    "required ": {"required": [1]},
    "type": {"type": "text"},
    "type ": {"type": []},
    "type  ": {"type": [1]},
    "type   ": {"type": {"a": 1}},
    "enum": {"enum": []},
    "enum ": {"enum": "abc"},
    "anyOf": {"anyOf": []},
    "oneOf": {"oneOf": {}},
    "allOf": {"allOf": "x"},
    "allOf[0]": {"allOf": [None]},
    "minimum": {"minimum": "1"},
    "maximum": {"maximum": True},
    "exclusiveMinimum": {"exclusiveMinimum": [1]},
    "multipleOf": {"multipleOf": 0},
    "minLength": {"minLength": -1},
    "maxLength": {"maxLength": 1.5},
    "maxItems": {"maxItems": 10**9},
    "minItems": {"minItems": True},
    "pattern": {"pattern": 5},
    "format": {"type": "string", "format": "uri-reference"},
    "format ": {"type": "string", "format": 7},
    "format  ": {"type": "integer", "format": "int32"},
    "$ref": {"$ref": "http://example.org/schema.json"},
    "$ref ": {"$ref": "other.json#/a"},
    "$ref  ": {"$ref": "#anchor"},
    "$ref   ": {"$ref": "#/$defs/nope"},
    "$ref    ": {"$ref": 5},
    "$ref     ": {"$ref": "#"},
    "$ref      ": {"allOf": [{"$ref": "#"}]},
    "$ref       ": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    "$ref        ": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    "$ref         ": {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
    "$ref          ": {"$ref": "#/properties/a/title", "properties": {"a": {"title": "x"}}},
    "const": {"const": 10**30},
    "const ": {"const": {"a": [2**53 + 1]}},
    "maximum ": {"maximum": 2**63 - 1},
    "minimum ": {"minimum": float("inf")},
    "enum[0] ": {"enum": [0.1 + 0.2]},
    "const  ": {"const": 1e-30},
    "enum[0]": {"enum": [float("nan")]},
    "enum[1]": {"enum": ["a", "\ud800"]},
    "pattern ": {"pattern": "\udc00"},
    "$defs.a.items": {"$defs": {"a": {"items": 1}}},
}
TOO_MUCH = {
    "levels deep": nested(100),
    "levels deep ": {"enum": [json.loads("[" * 100 + "]" * 100)]},
    "enum values": {"enum": list(range(50_000))},
    "values in enum": {"const": [0] * (MAX_VALUES + 1)},
    "properties": {"properties": {f"p{i}": {} for i in range(MAX_PROPERTIES + 1)}},
    "not required": {"properties": {f"p{i}": {} for i in range(MAX_OPTIONAL + 2)}, "required": ["p0"]},
    "parts": {"anyOf": [{"anyOf": [{}] * 200}] * 200},
    "characters": {"enum": ["x" * (MAX_CHARS + 1)]},
}


def refusal_of(schema: Any) -> RequestError:
    started = time.monotonic()
    with pytest.raises(RequestError) as caught:
        schema_rule(schema, "response_format.json_schema.schema")
    assert time.monotonic() - started < 2
    error = caught.value
    assert (error.status, error.param, error.code) == (400, "response_format.json_schema.schema", "invalid_json_schema")
    assert len(error.message) < 400
    error.message.encode()
    return error


@pytest.mark.parametrize("keyword", NOT_HELD)
def test_keywords_that_can_not_be_held_are_named(keyword: str) -> None:
    message = refusal_of(NOT_HELD[keyword]).message
    assert re.search(rf"the keyword {re.escape(keyword)} is not supported", message), message


@pytest.mark.parametrize("place", MALFORMED)
def test_malformed_keywords_are_named_with_their_place(place: str) -> None:
    assert f" at {place.strip()}: " in refusal_of(MALFORMED[place]).message


@pytest.mark.parametrize("what", TOO_MUCH)
def test_what_is_too_much_is_told(what: str) -> None:
    assert what.strip() in refusal_of(TOO_MUCH[what]).message


@pytest.mark.parametrize("schema", [None, 5, "{}", [], [{}]], ids=repr)
def test_a_schema_is_an_object_or_a_boolean(schema: Any) -> None:
    assert "a schema must be an object or a boolean" in refusal_of(schema).message


def test_the_place_of_a_deep_keyword() -> None:
    schema = {"$defs": {"n": {"anyOf": [{"type": "object", "properties": {"x": {"not": {}}}}]}}, "$ref": "#/$defs/n"}
    assert "at $defs.n.anyOf[0].properties.x: the keyword not" in refusal_of(schema).message


# --- what is kept ---


def test_annotations_bind_nobody() -> None:
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "$id": "http://example.org/x",
        "title": "T",
        "type": "object",
        "properties": {"title": {"type": "string", "title": "a title", "default": "x", "examples": ["y"], "x-order": 1, "nullable": True}},
        "required": ["title"],
        "additionalProperties": False,
        "uniqueItems": False,
        "dependentRequired": {},
        "unevaluatedProperties": True,
        "propertyNames": {},
    }
    assert writes(schema, {"title": "a"})
    assert not writes(schema, {"title": None})


def test_a_clients_options_for_the_library_are_dropped() -> None:
    free = {"whitespace_flexible": True, "lenient": True}
    schema = {"type": "array", "items": {"type": "integer", "x-guidance": free}, "x-guidance": free}
    assert admits(schema_rule(schema, "s"), "[1, 2]")
    assert not admits(schema_rule(schema, "s"), "[1,  2]")


@pytest.mark.parametrize("text", ['{"a":1,"b":[1,2]}', '{"a": 1, "b": [1, 2]}', '{"a": 1,"b":[1,2]}'])
@pytest.mark.parametrize("rule", [schema_rule(True, "s"), schema_rule({}, "s"), object_rule(), schema_rule({"type": "object"}, "s")])
def test_at_most_one_blank_after_a_separator(rule: str, text: str) -> None:
    assert admits(rule, text)
    for spaced in (
        text + " ",
        " " + text,
        text.replace(":", ":  "),
        text.replace(",", ",\n"),
        text.replace("[", "[ "),
        text.replace('"a"', '"a" '),
    ):
        assert not admits(rule, spaced), spaced


def test_keys_come_in_the_schemas_order() -> None:
    schema = {"properties": {"b": {"type": "integer"}, "a": {"type": "integer"}}, "type": "object", "required": ["a", "b"]}
    assert writes(schema, {"b": 1, "a": 2})
    assert not writes(schema, {"a": 2, "b": 1})


def test_a_name_has_one_spelling() -> None:
    """Else a second `a` could come as \\u0061, and a reader takes the last of two."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "x/y": {"type": "integer"}}, "additionalProperties": True}
    assert admits(schema_rule(schema, "s"), '{"a":1,"b":"x"}')
    for text in ('{"a":1,"\\u0061":"x"}', '{"a":1,"a":"x"}', '{"x/y":1,"x\\/y":"x"}'):
        assert not admits(schema_rule(schema, "s"), text)


A = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("schema", "is_closed"),
    [
        (A, True),
        ({**A, "additionalProperties": True}, False),
        ({**A, "additionalProperties": {"type": "string"}}, False),
        ({**A, "required": ["a", "b"]}, False),
        ({**A, "minProperties": 2}, False),
        ({**A, "patternProperties": {"^b$": {"type": "string"}}}, False),
        ({"allOf": [A, {"type": "object"}]}, False),
        ({"$defs": {"A": A}, "$ref": "#/$defs/A"}, True),
        ({"$defs": {"A": A}, "$ref": "#/$defs/A", "type": "object"}, False),
        ({"anyOf": [A, {"type": "null"}]}, True),
        ({"anyOf": [A, {"type": "null"}], "type": "object"}, False),
        ({"type": "object"}, False),
    ],
)
def test_an_object_that_lists_its_properties_gets_no_others(schema: dict[str, Any], is_closed: bool) -> None:
    """Unless the schema says otherwise, or parts of it lie over one another."""
    rule = schema_rule(schema, "s")
    assert admits(rule, '{"a":1}') or not is_closed
    assert admits(rule, '{"a":1,"b":"x"}') is not is_closed


def test_tagged_unions_as_pydantic_writes_them() -> None:
    def kind(tag: str, **properties: Any) -> dict[str, Any]:
        properties = {"kind": {"const": tag, "default": tag, "title": "Kind", "type": "string"}, **properties}
        return {"type": "object", "properties": properties, "required": ["kind", *list(properties)[1:]], "title": tag.title()}

    schema = {
        "$defs": {"Cat": kind("cat", lives={"type": "integer"}), "Dog": kind("dog", name={"type": "string"})},
        "discriminator": {"mapping": {"cat": "#/$defs/Cat", "dog": "#/$defs/Dog"}, "propertyName": "kind"},
        "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
    }
    assert writes(schema, {"kind": "cat", "lives": 9})
    assert writes(schema, {"kind": "dog", "name": "Rex"})
    assert not writes(schema, {"kind": "cat", "name": "Rex"})


@pytest.mark.parametrize(
    ("alternatives", "one"),
    [
        ([{"const": 1}, {"const": 2}], 2),
        ([{"enum": [1, "a"]}, {"enum": [True, None]}], None),
        ([{"type": "integer"}, {"type": "string"}, {"type": "array"}], "x"),
        ([{"enum": [[1, 2]]}, {"enum": [[2, 1]]}], [2, 1]),
    ],
)
def test_alternatives_that_exclude_each_other(alternatives: list[Any], one: Any) -> None:
    assert writes({"oneOf": alternatives}, one)


@pytest.mark.parametrize(
    "alternatives",
    [
        [{"const": 1}, {"const": 1.0}],
        [{"type": "integer"}, {"type": "number"}],
        [{}, {"type": "string"}],
        [{"enum": [1, 2]}, {"enum": [2, 3]}],
        [{"const": {"a": 1, "b": 2}}, {"const": {"b": 2, "a": 1}}],
        [
            {"type": "object", "properties": {"k": {"const": 1}}},
            {"type": "object", "properties": {"k": {"const": 2}}},
        ],
    ],
)
def test_alternatives_that_may_overlap_are_left_to_the_library_which_refuses(alternatives: list[Any]) -> None:
    rule = schema_rule({"oneOf": alternatives}, "s")
    assert '"oneOf"' in rule
    assert LLMatcher(TOKENIZER, grammar(rule), log_level=0).is_error()


def test_recursion_with_an_end_is_fine() -> None:
    schema = {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
                "required": ["next"],
            }
        },
        "$ref": "#/$defs/node",
    }
    assert writes(schema, {"next": {"next": None}})
    assert writes({"type": "array", "items": {"$ref": "#"}}, [[], [[]]])
    assert writes(
        {"type": "object", "properties": {"a/b~c": {"type": "integer"}, "d": {"$ref": "#/properties/a~1b~0c"}}}, {"a/b~c": 1, "d": 2}
    )


@pytest.mark.parametrize("pointer", ["#/properties/a/const", "#/properties", "#/properties/b/enum/0", "#/properties/c/required"])
def test_a_reference_to_what_is_no_schema(pointer: str) -> None:
    """What lies there was not checked as one, whatever it looks like."""
    properties = {"a": {"const": {"allOf": 5}}, "b": {"enum": [{"uniqueItems": True}]}, "c": {"required": ["x"]}, "allOf": {}}
    message = refusal_of({"properties": {**properties, "d": {"$ref": pointer}}}).message
    assert f"{pointer} does not point to a schema" in message


def _chain(order: list[int]) -> dict[str, Any]:
    """Definitions 0, 1, ... of which each refers to the one that comes before it in `order`."""
    before = dict(zip(order[1:], order, strict=False))
    defs = {f"d{one}": {"$ref": f"#/$defs/d{before[one]}"} if one in before else {} for one in range(len(order))}
    return {"$defs": defs, "$ref": f"#/$defs/d{order[-1]}"}


@pytest.mark.parametrize("step", [1, -1])
def test_long_chains_of_references(step: int) -> None:
    """The library follows each by recursion, so what is let pass has an end far from that of its stack."""
    assert f"#/$defs/d{MAX_REFERENCES - 1}" in schema_rule(_chain(list(range(MAX_REFERENCES))[::step]), "s")
    assert "refers to more than" in refusal_of(_chain(list(range(MAX_REFERENCES + 1))[::step])).message


def test_many_rules() -> None:
    for text in ("r{0}: r{1}\n", "r{0} ::= r{1}\n"):
        root = ("start:" if "::=" not in text else "root ::=") + " r0\n"
        chain = [text.format(index, index + 1) for index in range(MAX_RULES)]
        last = f"r{MAX_RULES - 2}" + text[4:].split("r{1}")[0] + '"a"\n'
        assert lark_rule(root + "".join(chain[: MAX_RULES - 2]) + last, "g")
        with pytest.raises(RequestError, match=f"more than {MAX_RULES} rules"):
            lark_rule(root + "".join(chain), "g")


ENTANGLED = {
    "chain": _chain([index * 997 % 1999 for index in range(1999)]),
    "alternatives": {
        "oneOf": [
            {"type": "object", "properties": {"k": {"const": str(index)}}, "required": [*(f"r{i}" for i in range(400)), "k"]}
            for index in range(200)
        ]
    },
    "pairs": {"allOf": [{"oneOf": [{"const": f"{index}"} for index in range(200)]} for _ in range(100)]},
    "values": {
        "$defs": {name: {"enum": [f"{name}{index}" for index in range(2400)]} for name in "ab"},
        "allOf": [{"oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}]} for _ in range(7000)],
    },
}


@pytest.mark.parametrize("name", ENTANGLED)
def test_entangled_schemas_are_looked_through_soon(name: str) -> None:
    """Each took ten seconds and more when all was compared with all."""
    started = time.process_time()
    with contextlib.suppress(RequestError):
        schema_rule(ENTANGLED[name], "s")
    assert time.process_time() - started < 2


def test_a_loose_schema_keeps_what_can_be_held() -> None:
    schema = {
        "type": "object",
        "properties": {
            "a": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
            "b": {"type": "string", "format": "uri-reference"},
            "c": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
            "d": {"type": "integer", "format": "int32", "frobnicate": 1, "not": {"const": 5}},
        },
        "minProperties": 3,
        "additionalProperties": False,
        "maximum": 2**63 - 1,
        "if": {"required": ["a"]},
        "then": {"required": ["b"]},
    }
    assert writes(schema, {"a": [1, 1], "b": "?", "c": 1.5, "d": 5}, is_strict=False)
    assert not writes(schema, {"a": ["x"]}, is_strict=False)
    assert not writes(schema, {"e": 1}, is_strict=False)
    with pytest.raises(RequestError, match="must be a number"):
        schema_rule({"minimum": "x"}, "s", is_strict=False)
    with pytest.raises(RequestError, match="levels deep"):
        schema_rule(nested(MAX_DEPTH + 1), "s", is_strict=False)


# --- regular expressions, choices ---


@pytest.mark.parametrize(
    ("regex", "good", "bad"),
    [
        ("a/b", "a/b", "a"),
        (r"a\/b", "a/b", r"a\/b"),
        (r"a\\/b", "a\\/b", "a/b"),
        ("a\nb", "a\nb", "anb"),
        ("a\\\nb", "a\nb", "a\\nb"),
        ('say "hi"', 'say "hi"', "say hi"),
        ("^a|b$", "a", "ab"),
        ("a|ab", "ab", "abb"),
        ("//.*", "//x", "/x"),
        ("ü{2}", "üü", "ü"),
        (r"[/\]]+", "]/]", "a"),
        ("# no comment", "# no comment", "#"),
        ("(?i)abc", "aBc", "abd"),
    ],
)
def test_regexes_mean_the_same_inside_a_rule(regex: str, good: str, bad: str) -> None:
    assert admits(regex_rule(regex, "r"), good)
    assert not admits(regex_rule(regex, "r"), bad)


@pytest.mark.parametrize(
    "regex", ["", "a\\", "x" * (MAX_REGEX_CHARS + 1), "\ud800", "a\0b", "(?x)a\nb", "(?ix) a # b"], ids=lambda r: r[:10]
)
def test_regexes_that_are_refused_at_once(regex: str) -> None:
    with pytest.raises(RequestError) as caught:
        regex_rule(regex, "structured_outputs.regex")
    assert (caught.value.param, caught.value.code) == ("structured_outputs.regex", "invalid_grammar")


@pytest.mark.parametrize("text", ['a"b', "a\\b", "x\ny\tz", "é✓😀", "<tool>", "a|b", "{", "\x7f\u2028"])
def test_a_choice_is_its_text_and_nothing_else(text: str) -> None:
    rule = choice_rule([text, "other"], "c")
    assert admits(rule, text)
    assert admits(rule, "other")
    assert not admits(rule, "othe")


def test_a_choice_may_begin_with_another() -> None:
    rule = choice_rule(["a", "abc", "ab d"], "c")
    assert [text for text in ("", "a", "ab", "abc", "ab d", "abcd") if admits(rule, text)] == ["a", "abc", "ab d"]


@pytest.mark.parametrize(
    "choices", [[], [""], ["a", ""], ["x"] * (MAX_CHOICES + 1), ["x" * 300_000], ["\udfff"]], ids=lambda c: str(len(c))
)
def test_choices_that_are_refused(choices: list[str]) -> None:
    with pytest.raises(RequestError):
        choice_rule(choices, "structured_outputs.choice")


# --- grammars of clients ---


@pytest.mark.parametrize(
    ("text", "good", "bad"),
    [
        ('start: "a" B+\nB: /[0-9]/\n', "a12", "a"),
        ('?start: item ("," item)*\nitem: "x"i | NUM -> n\n%import common.INT -> NUM\n', "X,12", "x,"),
        ('start: "}" x{2,3} "{"\nx: /\\// // a comment with { and <x>\n# another\n', "}//{", "}/{"),
        ('start: word[","] \nword[lazy]: /[a-z]+/ "."\n'.replace('[","]', ' ["," ]'), "ab.,", "ab"),
        ('start: "a" | "b"\n%ignore / /\n', "a", "c"),
        ('start: "<tool>" "@" "~"\n', "<tool>@~", "<tool>"),
        ('root ::= "a" [0-9]+ b?\nb ::= ("x" | "y")\n', "a1y", "ay"),
        ('root ::= obj\nobj ::= "{" ws "}"\nws ::= " "*\n', "{  }", "{"),
    ],
)
def test_lark_and_gbnf_texts(text: str, good: str, bad: str) -> None:
    rule = lark_rule(text, "g")
    for form in (rule, f'"<" inner ">"\ninner: {rule}'):
        edges = ("<", ">") if form is not rule else ("", "")
        assert admits(form, good.join(edges))
        assert not admits(form, bad.join(edges))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("start: <tool>\n", "special tokens"),
        ("start: <[257]>\n", "special tokens"),
        ("start: <[^257]>\n", "special tokens"),
        ('start: ~"a"\n', "complements"),
        ("start: @other\n", "other grammars"),
        ('start: %json {"type": "string"}\n', "%json"),
        ('start: %lark {\nstart: "a"\n}\n', "%lark"),
        ('start: %regex {"substring_words": "a b"}\n', "%regex"),
        ('%llguidance {"allow_initial_skip": true}\nstart: "a"\n', "%llguidance"),
        ("%declare X\nstart: X\n", "%declare"),
        ('start: "a"\n}\nstart: <tool>\n%lark {\n', "} without a {"),
        ('start: "a" {\n', "{ without a }"),
        ('start[temperature=2]: "a"\n', "temperature"),
        ('start[capture, foo="x"]: "a"\n', "foo"),
        ('{"grammars": [{"lark_grammar": "start: <tool>"}]}', "no rule called start"),
        ("other: x\n", "no rule called start"),
        ("", "no rule called start"),
        ("root ::= ][\n", "GBNF"),
        ("start: 'a'\n", "can't be read"),
        ('start: "a\n', "can't be read"),
        ("x" * (MAX_LARK_CHARS + 1), "at most"),
        ('start: "\ud800"\n', "surrogate"),
    ],
)
def test_lark_texts_that_are_refused(text: str, named: str) -> None:
    started = time.monotonic()
    with pytest.raises(RequestError) as caught:
        lark_rule(text, "structured_outputs.grammar")
    assert time.monotonic() - started < 2
    assert named in caught.value.message
    assert (caught.value.param, caught.value.code) == ("structured_outputs.grammar", "invalid_grammar")


def test_long_hostile_texts_are_read_in_linear_time() -> None:
    for text in ('"' * 95_000, "/" * 95_000, "[" * 95_000, "start[" * 15_000, "a ::= " * 15_000, '"\\' * 45_000, "(" * 95_000):
        started = time.monotonic()
        with contextlib.suppress(RequestError):
            lark_rule(text, "g")
        assert time.monotonic() - started < 2, text[:10]
