"""JSON schemas of clients, made ready for the grammar library: every keyword is one that it holds, or the schema is refused.

Pure values in and out; bounded before anything dear happens. The library itself refuses more (such as two patterns that overlap) when
the engine compiles. Called by `grammar` alone.
Two halves, what each keyword may say and what a whole schema means: long, because both go by one table of keywords.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from itertools import combinations, islice
from typing import Any
from urllib.parse import unquote

from service.errors import RequestError

MAX_DEPTH = 48
MAX_SCHEMAS = 30_000
MAX_PROPERTIES = 5_000
# Each property that may be left out is an item of the parser beside all others, at every step.
MAX_OPTIONAL = 1_500
MAX_VALUES = 5_000
MAX_CHARS = 500_000
# The library compiles a reference by recursion into what it points to: so many may stand one behind another.
MAX_REFERENCES = 200
# A repetition is unrolled into the automaton.
MAX_COUNT = 100_000

# Of one schema's look through itself, so that none takes a second: parts, as often as references lead there, and pairs of alternatives.
MAX_VISITS = 200_000
MAX_PAIRS = 20_000

_TOO_LARGE = "a number must be finite, have at most 15 digits and be neither beyond 1e22 nor finer than 1e-22"
# The formats of strings that the library has a grammar for.
FORMATS = ("date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
TYPES = ("string", "number", "integer", "boolean", "null", "object", "array")
# Words about a value that bind nobody. nullable (OpenAPI) admits more than the schema says; what we write is right either way.
ANNOTATIONS = frozenset(
    {"title", "description", "default", "example", "examples", "deprecated", "readOnly", "writeOnly", "nullable", "discriminator"}
    | {"externalDocs", "xml", "$comment", "$schema"}
)
_ROOT_ANNOTATIONS = frozenset({"$id", "id", "name", "strict"})
_SCHEMA = frozenset({"additionalProperties", "items", "additionalItems"})
_SCHEMA_LISTS = frozenset({"anyOf", "allOf", "oneOf", "prefixItems"})
_SCHEMA_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_COUNTS = frozenset({"minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"})
_NUMBERS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})
_OTHERS = frozenset({"type", "enum", "const", "required", "pattern", "format", "$ref"})
_Values = set[tuple[str, str]]
"""Types and canonical forms of JSON values."""
KEYWORDS = _SCHEMA | _SCHEMA_LISTS | _SCHEMA_MAPS | _COUNTS | _NUMBERS | _OTHERS
# Keywords that can't be held, and the values with which they ask for nothing.
_IDLE: dict[str, tuple[Any, ...]] = {
    "uniqueItems": (False,),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "dependencies": ({},),
    "propertyNames": (True, {}),
    "unevaluatedProperties": (True, {}),
    "unevaluatedItems": (True, {}),
}


def checked_schema(schema: Any, param: str) -> Any:
    """The schema with what the library needs and nothing else. Raises: RequestError (invalid_json_schema) naming place and keyword."""
    return _Checker(param).check(schema)


class _Checker:
    def __init__(self, param: str) -> None:
        self.param = param
        self._num_schemas = self._num_properties = self._num_values = self._num_chars = 0

    def check(self, schema: Any) -> Any:
        checked = self.schema(schema, "", 0)
        if isinstance(checked, dict):
            _close_objects(checked)
            _Logic(checked, self.refuse).finish()
        return checked

    def refuse(self, path: str, message: str) -> RequestError:
        place = f" at {path}" if path else ""
        return RequestError(f"{self.param}{place}: {message}", param=self.param, code="invalid_json_schema")

    def unsupported(self, path: str, keyword: str) -> None:
        """A keyword that can't be held. Raises: RequestError."""
        raise self.refuse(path, f"the keyword {_shown(keyword)} is not supported")

    def inexact(self, path: str) -> dict[str, Any]:
        """A bound that can't be held. Raises: RequestError."""
        raise self.refuse(path, _TOO_LARGE)

    def schema(self, schema: Any, path: str, depth: int) -> Any:
        self._num_schemas += 1
        if depth > MAX_DEPTH:
            raise self.refuse("", f"the schema is nested more than {MAX_DEPTH} levels deep")
        if self._num_schemas > MAX_SCHEMAS:
            raise self.refuse("", f"the schema has more than {MAX_SCHEMAS} parts")
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise self.refuse(path, "a schema must be an object or a boolean")
        checked: dict[str, Any] = {}
        for keyword, value in schema.items():
            if keyword in KEYWORDS:
                checked.update(self.keyword(keyword, value, f"{path}.{keyword}".removeprefix("."), depth))
            elif keyword in ANNOTATIONS or keyword.startswith("x-") or (not depth and keyword in _ROOT_ANNOTATIONS):
                pass
            elif not any(value is idle or (idle == {} and value == {}) for idle in _IDLE.get(keyword, ())):
                self.unsupported(path, keyword)
        num_optional = len(checked.get("properties", {}).keys() - set(checked.get("required", ())))
        if num_optional > MAX_OPTIONAL:
            raise self.refuse(path, f"an object must have at most {MAX_OPTIONAL} properties that are not required, not {num_optional}")
        self.together(checked, path)
        return checked

    def keyword(self, keyword: str, value: Any, path: str, depth: int) -> dict[str, Any]:
        """What stands for it in the checked schema; nothing when it was left out."""
        if keyword in _SCHEMA:
            if keyword == "items" and isinstance(value, list):  # the drafts before 2020-12
                return {keyword: self.schemas(value, path, depth)}
            return {keyword: self.schema(value, path, depth + 1)}
        if keyword in _SCHEMA_LISTS:
            if not value and keyword != "prefixItems":
                raise self.refuse(path, "must have at least one schema")
            return {keyword: self.schemas(value, path, depth)}
        if keyword in _SCHEMA_MAPS:
            return {keyword: self.schema_map(keyword, value, path, depth)}
        if keyword in _COUNTS:
            if not _is_integer(value) or not 0 <= value <= MAX_COUNT:
                raise self.refuse(path, f"must be a whole number between 0 and {MAX_COUNT}")
            return {keyword: int(value)}
        if keyword in _NUMBERS:
            is_old = keyword.startswith("exclusive") and isinstance(value, bool)
            if not is_old and not _is_number(value):
                raise self.refuse(path, "must be a number")
            if not is_old and not _is_exact(value):
                return self.inexact(path)
            if keyword == "multipleOf" and value <= 0:
                raise self.refuse(path, "must be greater than 0")
            return {keyword: value}
        checks: dict[str, Callable[[Any, str], dict[str, Any]]] = {
            "type": self.type,
            "enum": self.enum,
            "const": lambda value, path: {"const": self.value(value, path, 0)},
            "required": self.required,
            "pattern": lambda value, path: {"pattern": self.text(value, path)},
            "format": self.format,
            "$ref": self.reference,
        }
        return checks[keyword](value, path)

    def schemas(self, value: Any, path: str, depth: int) -> list[Any]:
        if not isinstance(value, list):
            raise self.refuse(path, "must be a list of schemas")
        return [self.schema(child, f"{path}[{index}]", depth + 1) for index, child in enumerate(value)]

    def schema_map(self, keyword: str, value: Any, path: str, depth: int) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.refuse(path, "must be an object")
        if keyword in ("properties", "patternProperties"):
            self._num_properties += len(value)
            if self._num_properties > MAX_PROPERTIES:
                raise self.refuse("", f"the schema has more than {MAX_PROPERTIES} properties")
        return {self.text(name, path): self.schema(child, f"{path}.{_shown(name)}", depth + 1) for name, child in value.items()}

    def type(self, value: Any, path: str) -> dict[str, Any]:
        names = value if isinstance(value, list) else [value]
        if not names or any(name not in TYPES for name in names if isinstance(name, str)) or not all(isinstance(n, str) for n in names):
            raise self.refuse(path, f"must be one of {', '.join(TYPES)}, or a list of them")
        return {"type": value}

    def enum(self, value: Any, path: str) -> dict[str, Any]:
        if not isinstance(value, list) or not value:
            raise self.refuse(path, "must be a list with at least one value")
        self._num_values += len(value)
        if self._num_values > MAX_VALUES:
            raise self.refuse("", f"the schema has more than {MAX_VALUES} enum values")
        return {"enum": [self.value(one, f"{path}[{index}]", 0) for index, one in enumerate(value)]}

    def required(self, value: Any, path: str) -> dict[str, Any]:
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise self.refuse(path, "must be a list of property names")
        if len(value) > MAX_PROPERTIES:
            raise self.refuse(path, f"must have at most {MAX_PROPERTIES} names")
        return {"required": list(dict.fromkeys(self.text(name, path) for name in value))}

    def format(self, value: Any, path: str) -> dict[str, Any]:
        if value not in FORMATS:
            raise self.refuse(path, f"the format {_shown(str(value))} is not supported; allowed are {', '.join(FORMATS)}")
        return {"format": value}

    def reference(self, value: Any, path: str) -> dict[str, Any]:
        text = self.text(value, path)
        if text != "#" and not text.startswith("#/"):
            raise self.refuse(path, f"{_shown(text)} is not supported: a $ref must point into this schema, as #/$defs/name does")
        return {"$ref": text}

    def value(self, value: Any, path: str, depth: int) -> Any:
        """A plain JSON value within bounds."""
        if depth > MAX_DEPTH:
            raise self.refuse(path, f"a value is nested more than {MAX_DEPTH} levels deep")
        if isinstance(value, str):
            return self.text(value, path)
        if isinstance(value, list | dict):
            self._num_values += len(value)
            if self._num_values > MAX_VALUES:
                raise self.refuse("", f"the schema has more than {MAX_VALUES} values in enum and const")
            if isinstance(value, list):
                return [self.value(child, path, depth + 1) for child in value]
            return {self.text(name, path): self.value(child, path, depth + 1) for name, child in value.items()}
        if value is not None and not isinstance(value, bool) and not (_is_number(value) and _is_exact(value)):
            raise self.refuse(path, _TOO_LARGE)
        return value

    def text(self, value: Any, path: str) -> str:
        if not isinstance(value, str):
            raise self.refuse(path, "must be a string")
        self._num_chars += len(value)
        if self._num_chars > MAX_CHARS:
            raise self.refuse("", f"the schema has more than {MAX_CHARS} characters in its names, patterns and values")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.refuse(path, "half a surrogate pair is no character") from None
        return value

    def together(self, schema: dict[str, Any], path: str) -> None:
        """What keywords can't do side by side. Mutates: the checked schema."""
        if schema.get("minProperties", 0) > len(schema.get("required", ())) + 1:
            # Names that are not listed may come twice in one object, and then count once.
            raise self.refuse(path, "the keyword minProperties is not supported above the number of required properties and one")


