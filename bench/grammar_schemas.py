"""JSON schemas of many kinds, with values that fit and values that don't: what `bench/grammars.py` tries on grammar libraries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """good: values that the schema admits, in the order in which a writer would write them. bad: values that it does not."""

    name: str
    schema: Any
    good: tuple[Any, ...]
    bad: tuple[Any, ...] = ()


def closed(required: tuple[str, ...] | None = None, **properties: Any) -> dict[str, Any]:
    names = list(properties) if required is None else list(required)
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def text(**more: Any) -> dict[str, Any]:
    return {"type": "string", **more}


def whole(**more: Any) -> dict[str, Any]:
    return {"type": "integer", **more}


def number(**more: Any) -> dict[str, Any]:
    return {"type": "number", **more}


def items(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": schema, **more}


def fmt(name: str, good: str, *bad: str) -> Case:
    return Case(f"format {name}", text(format=name), (good,), bad)


_NODE = {"$defs": {"node": closed(v=whole(), next={"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]})}, "$ref": "#/$defs/node"}
_PERSON = closed(name=text(), age=whole(minimum=0, maximum=150), email={"anyOf": [text(), {"type": "null"}]})

CASES = (
    Case("string", text(), ("", "a b", "é✓"), (1, None)),
    Case("integer", whole(), (0, -5, 123456), (1.5, "1")),
    Case("number", number(), (0, -1.25, 3e5), ("1",)),
    Case("boolean", {"type": "boolean"}, (True, False), (0,)),
    Case("null", {"type": "null"}, (None,), (0, "")),
    Case("any", {}, (1, "a", [1, {"a": None}]), ()),
    Case("true", True, (1, {"a": 1}), ()),
    Case("false", False, (), (1,)),
    Case("list of types", {"type": ["string", "null"]}, ("a", None), (1,)),
    Case("enum of strings", {"enum": ["red", "green"]}, ("red", "green"), ("blue", "re")),
    Case("enum of anything", {"enum": [1, "a", None, [1, 2], {"k": 1}]}, (1, "a", None, [1, 2], {"k": 1}), (2, [1])),
    Case("enum and type", text(enum=["a", 1]), ("a",), (1,)),
    Case("const", {"const": {"a": [1, None]}}, ({"a": [1, None]},), ({"a": [1]},)),
    Case("const number", {"const": 1.5}, (1.5,), (1,)),
    Case("large enum", {"enum": [f"item-{i}" for i in range(1000)]}, ("item-0", "item-999"), ("item-1000",)),
    Case("minLength", text(minLength=3), ("abc",), ("ab",)),
    Case("maxLength", text(maxLength=3), ("abc", "é✓é"), ("abcd",)),
    Case("pattern", text(pattern="^[a-z]{2}$"), ("ab",), ("abc", "AB")),
    Case("pattern without anchors", text(pattern="b"), ("abc",), ("ac",)),
    Case("pattern with alternatives", text(pattern="^(foo|ba[rz])$"), ("foo", "baz"), ("bab",)),
    Case("pattern and length", text(pattern="^a+$", maxLength=3), ("aa",), ("aaaa",)),
    Case("pattern with a class", text(pattern=r"^\d{3}-\d{4}$"), ("555-1234",), ("5551234",)),
    Case("pattern look-ahead", text(pattern="^(?=a)ab$"), ("ab",), ("b",)),
    Case("pattern back reference", text(pattern=r"^(a|b)\1$"), ("aa",), ("ab",)),
    fmt("date-time", "2024-02-29T12:00:00Z", "yesterday"),
    fmt("date", "2024-02-28", "2024-13-01", "x"),
    fmt("time", "12:00:00Z", "25:00:00Z"),
    fmt("duration", "P1DT2H", "1 day"),
    fmt("email", "a@example.org", "example"),
    fmt("hostname", "a.example.org", "-a"),
    fmt("ipv4", "10.0.0.1", "300.0.0.1"),
    fmt("ipv6", "::1", "1.2"),
    fmt("uuid", "123e4567-e89b-12d3-a456-426614174000", "123"),
    fmt("uri", "https://example.org/a?b=c", "not a uri"),
    fmt("uri-reference", "/a/b", "\\"),
    fmt("json-pointer", "/a/0", "a"),
    Case("format and pattern", text(format="date", pattern="^2"), ("2024-01-01",), ("1999-01-01",)),
    Case("unknown format", text(format="colour"), ("red",), ()),
    Case("minimum", whole(minimum=10), (10, 999), (9, -20)),
    Case("maximum", whole(maximum=-3), (-3, -50), (-2, 4)),
    Case("range", whole(minimum=17, maximum=311), (17, 99, 311), (16, 312)),
    Case("exclusive range", whole(exclusiveMinimum=0, exclusiveMaximum=5), (1, 4), (0, 5)),
    Case("number range", number(minimum=-0.5, maximum=2.25), (-0.5, 1, 2.25), (-0.6, 2.3)),
    Case("number exclusive", number(exclusiveMinimum=0), (0.1, 3), (0, -1)),
    Case("multipleOf", whole(multipleOf=7), (0, 21, -14), (20,)),
    Case("multipleOf and range", whole(multipleOf=10, minimum=5, maximum=35), (10, 30), (40, 0, 15)),
    Case("multipleOf fraction", number(multipleOf=0.5), (1.5, 2), (0.3,)),
    Case("closed object", closed(a=whole(), b=text()), ({"a": 1, "b": "x"},), ({"a": 1}, {"a": 1, "b": "x", "c": 1})),
    Case("optional properties", closed(("a",), a=whole(), b=text(), c=text()), ({"a": 1}, {"a": 1, "c": "x"}), ({"b": "x"}, {"a": "1"})),
    Case("all optional", closed((), a=whole(), b=text()), ({}, {"b": "x"}), ({"b": 1},)),
    Case("open object", {"type": "object", "properties": {"a": whole()}, "required": ["a"]}, ({"a": 1}, {"a": 1, "z": []}), ({"z": 1},)),
    Case("typed rest", {"type": "object", "additionalProperties": whole()}, ({}, {"x": 1, "y": 2}), ({"x": "1"},)),
    Case("properties and typed rest", {"properties": {"a": text()}, "type": "object", "additionalProperties": whole()},
         ({"a": "x", "b": 1},), ({"a": 1}, {"b": "x"})),
    Case("patternProperties", {"type": "object", "patternProperties": {"^n_": whole()}, "additionalProperties": False},
         ({"n_a": 1}, {}), ({"n_a": "x"}, {"m": 1})),
    Case("patternProperties open", {"type": "object", "patternProperties": {"^n_": whole()}}, ({"n_a": 1, "m": "x"},), ({"n_a": "x"},)),
    Case("propertyNames", {"type": "object", "propertyNames": {"pattern": "^x"}}, ({"x1": 1},), ({"y": 1},)),
    Case("minProperties", {"type": "object", "minProperties": 1}, ({"a": 1},), ({},)),
    Case("maxProperties", {"type": "object", "maxProperties": 1}, ({}, {"a": 1}), ({"a": 1, "b": 2},)),
    Case("required without property", {"type": "object", "required": ["z"]}, ({"z": 1},), ({}, {"a": 1})),
    Case("nested objects", closed(a=closed(b=closed(c=whole()))), ({"a": {"b": {"c": 1}}},), ({"a": {"b": {}}},)),
    Case("names with quotes", closed(None, **{'q"t': whole(), "a/b": whole()}), ({'q"t': 1, "a/b": 2},), ({"a/b": 2},)),
    Case("array", items(whole()), ([], [1, 2]), (["a"],)),
    Case("minItems", items(whole(), minItems=2), ([1, 2], [1, 2, 3]), ([1],)),
    Case("maxItems", items(whole(), maxItems=2), ([], [1, 2]), ([1, 2, 3],)),
    Case("exact items", items(text(), minItems=2, maxItems=2), (["a", "b"],), (["a"], ["a", "b", "c"])),
    Case("tuple", {"type": "array", "prefixItems": [whole(), text()], "items": False, "minItems": 2}, ([1, "a"],), (["a", 1], [1, "a", 2])),
    Case("tuple with rest", {"type": "array", "prefixItems": [text()], "items": whole()}, (["a", 1, 2],), (["a", "b"],)),
    Case("tuple of old drafts", {"type": "array", "items": [whole(), text()], "additionalItems": False},
         ([1, "a"],), ([1, 2], [1, "a", 3])),
    Case("uniqueItems", items(whole(), uniqueItems=True), ([1, 2],), ([1, 1],)),
    Case("contains", {"type": "array", "contains": whole()}, ([1], ["a", 1]), (["a"],)),
    Case("array of arrays", items(items(number(), minItems=2, maxItems=2)), ([[1, 2], [3, 4]],), ([[1]],)),
    Case("anyOf", {"anyOf": [whole(), text()]}, (1, "a"), (None, 1.5)),
    Case("anyOf objects", {"anyOf": [closed(a=whole()), closed(b=text())]}, ({"a": 1}, {"b": "x"}), ({"a": "x"}, {})),
    Case("anyOf beside properties", {"type": "object", "properties": {"a": whole()}, "required": ["a"],
                                     "anyOf": [{"required": ["b"]}, {"required": ["c"]}]}, ({"a": 1, "b": 1},), ({"a": 1},)),
    Case("oneOf types", {"oneOf": [whole(), text()]}, (1, "a"), (None,)),
    Case("oneOf tagged", {"oneOf": [closed(k={"const": "a"}, x=whole()), closed(k={"const": "b"}, y=text())]},
         ({"k": "a", "x": 1}, {"k": "b", "y": "z"}), ({"k": "a", "y": "z"},)),
    Case("oneOf tagged by reference", {"$defs": {"A": closed(k={"const": "a"}), "B": closed(k={"const": "b"})},
                                       "oneOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}]}, ({"k": "a"}, {"k": "b"}), ({"k": "c"},)),
    Case("oneOf overlapping", {"oneOf": [whole(minimum=0), whole(maximum=5)]}, (7, -1), (3,)),
    Case("allOf numbers", {"allOf": [whole(minimum=3), {"maximum": 5}]}, (3, 5), (2, 6)),
    Case("allOf objects", {"allOf": [{"type": "object", "properties": {"a": whole()}, "required": ["a"]},
                                     {"properties": {"b": whole()}, "required": ["b"]}]}, ({"a": 1, "b": 2},), ({"a": 1}, {"b": 2})),
    Case("allOf one reference", {"$defs": {"p": text(maxLength=2)}, "allOf": [{"$ref": "#/$defs/p"}], "description": "x"},
         ("ab",), ("abc",)),
    Case("not", {"not": whole()}, ("a",), (1,)),
    Case("if then", {"type": "object", "properties": {"a": whole()}, "if": {"required": ["a"]}, "then": {"required": ["b"]}},
         ({"a": 1, "b": 2},), ({"a": 1},)),
    Case("dependentRequired", {"type": "object", "dependentRequired": {"a": ["b"]}}, ({"a": 1, "b": 2},), ({"a": 1},)),
    Case("unevaluatedProperties", {"type": "object", "properties": {"a": whole()}, "unevaluatedProperties": False},
         ({"a": 1},), ({"b": 1},)),
    Case("reference", {"$defs": {"p": whole()}, "type": "object", "properties": {"a": {"$ref": "#/$defs/p"}}, "required": ["a"]},
         ({"a": 1},), ({"a": "x"},)),
    Case("reference beside keywords", {"$defs": {"p": whole()}, "$ref": "#/$defs/p", "minimum": 5}, (7,), (3, "a")),
    Case("old definitions", {"definitions": {"p": whole()}, "$ref": "#/definitions/p"}, (1,), ("a",)),
    Case("recursive list", _NODE, ({"v": 1, "next": None}, {"v": 1, "next": {"v": 2, "next": None}}), ({"v": 1}, {"v": 1, "next": 3})),
    Case("recursive root", {"type": "object", "properties": {"child": {"$ref": "#"}}, "additionalProperties": False},
         ({}, {"child": {"child": {}}}), ({"child": 1},)),
    Case("tree", {"$defs": {"t": closed(n=text(), c=items({"$ref": "#/$defs/t"}))}, "$ref": "#/$defs/t"},
         ({"n": "a", "c": [{"n": "b", "c": []}]},), ({"n": "a"}, {"n": "a", "c": [1]})),
    Case("endless recursion", closed(a={"$ref": "#"}), (), ({}, {"a": {}})),
    Case("person", _PERSON, ({"name": "Ann", "age": 30, "email": None},), ({"name": "Ann", "age": 300, "email": None},)),
    Case("list of persons", closed(people=items(_PERSON, minItems=1)),
         ({"people": [{"name": "A", "age": 1, "email": "x"}]},), ({"people": []},)),
    Case("calendar event", closed(name=text(), date=text(format="date"), participants=items(text())),
         ({"name": "x", "date": "2024-05-01", "participants": ["a"]},), ({"name": "x", "date": "2024-05-01", "participants": [1]},)),
    Case("steps", closed(steps=items(closed(explanation=text(), output=text())), final_answer=text()),
         ({"steps": [{"explanation": "a", "output": "b"}], "final_answer": "c"},), ({"steps": [{}], "final_answer": "c"},)),
    Case("weather tool", closed(location=text(), unit={"type": "string", "enum": ["c", "f"]}, days=whole(minimum=1, maximum=14)),
         ({"location": "Oslo", "unit": "c", "days": 3},), ({"location": "Oslo", "unit": "k", "days": 3},)),
    Case("sixty properties", closed(None, **{f"p{i}": whole() for i in range(60)}), ({f"p{i}": i for i in range(60)},), ({"p0": 0},)),
    Case("sixty optional", closed((), **{f"p{i}": text() for i in range(60)}), ({}, {"p3": "a", "p59": "b"}), ({"p3": 1},)),
    Case("deep", (lambda f: f(f, 12))(lambda f, n: closed(a=f(f, n - 1)) if n else whole()),
         ((lambda f: f(f, 12))(lambda f, n: {"a": f(f, n - 1)} if n else 1),), ({"a": 1},)),
    Case("min over max", whole(minimum=5, maximum=3), (), (4,)),
    Case("two types at once", {"allOf": [text(), whole()]}, (), (1, "a")),
    Case("unknown keyword", whole(frobnicate=1), (1,), ()),
    Case("contentEncoding", text(contentEncoding="base64"), ("YQ==",), ()),
    Case("remote reference", {"$ref": "https://example.org/schema.json"}, (), (1,)),
)  # fmt: skip
