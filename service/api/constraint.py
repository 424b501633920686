"""What a request holds its answer to, as a rule of `codec.grammar`: the one place where the API's many names for it come together.

No HTTP, nothing compiled. Called by `dialogue` and `completions` before a request goes to the engine.
"""

from __future__ import annotations

from typing import Any

import msgspec

from service.api.schema_format import FormatFields
from service.codec.grammar import choice_rule, lark_rule, object_rule, regex_rule, schema_rule
from service.errors import RequestError


def rule_of(wanted: FormatFields) -> str:
    """The rule that the answer follows, "" for any text. Raises: RequestError naming the field and what can't be held in it."""
    found = wanted.constraint
    if found is None:
        return ""
    kind, value, param = found
    match kind:
        case "json":
            return object_rule() if value is None else schema_rule(_schema(value, param), param)
        case "regex":
            return regex_rule(value, param)
        case "choice":
            return choice_rule(value, param)
        case "grammar":
            return lark_rule(value, param)


def _schema(value: Any, param: str) -> Any:
    """A schema, which may come as the text of one."""
    if not isinstance(value, str):
        return value
    try:
        return msgspec.json.decode(value)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        raise RequestError(f"{param}: the text is no JSON", param=param, code="invalid_json_schema") from None
