"""What a client wants its answer to look like, as text in llguidance's grammar language: checked here, compiled in the engine.

Fails closed: a keyword that the library can't hold is refused by name. No HTTP, no engine. Called by the API and by reply. Every
`*_rule` gives the right-hand side of a rule, so that forms of reply can embed it; `grammar` makes a whole text of one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from service.codec.json_schema import LooseSchema, checked_schema
from service.errors import RequestError

MAX_REGEX_CHARS = 20_000
MAX_LARK_CHARS = 100_000
# The library compiles a rule by recursion into those that it names: so many may stand one behind another.
MAX_RULES = 1_000
_TOO_MANY_RULES = f"the grammar has more than {MAX_RULES} rules"
MAX_CHOICES = 10_000
MAX_CHOICE_CHARS = 200_000

# White space has one form: none, or one blank after a separator, so that no model can spend its tokens on it. Characters have one
# spelling: with \u or \/ a name could come twice and the second value would count.
_JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?", "json_allowed_escapes": 'nrbtf\\"'}
_LOOSE_OPTIONS = {**_JSON_OPTIONS, "coerce_one_of": True}
# What a client's Lark text may say beside names, strings and regular expressions.
_DIRECTIVES = ("%ignore", "%import")
_ATTRIBUTES = ("capture", "lazy", "max_tokens", "stop", "suffix")


def grammar(rule: str) -> str:
    """The text for `Generate.grammar` whose whole answer is one rule."""
    return f"start: {rule}\n"


def schema_rule(schema: Any, param: str, *, is_strict: bool = True) -> str:
    """A JSON value that a schema admits. Without is_strict, what can't be held is left out: for schemas that only guide, as those of
    tools that are not strict.

    Raises: RequestError (invalid_json_schema) naming the place and the keyword.
    """
    if is_strict:
        return _json_rule(checked_schema(schema, param), _JSON_OPTIONS)
    return _json_rule(LooseSchema(param).check(schema), _LOOSE_OPTIONS)


def object_rule() -> str:
    """Any JSON object."""
    return _json_rule({"type": "object"}, _JSON_OPTIONS)


def _json_rule(schema: Any, options: dict[str, Any]) -> str:
    # The options are read from an object at the root only.
    root = schema if isinstance(schema, dict) else {} if schema else {"anyOf": []}
    return "%json " + _json_text({**root, "x-guidance": options})


def _json_text(value: Any) -> str:
    """Without U+007F, which the library's reader does not take."""
    return json.dumps(value, allow_nan=False).replace("\x7f", "\\u007f")


def regex_rule(regex: str, param: str) -> str:
    """A text that a regular expression matches from end to end (Rust's syntax: no look-around, no back references).

    Raises: RequestError (invalid_grammar).
    """
    if not regex:
        raise _refused(param, "the regular expression is empty")
    if len(regex) > MAX_REGEX_CHARS:
        raise _refused(param, f"the regular expression has {len(regex)} characters; at most {MAX_REGEX_CHARS} are allowed")
    _check_text(regex, param)
    if re.search(r"\(\?[a-zA-Z]*x", regex) and ("\n" in regex or "#" in regex):
        raise _refused(param, "the regular expression's flag x is not supported")
    body = re.sub(r"\\.|/|[\n\r\x7f]", _slash_safe, regex, flags=re.DOTALL)
    if len(re.match(r".*?(\\*)$", regex, re.DOTALL)[1]) % 2:  # type: ignore[index]
        raise _refused(param, "the regular expression ends with a lone backslash")
    return f"/{body}/"


def _slash_safe(found: re.Match[str]) -> str:
    text = found[0]
    return {"/": r"\/", "\n": r"\n", "\r": r"\r", "\\\n": r"\n", "\\\r": r"\r", "\x7f": r"\x7f"}.get(text, text)


def choice_rule(choices: Sequence[str], param: str) -> str:
    """One of some texts, exactly. Raises: RequestError (invalid_grammar)."""
    if not choices:
        raise _refused(param, "there must be at least one choice")
    if len(choices) > MAX_CHOICES or sum(map(len, choices)) > MAX_CHOICE_CHARS:
        raise _refused(param, f"at most {MAX_CHOICES} choices with {MAX_CHOICE_CHARS} characters together are allowed")
    if "" in choices:
        raise _refused(param, "a choice must not be empty")
    for choice in choices:
        _check_text(choice, param)
    # One terminal: as alternatives of a rule, each choice would be an item of the parser's own for as long as it is possible.
    return "%lark {\nstart: CHOICE\nCHOICE: " + " | ".join(map(_json_text, dict.fromkeys(choices))) + "\n}"