class LooseSchema(_Checker):
    """Leaves out what can't be held instead of refusing it: each keyword only narrows, so without it more is admitted, never less."""

    def unsupported(self, path: str, keyword: str) -> None:
        pass

    def inexact(self, path: str) -> dict[str, Any]:
        return {}

    def format(self, value: Any, path: str) -> dict[str, Any]:
        return {"format": value} if value in FORMATS else {}

    def together(self, schema: dict[str, Any], path: str) -> None:
        schema["minProperties"] = min(schema.pop("minProperties", 0), len(schema.get("required", ())) + 1)
        if not schema["minProperties"]:
            del schema["minProperties"]


_ANY: dict[str, Any] = {}


class _Logic:
    """What a whole schema means: references that lead somewhere, an end to every value, alternatives that exclude each other."""

    def __init__(self, root: dict[str, Any], refuse: Callable[[str, str], RequestError]) -> None:
        self._root = root
        self._refuse = refuse
        self._schemas = list(_subschemas(root))
        self._places = set(map(id, self._schemas))
        self._targets: dict[str, Any] = {}
        self._known_values: dict[int, _Values | None] = {}
        self._known_marks: dict[int, _Marks] = {}
        self._num_visits = self._num_pairs = 0

    def finish(self) -> None:
        """Mutates: the root; `oneOf` whose alternatives are known to exclude each other becomes `anyOf`. Raises: RequestError."""
        for schema in self._schemas:
            if "$ref" in schema:
                self._targets.setdefault(schema["$ref"], self._resolve(schema["$ref"]))
                if len(self._targets) > MAX_REFERENCES:
                    raise self._refuse("$ref", f"the schema refers to more than {MAX_REFERENCES} different places")
        self._check_ends()
        for schema in self._schemas:
            if "oneOf" in schema and self._excludes(schema["oneOf"]):
                schema.setdefault("allOf", []).append({"anyOf": schema.pop("oneOf")})

    def _resolve(self, reference: str) -> Any:
        """Source: RFC 6901, in a URI fragment."""
        at: Any = self._root
        for part in reference.split("/")[1:]:
            key = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(at, list) and key.isdecimal() and len(key) < 7 and int(key) < len(at):
                at = at[int(key)]
            elif isinstance(at, dict) and key in at:
                at = at[key]
            else:
                raise self._refuse("$ref", f"{_shown(reference)} points to nothing in the schema")
        if not isinstance(at, bool) and id(at) not in self._places:
            raise self._refuse("$ref", f"{_shown(reference)} does not point to a schema")
        return at

    def _check_ends(self) -> None:
        """Raises: RequestError when the schema asks for a value that contains itself without end."""
        finite: set[str] = set()
        names, num_before = list(self._targets), -1
        while num_before < len(finite):
            num_before = len(finite)
            names.reverse()  # chains end soon, whichever way they point
            for name in names:
                if name not in finite and self._is_finite(self._targets[name], finite):
                    finite.add(name)
        if not self._is_finite(self._root, finite):
            raise self._refuse("$ref", "the schema asks for a value that contains itself without end")

    def _is_finite(self, schema: Any, finite: set[str]) -> bool:
        if isinstance(schema, bool):
            return True
        self._num_visits += 1
        if self._num_visits > MAX_VISITS:
            raise self._refuse("$ref", "the schema's references are too entangled")

        def ends(child: Any) -> bool:
            return self._is_finite(child, finite)

        if "$ref" in schema and schema["$ref"] not in finite:
            return False
        if not all(map(ends, schema.get("allOf", ()))):
            return False
        if any(key in schema and not any(map(ends, schema[key])) for key in ("anyOf", "oneOf")):
            return False
        types = schema.get("type", TYPES)
        if any(kind in types for kind in ("string", "number", "integer", "boolean", "null")) or "enum" in schema or "const" in schema:
            return True
        return ("object" in types and all(ends(schema.get("properties", {}).get(name, True)) for name in schema.get("required", ()))) or (
            "array" in types and all(map(ends, _least_items(schema)))
        )

    def _excludes(self, alternatives: list[Any]) -> bool:
        """Can no value fit two of them? False when that is not plain to see."""
        self._num_pairs += len(alternatives) * (len(alternatives) - 1) // 2
        if self._num_pairs > MAX_PAIRS:
            return False
        return all(one.is_apart(other) for one, other in combinations(map(self._marks, alternatives), 2))

    def _marks(self, alternative: Any) -> _Marks:
        schema = self._behind(alternative)
        if id(schema) not in self._known_marks:  # many may refer to one
            types, properties = _types(schema), schema.get("properties", {})
            named = schema.get("required", ()) if types == {"object"} else ()
            tags = ((name, self._values(properties.get(name))) for name in named)
            self._known_marks[id(schema)] = _Marks(types, _values(schema), {name: found for name, found in tags if found is not None})
        return self._known_marks[id(schema)]

    def _values(self, schema: Any) -> _Values | None:
        schema = self._behind(schema)
        if id(schema) not in self._known_values:
            self._known_values[id(schema)] = _values(schema)
        return self._known_values[id(schema)]

    def _behind(self, schema: Any) -> dict[str, Any]:
        """What a reference stands for; an empty schema where that is not plain."""
        for _ in range(8):
            if isinstance(schema, dict) and "$ref" in schema:
                schema = self._targets[schema["$ref"]]
        return schema if isinstance(schema, dict) else _ANY


