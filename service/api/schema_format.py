"""The forms of output that both text routes can be held to: response_format, structured_outputs, and the older names of the same.

Bounds and combinations only; what is inside a schema or a grammar is checked by `codec.grammar`, through `constraint`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StringConstraints

from service.api.schema import SamplingFields, Strict, Text, Word, never
from service.errors import RequestError

MAX_OPTIONS = 10_000

SchemaName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
Options = Annotated[list[Text], Field(min_length=1, max_length=MAX_OPTIONS, fail_fast=True)]


class JsonSchemaFormat(Strict):
    name: SchemaName = "answer"
    description: Text | None = None
    schema_: Any = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """json_schema: as OpenAI has it. schema: beside type json_object or json_schema, as llama.cpp's clients send it."""

    unbuilt: ClassVar[Mapping[str, Callable[[Any], bool]]] = {"structures": never, "triggers": never, "grammar": never}

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None
    schema_: Any = Field(None, alias="schema")

    @property
    def given_schema(self) -> tuple[Any, str]:
        """The schema, None for any object, and the name of its field."""
        if self.type == "json_schema" and self.json_schema is not None:
            return self.json_schema.schema_, "response_format.json_schema.schema"
        return self.schema_, "response_format.schema"

    def check(self) -> None:
        if self.type == "json_schema" and self.json_schema is None and self.schema_ is None:
            raise RequestError(
                "response_format.json_schema is required for type json_schema",
                param="response_format.json_schema",
                code="missing_required_parameter",
            )


class StructuredOutputs(Strict):
    """One kind of constraint. json: a schema, or the text of one."""

    unbuilt: ClassVar[Mapping[str, Callable[[Any], bool]]] = {"structural_tag": never, "whitespace_pattern": never}

    json_: Any = Field(None, alias="json")
    json_object: bool | None = None
    regex: Text | None = None
    choice: Options | None = None
    grammar: Text | None = None


# Each constraint is a kind, what the client gave, and its field.
Kind = Literal["json", "regex", "choice", "grammar"]
Constraint = tuple[Kind, Any, str]
_OLDER_NAMES: dict[str, Kind] = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "json_schema": "json",
    "regex": "regex",
    "ebnf": "grammar",
    "grammar": "grammar",
}


class FormatFields(SamplingFields):
    """The fields, and `constraint`: the one thing that they ask for together."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Any = None
    guided_regex: Text | None = None
    guided_choice: Options | None = None
    guided_grammar: Text | None = None
    guided_decoding_backend: Word | None = None  # ours does what any of them does
    json_schema: Any = None
    regex: Text | None = None
    ebnf: Text | None = None
    grammar: Text | None = None

    def check(self) -> None:
        super().check()
        for name in ("response_format", "structured_outputs"):
            if (part := getattr(self, name)) is not None:
                _check_part(part, name)
        self.constraint  # noqa: B018  # raises when there are two

    @property
    def constraint(self) -> Constraint | None:
        """Raises: RequestError when there is more than one."""
        found = [*self._of_response_format(), *self._of_structured_outputs(), *self._of_older_names()]
        if len(found) > 1:
            raise RequestError(
                f"{found[1][2]} can't be combined with {found[0][2]}: only one form of output can be asked for", param=found[1][2]
            )
        return found[0] if found else None

    def _of_response_format(self) -> list[Constraint]:
        wanted = self.response_format
        return [] if wanted is None or wanted.type == "text" else [("json", *wanted.given_schema)]

    def _of_structured_outputs(self) -> list[Constraint]:
        wanted = self.structured_outputs
        if wanted is None:
            return []
        found: list[Constraint] = [("json", None, "structured_outputs.json_object")] if wanted.json_object else []
        if wanted.json_ is not None:
            found.append(("json", wanted.json_, "structured_outputs.json"))
        for kind in ("regex", "choice", "grammar"):
            if (value := getattr(wanted, kind)) is not None:
                found.append((kind, value, f"structured_outputs.{kind}"))
        return found

    def _of_older_names(self) -> list[Constraint]:
        return [(kind, value, name) for name, kind in _OLDER_NAMES.items() if (value := getattr(self, name)) is not None]


def _check_part(part: ResponseFormat | StructuredOutputs, name: str) -> None:
    for key in part.model_extra or ():
        if key in part.unbuilt:
            raise RequestError(f"{name}.{key} is not supported by this server", param=f"{name}.{key}", code="unsupported_parameter")
    part.check()