def lark_rule(text: str, param: str) -> str:
    """What a client's own grammar admits, in Lark's or llama.cpp's (GBNF) notation; its first rule is called start, or root.

    Raises: RequestError (invalid_grammar) for what it can't say here: special tokens, other grammars, options of the library.
    """
    return "%lark {\n" + _checked_lark(text, param) + "\n}"


def _checked_lark(text: str, param: str) -> str:
    if len(text) > MAX_LARK_CHARS:
        raise _refused(param, f"the grammar has {len(text)} characters; at most {MAX_LARK_CHARS} are allowed")
    _check_text(text, param)
    if "::=" in text:
        if text.count("::=") > MAX_RULES:
            raise _refused(param, _TOO_MANY_RULES)
        text = _lark_of_gbnf(text, param)
    _check_lark(text, param)
    return text


def _lark_of_gbnf(text: str, param: str) -> str:
    from llguidance.gbnf_to_lark import any_to_lark  # only few requests need it

    try:
        return str(any_to_lark(text)).replace("%llguidance {}", "", 1)
    except (Exception, RecursionError) as error:
        raise _refused(param, f"the grammar can't be read as GBNF: {error}"[:500]) from None


# What Lark text is made of, as far as telling words from strings, regular expressions and comments needs.
_LARK_PIECE = re.compile(
    r"""
      (?P<blank>\s+)
    | (?P<comment>//[^\n]*|\#[^\n]*)
    | (?P<string>"(?:[^"\\\n]|\\.)*"i?)
    | (?P<regex>/(?!/)(?:[^/\\\n]|\\.)+/[imslux]*)
    | (?P<directive>%[A-Za-z_]*)
    | (?P<name>[!?]?[A-Za-z_][A-Za-z_0-9.\-]*)
    | (?P<number>-?[0-9]+)
    | (?P<mark>->|\.\.|[:|()\[\]{},*+?=&~<>@.!^-])
    """,
    re.VERBOSE,
)


def _check_lark(text: str, param: str) -> None:
    """Raises: RequestError for whatever could reach outside of the text's own rules."""
    at, braces, brackets, num_rules, rules = 0, 0, 0, 0, set()
    before = ""
    while at < len(text):
        piece = _LARK_PIECE.match(text, at)
        if piece is None:
            line = text.count("\n", 0, at) + 1
            raise _refused(param, f"line {line} of the grammar has something that can't be read: {text[at : at + 20]!r}")
        at = piece.end()
        kind, word = piece.lastgroup, piece[0]
        if kind in ("blank", "comment"):
            continue
        if kind == "directive" and word not in _DIRECTIVES:
            raise _refused(param, f"{word} is not supported in a grammar; allowed are {', '.join(_DIRECTIVES)}")
        if word in ("<", "@", "~"):
            what = {"<": "special tokens (<...>)", "@": "references to other grammars (@...)", "~": "complements (~)"}[word]
            raise _refused(param, f"{what} are not supported in a grammar")
        braces += (word == "{") - (word == "}")
        if braces < 0:
            raise _refused(param, "the grammar has a } without a {")
        if word == ":":
            rules.add(before)
            num_rules += 1
            if num_rules > MAX_RULES:
                raise _refused(param, _TOO_MANY_RULES)
        elif word == "[" and kind == "mark":
            brackets = _is_attribute_list(text, at)
        if brackets and kind == "name" and word not in _ATTRIBUTES and not before.endswith("="):
            raise _refused(param, f"the attribute {word} is not supported in a grammar; allowed are {', '.join(_ATTRIBUTES)}")
        if word == "]":
            brackets = 0
        before = word
    if braces:
        raise _refused(param, "the grammar has a { without a }")
    if "start" not in rules and not re.search(r"(?m)^\s*[?!]?start\s*[\[.:]", text):
        raise _refused(param, "the grammar has no rule called start")


def _is_attribute_list(text: str, at: int) -> int:
    """Does the bracket before `at` open a rule's attributes (`name[lazy]: ...`), and not something optional?"""
    end = text.find("]", at)
    return int(end >= 0 and text[end + 1 : end + 40].lstrip().startswith(":"))


def _check_text(text: str, param: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _refused(param, "half a surrogate pair is no character") from None
    if "\0" in text:
        raise _refused(param, "the character U+0000 is not allowed")


def _refused(param: str, message: str) -> RequestError:
    return RequestError(f"{param}: {message}", param=param, code="invalid_grammar")