@dataclass(frozen=True, slots=True)
class _Marks:
    """What an alternative can be told by: its types, its values where they are listed, and those of its required properties."""

    types: set[str]
    values: _Values | None
    tags: dict[str, _Values]

    def is_apart(self, other: _Marks) -> bool:
        if not self.types & other.types:
            return True
        if self.values is not None and other.values is not None:
            return self.values.isdisjoint(other.values)
        return any(name in other.tags and values.isdisjoint(other.tags[name]) for name, values in self.tags.items())


def _subschemas(schema: Any) -> Iterator[dict[str, Any]]:
    if not isinstance(schema, dict):
        return
    yield schema
    for keyword, value in schema.items():
        if keyword in _SCHEMA_MAPS:
            children = list(value.values())
        elif keyword in _SCHEMA_LISTS or (keyword in _SCHEMA and isinstance(value, list)):
            children = value
        else:
            children = [value] if keyword in _SCHEMA else []
        for child in children:
            yield from _subschemas(child)


def _close_objects(root: dict[str, Any]) -> None:
    """Lets an object that lists its properties have no others, where the schema does not say: a model that may add properties without
    end adds them until it is cut. Left open where parts of the schema lie over one another, because each would forbid what the
    others list. Mutates: the root."""
    schemas = list(_subschemas(root))
    if any(map(_is_overlaid, schemas)):
        return
    for schema in schemas:
        properties = schema.get("properties", {})
        is_open = properties and not {"additionalProperties", "patternProperties"} & schema.keys()
        if is_open and properties.keys() >= set(schema.get("required", ())) and schema.get("minProperties", 0) <= len(properties):
            schema["additionalProperties"] = False


def _is_overlaid(schema: dict[str, Any]) -> bool:
    """Does more than one schema speak about the same value?"""
    said = schema.keys() - {"$defs", "definitions"}
    return "allOf" in said or (len(said) > 1 and bool(said & {"$ref", "anyOf", "oneOf"}))


def _least_items(schema: dict[str, Any]) -> Iterator[Any]:
    """The schemas of the items that an array has at least."""
    items = schema.get("items", True)
    heads = schema.get("prefixItems", items if isinstance(items, list) else [])
    rest = schema.get("additionalItems", True) if isinstance(items, list) else items
    least = schema.get("minItems", 0)
    yield from islice(heads, least)
    if least > len(heads):
        yield rest


def _types(schema: dict[str, Any]) -> set[str]:
    """Names of types, number without integer."""
    if (values := _values(schema)) is not None:
        return {kind for kind, _ in values}
    given = schema.get("type", TYPES)
    names = {given} if isinstance(given, str) else set(given)
    return {"number" if name == "integer" else name for name in names}


def _values(schema: dict[str, Any]) -> _Values | None:
    """All values that an enum or a const allows; None when there is neither."""
    given = [schema["const"]] if "const" in schema else schema.get("enum")
    return None if given is None else {_canonical(value) for value in given}


def _canonical(value: Any) -> tuple[str, str]:
    if isinstance(value, bool):
        return "boolean", str(value)
    if isinstance(value, int | float):
        return "number", repr(float(value))
    if isinstance(value, dict):
        return "object", repr(sorted((name, _canonical(child)) for name, child in value.items()))
    if isinstance(value, list):
        return "array", repr([_canonical(child) for child in value])
    return ("null", "") if value is None else ("string", value)


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and (isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)))


def _is_exact(value: float) -> bool:
    """Does the library read the number as it is? It does while digits and power of ten are exact 64-bit floats by themselves."""
    if isinstance(value, int):
        return abs(value) <= 2**53
    _, digits, exponent = Decimal(repr(value)).as_tuple()
    return int("".join(map(str, digits))) <= 2**53 and isinstance(exponent, int) and abs(exponent) <= 22


def _is_integer(value: Any) -> bool:
    return not isinstance(value, bool) and (isinstance(value, int) or (isinstance(value, float) and value.is_integer()))


def _shown(word: str) -> str:
    """A client's own word, fit for a message."""
    return "".join(char if char.isprintable() else "?" for char in word[:80])
