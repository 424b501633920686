"""Grammars in the real engine loop: what a model of random logits writes validates, and what goes wrong is one request's own affair."""

from __future__ import annotations

import gc
import json
import re
import threading
import time
import weakref
from collections.abc import Iterator
from datetime import date
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.codec.grammar import MAX_CHOICES, MAX_RULES, choice_rule, grammar, lark_rule, object_rule, regex_rule, schema_rule
from service.codec.json_schema import MAX_DEPTH, MAX_REFERENCES
from service.engine import constraint
from service.engine.constraint import Constraints, compile_grammar, make_tokenizer
from service.engine.engine import Engine
from service.engine.messages import Abort, Generate, Shutdown
from service.errors import RequestError
from tests.engine.grammars import EOS, OTHER_EOS, PIECES, VOCABULARY, WIDTH, RandomRunner, WakingMailbox, random_lane, serve, text_of
from tests.fakes import generate

TOKENIZER = make_tokenizer(VOCABULARY, WIDTH)
STOPS = (EOS, OTHER_EOS)


def wanted(request_id: str, text: str, *, max_tokens: int = 150, **others: Any) -> Generate:
    others.setdefault("stop_ids", STOPS)
    return generate(request_id, max_tokens=max_tokens, grammar=text, grammar_param="response_format", **others)


# --- schemas ---

# Those that the checker knows as their standards have them: its times have no fractions.
FORMATS = jsonschema.FormatChecker(["email", "ipv4", "ipv6", "uuid"])


@FORMATS.checks("date", ValueError)
def is_date(value: object) -> bool:
    """A regular expression can't tell leap years: 29 February is in all of them (docs/grammars.md)."""
    return not isinstance(value, str) or bool(date.fromisoformat(re.sub("-02-29$", "-02-28", value)))


NAMES = ("a", "b", "name", "x y", 'q"t', "a/b", "é")
_text = st.text('ab1é\n"\\/', max_size=4)
_scalars = st.one_of(
    st.fixed_dictionaries({"type": st.just("string")}, optional={"minLength": st.integers(0, 3), "maxLength": st.integers(3, 12)}),
    st.builds(
        lambda pattern: {"type": "string", "pattern": pattern}, st.sampled_from(["^[a-c]{1,5}$", "b", "^x", "[0-9]+$", "^(a|bb)*$", "a.b"])
    ),
    st.builds(
        lambda name: {"type": "string", "format": name}, st.sampled_from(["date", "ipv4", "ipv6", "uuid", "date-time", "email", "time"])
    ),
    st.builds(
        lambda kind, least, width, is_open: {"type": kind, "exclusiveMinimum" if is_open else "minimum": least, "maximum": least + width},
        st.sampled_from(["integer", "number"]),
        st.integers(-1000, 1000),
        st.integers(2, 500),
        st.booleans(),
    ),
    st.builds(lambda step: {"type": "integer", "multipleOf": step}, st.integers(1, 17)),
    st.sampled_from([{"type": "integer"}, {"type": "number"}, {"type": "boolean"}, {"type": "null"}, {"type": ["string", "null"]}]),
    st.lists(
        st.one_of(_text, st.integers(-(10**6), 10**6), st.floats(-1e3, 1e3).map(lambda x: round(x, 9)), st.booleans(), st.none()),
        min_size=1,
        max_size=4,
    ).map(lambda values: {"enum": values}),
    st.one_of(_text, st.integers(-(2**53), 2**53), st.lists(st.integers(0, 3), max_size=2), st.just({"k": [None, 1.5]})).map(
        lambda value: {"const": value}
    ),
    st.sampled_from([{}, True, {"$ref": "#/$defs/node"}, {"$ref": "#/$defs/word"}]),
)


def _objects(children: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    @st.composite
    def build(draw: st.DrawFn) -> dict[str, Any]:
        properties = draw(st.dictionaries(st.sampled_from(NAMES), children, max_size=4))
        schema: dict[str, Any] = {"type": "object", "title": "An object", "properties": properties}
        schema["required"] = draw(st.lists(st.sampled_from(sorted(properties)), unique=True)) if properties else []
        rest = draw(st.sampled_from(["closed", "closed", "open", "typed", "pattern", "counted"]))
        if rest in ("closed", "pattern", "counted"):
            schema["additionalProperties"] = False
        if rest == "typed":
            schema["additionalProperties"] = draw(children)
        if rest == "pattern":
            schema["patternProperties"] = {"^n_": draw(children)}
        if rest == "counted":
            schema = {"type": "object", "additionalProperties": draw(children), "maxProperties": draw(st.integers(0, 3))}
            schema["minProperties"] = draw(st.integers(0, min(1, schema["maxProperties"])))
        return schema

    return build()


def _composed(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    arrays = st.fixed_dictionaries(
        {"type": st.just("array"), "items": children}, optional={"minItems": st.integers(0, 2), "maxItems": st.integers(2, 4)}
    )
    tuples = st.lists(children, min_size=1, max_size=3).map(lambda heads: {"type": "array", "prefixItems": heads, "items": False})
    tagged = st.tuples(children, children).map(
        lambda pair: {
            "oneOf": [
                {"type": "object", "properties": {"kind": {"const": tag}, "v": child}, "required": ["kind"], "additionalProperties": False}
                for tag, child in zip("ab", pair, strict=True)
            ]
        }
    )
    return st.one_of(
        _objects(children),
        _objects(children),
        arrays,
        tuples,
        tagged,
        st.lists(children, min_size=1, max_size=3).map(lambda many: {"anyOf": many}),
        children.map(lambda child: {"allOf": [child], "description": "one"}),
    )


_DEFS = {
    "node": {
        "type": "object",
        "properties": {"n": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}, "v": {"type": "integer"}},
        "required": ["v"],
        "additionalProperties": False,
    },
    "word": {"type": "string", "pattern": "^[a-z]+$", "maxLength": 8},
}
SCHEMAS = st.recursive(_scalars, _composed, max_leaves=8).map(
    lambda schema: {"$defs": _DEFS, **schema} if isinstance(schema, dict) else schema
)


def spaces_outside_strings(text: str) -> int:
    """The longest run of white space that is no part of a string."""
    bare = re.sub(r'"(?:[^"\\]|\\.)*"?', '"', text)
    return max((len(run) for run in re.findall(r"\s+", bare)), default=0)


def check_answer(schema: Any, data: bytes, finish: str | None) -> None:
    text = data.decode(errors="ignore") if finish == "length" else data.decode()
    assert spaces_outside_strings(text) <= 1, text
    if finish == "stop":
        jsonschema.Draft202012Validator(schema, format_checker=FORMATS).validate(json.loads(text))
    else:
        assert finish == "length"


_seen = {"stop": 0, "length": 0, "refused": 0, "schemas": 0}


def answers_validate(schemas: list[Any], seed: int) -> None:
    requests = [
        wanted(str(index), grammar(schema_rule(schema, "schema")), n=2, seed=seed + 10 * index) for index, schema in enumerate(schemas)
    ]
    tokens, ends = serve(requests)
    for (request_id, choice), end in ends.items():
        if end.finish == "error":
            assert (end.error_status, end.error_param, end.error_code) == (400, "response_format", "invalid_json_schema"), end.error
            _seen["refused"] += 1
            continue
        check_answer(schemas[int(request_id)], text_of(tokens[request_id, choice]), end.finish)
        _seen[end.finish] += 1
    _seen["schemas"] += len(schemas)


def run_answers(max_examples: int, *, derandomize: bool) -> None:
    _seen.update(dict.fromkeys(_seen, 0))
    limits = settings(
        max_examples=max_examples, derandomize=derandomize, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    limits(given(st.lists(SCHEMAS, min_size=6, max_size=6), st.integers(0, 2**40))(answers_validate))()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_what_random_logits_write_validates_at_length() -> None:
    run_answers(1500, derandomize=False)
    assert _seen["schemas"] >= 9000


def test_what_random_logits_write_under_a_schema_validates() -> None:
    """480 schemas, two choices each, all through the real loop. Few may be refused, and most answers must come to their end."""
    run_answers(80, derandomize=True)
    assert _seen["schemas"] >= 470
    assert _seen["refused"] < 0.1 * 2 * _seen["schemas"], _seen
    assert _seen["stop"] > 0.5 * 2 * _seen["schemas"], _seen


# --- refusals ---

UNFIT = {
    "min over max": {"type": "integer", "minimum": 5, "maximum": 3},
    "lengths": {"type": "string", "minLength": 5, "maxLength": 3},
    "no multiple": {"type": "integer", "multipleOf": 5, "minimum": 6, "maximum": 9},
    "two types": {"allOf": [{"type": "string"}, {"type": "integer"}]},
    "enum type": {"type": "string", "enum": [1]},
    "const type": {"const": 1, "type": "string"},
    "false": False,
    "required nowhere": {"type": "object", "properties": {}, "required": ["z"], "additionalProperties": False},
    "too few items": {"type": "array", "prefixItems": [{}], "items": False, "minItems": 2},
    "pattern and length": {"type": "string", "pattern": "^a$", "minLength": 2},
    "format and length": {"type": "string", "format": "date", "minLength": 30},
    "overlapping oneOf": {"oneOf": [{"type": "integer", "minimum": 0}, {"type": "integer", "maximum": 5}]},
    "overlapping patterns": {"type": "object", "patternProperties": {"^a": {"type": "integer"}, "b$": {"type": "string"}}},
    "look-ahead": {"type": "string", "pattern": "^(?=b)b$"},
    "bad pattern": {"type": "string", "pattern": "("},
    "self": {
        "allOf": [
            {"anyOf": [{"type": "object", "properties": {f"p{i}{j}": {}}, "required": [f"p{i}{j}"]} for i in range(4)]} for j in range(9)
        ]
    },
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_schema_that_nothing_fits_is_the_clients_fault(name: str) -> None:
    started = time.monotonic()
    with pytest.raises(RequestError) as caught:
        compile_grammar(TOKENIZER, grammar(schema_rule(UNFIT[name], "schema")))
    assert time.monotonic() - started < 2
    assert caught.value.code == "invalid_json_schema"
    assert "x-guidance" not in caught.value.message
    assert "<state>" not in caught.value.message
    assert len(caught.value.message) < 600


DEAR = [
    "(a+)+$", "(a{1,99}){1,99}", "(" * 100 + "a" + ")" * 100, "(a|a)*b", "a{100000}", "(a{1000}){1000}", "((a{0,99}){0,99}){0,99}",
    "(.*a){20}", ".*a.{20}", "[ab]*a[ab]{20}", ".{0,50000}", "(?:(?:.*x){50}.*y){50}", r"((\w+\s*){0,100}[a-z]*){0,100}",
    "|".join(f"{i}.*{i}" for i in range(500)), "(" * 5000 + "a" + ")" * 5000, r"(\pL|\pN|.)*" * 200,
    "(((((((a{9}){9}){9}){9}){9}){9}){9}){9}",
]  # fmt: skip


@pytest.mark.parametrize("regex", DEAR, ids=lambda regex: regex[:20])
def test_dear_regexes_end_soon_one_way_or_the_other(regex: str) -> None:
    started = time.monotonic()
    _, ends = serve([wanted("r", grammar(regex_rule(regex, "regex")), max_tokens=60)])
    end = ends["r", 0]
    assert time.monotonic() - started < 2
    assert end.finish in ("stop", "length") or end.error_status == 400, end.error


@pytest.mark.parametrize("regex", ["(a", "a**{", r"\1", "(?=a)b", r"\b", "[z-a]"])
def test_a_bad_regex_is_refused(regex: str) -> None:
    _, ends = serve([wanted("r", grammar(regex_rule(regex, "regex")))])
    assert (ends["r", 0].error_status, ends["r", 0].error_param, ends["r", 0].error_code) == (400, "response_format", "invalid_grammar")


# --- other forms ---


def test_a_regex_holds_from_end_to_end() -> None:
    tokens, ends = serve([wanted("r", grammar(regex_rule(r"[a-c]{2}/\d+\n?", "regex")), n=8, max_tokens=400)])
    assert {end.finish for end in ends.values()} == {"stop"}
    for ids in tokens.values():
        assert re.fullmatch(rb"[a-c]{2}/[0-9]+\n?", text_of(ids))


def test_choices_are_exact() -> None:
    choices = ["yes", "no", "name", 'say "hi"']
    tokens, ends = serve([wanted("c", grammar(choice_rule(choices, "choice")), n=16)])
    assert {end.finish for end in ends.values()} == {"stop"}
    found = {text_of(ids).decode() for ids in tokens.values()}
    assert found <= set(choices)
    assert len(found) > 1


def test_as_many_choices_as_are_allowed() -> None:
    choices = [f"name {index}" for index in range(MAX_CHOICES)]
    tokens, ends = serve([wanted("c", grammar(choice_rule(choices, "choice")), n=4)])
    assert {(end.finish, end.error) for end in ends.values()} == {("stop", None)}
    assert {text_of(ids).decode() for ids in tokens.values()} <= set(choices)


def test_many_properties_that_may_be_left_out() -> None:
    properties = {f"p{index}": {"type": "integer"} for index in range(1500)}
    _, ends = serve([wanted("o", grammar(schema_rule({"type": "object", "properties": properties}, "schema")), max_tokens=12)])
    assert [(end.finish, end.error) for end in ends.values()] == [("length", None)]


@pytest.mark.parametrize(
    "rules",
    [
        "start: " + " | ".join(f'"a" /{index}/' for index in range(9_000)),
        "start: s s s s\ns: " + " | ".join(f'"a" /b{index}/' for index in range(4_000)),
    ],
    ids=["items", "work"],
)
def test_too_many_ways_to_go_on_are_the_grammars_fault(rules: str) -> None:
    """Not the server's: a client that is told of a server error tries again."""
    _, ends = serve([wanted("w", f"{rules}\n", max_tokens=40), generate("b", max_tokens=5)])
    assert (ends["w", 0].error, ends["w", 0].error_status) == (
        "the grammar is too complex to be followed at this point of the answer",
        400,
    )
    assert ends["b", 0].finish == "length"


def test_an_object_is_one() -> None:
    tokens, ends = serve([wanted("o", grammar(object_rule()), n=8, max_tokens=500)])
    done = [json.loads(text_of(tokens[key])) for key, end in ends.items() if end.finish == "stop"]
    assert done
    assert all(isinstance(one, dict) for one in done)


@pytest.mark.parametrize(
    "text", ['start: "x" item+ "y"\nitem: /[0-9]/ "," | "name"\n', 'root ::= "x" item+ "y"\nitem ::= [0-9] "," | "name"\n']
)
def test_lark_and_gbnf(text: str) -> None:
    tokens, ends = serve([wanted("g", grammar(lark_rule(text, "grammar")), n=4, max_tokens=300)])
    assert {end.finish for end in ends.values()} == {"stop"}
    for ids in tokens.values():
        assert re.fullmatch(rb"x([0-9],|name)+y", text_of(ids))


def test_special_tokens_come_only_where_a_grammar_of_ours_names_them() -> None:
    tokens, _ = serve([wanted("g", 'start: "a" <tool_call> "b"\n'), wanted("r", grammar(regex_rule("(?s:.)*", "regex")), max_tokens=300)])
    assert [PIECES[token] for token in tokens["g", 0]] == [b"a", b"<tool_call>", b"b"]
    assert not {0, 1, 2} & set(tokens["r", 0])


# --- ends ---


def test_a_complete_text_ends_with_its_last_token_in_it() -> None:
    tokens, ends = serve([wanted("a", 'start: "true"\n', stop_ids=())])
    assert text_of(tokens["a", 0]) == b"true"
    assert (ends["a", 0].finish, ends["a", 0].stop_id) == ("stop", None)
    assert ends["a", 0].usage.completion_tokens == len(tokens["a", 0])


def test_min_tokens_beyond_a_grammar_that_may_go_no_further() -> None:
    """All that may follow is the end, and the end is banned: the text is complete, so that is a stop."""
    _, ends = serve([wanted("a", 'start: "a" | "a" NEVER\nNEVER: /\\x00/\n', min_tokens=50)])
    assert ends["a", 0].finish == "stop"


def test_without_an_end_id_a_complete_text_still_ends() -> None:
    tokens, ends = serve([wanted("a", grammar(regex_rule("a*", "regex")), stop_ids=(), n=4, max_tokens=400)])
    for key, end in ends.items():
        assert end.finish == "stop"
        assert set(text_of(tokens[key])) <= set(b"a")


def test_a_grammar_that_no_token_spells_is_an_error_of_its_own() -> None:
    tokens, ends = serve([wanted("a", 'start: "a" /[\\u4e00-\\u4e02]/\n'), generate("b", max_tokens=5)])
    assert (ends["a", 0].finish, ends["a", 0].error) == ("error", "no token of the model fits the grammar here")
    assert ends["a", 0].error_status == 400
    assert ends["b", 0].finish == "length"
    assert text_of(tokens["a", 0]) == b"a"


def test_a_grammar_that_outgrows_its_limits_ends_alone() -> None:
    regex = r"((\w+\s*){0,100}[a-z]*){0,100}"
    free, free_ends = serve([generate("b", max_tokens=40, seed=3)])
    tokens, ends = serve([wanted("a", grammar(regex_rule(regex, "regex")), n=16), generate("b", max_tokens=40, seed=3)])
    failed = [end for key, end in ends.items() if end.finish == "error"]
    assert failed
    assert {(end.error, end.error_status) for end in failed} == {
        ("the grammar is too complex to be followed at this point of the answer", 400)
    }
    assert tokens["b", 0] == free["b", 0]
    assert ends["b", 0].finish == free_ends["b", 0].finish


# --- the wall ---

SCHEMA = grammar(schema_rule({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}, "schema"))


def neighbours() -> list[Generate]:
    return [generate("free", max_tokens=30, seed=5), wanted("held", SCHEMA, seed=9)]


@pytest.mark.parametrize("fault", [RuntimeError("a fault"), BaseException("as a panic of the library")])
def test_a_fault_while_compiling_is_one_requests(monkeypatch: pytest.MonkeyPatch, fault: BaseException) -> None:
    alone = serve(neighbours())[0]
    true_compile = constraint.compile_grammar

    def compile_or_fail(tokenizer: Any, text: str) -> Any:
        if "poison" in text:
            raise fault
        return true_compile(tokenizer, text)

    monkeypatch.setattr(constraint, "compile_grammar", compile_or_fail)
    tokens, ends = serve([*neighbours(), wanted("bad", 'start: "poison"\n', n=2)])
    for choice in (0, 1):
        assert ends["bad", choice].error_status == 500
        assert ends["bad", choice].error == "the engine could not compile the grammar"
    assert {key: ids for key, ids in tokens.items() if key[0] != "bad"} == alone


def test_a_fault_of_a_matcher_is_one_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = serve(neighbours())[0]
    true_accept = constraint.Constraint.accept
    count = 0

    class Broken:
        def consume_token(self, token: int) -> bool:
            raise BaseException("as a panic of the library")

    def accept(self: constraint.Constraint, token: int) -> bool:
        nonlocal count
        if "poison" in getattr(self, "marks", ""):
            self.matcher = Broken()  # type: ignore[assignment]
        return true_accept(self, token)

    true_take = Constraints.take

    def take(self: Constraints, request: Generate, now: float) -> Any:
        nonlocal count
        count += 1
        return true_take(self, request, now)

    true_start = Engine._start

    def start(self: Engine, lane: Any, request: Generate, arrived: float, constraints: Any) -> None:
        if request.request_id == "bad":
            constraints[1].marks = "poison"
        true_start(self, lane, request, arrived, constraints)

    monkeypatch.setattr(constraint.Constraint, "accept", accept)
    monkeypatch.setattr(Constraints, "take", take)
    monkeypatch.setattr(Engine, "_start", start)
    tokens, ends = serve([*neighbours(), wanted("bad", SCHEMA, n=2)])
    assert count == 2
    assert ends["bad", 1].error == "the grammar could not follow the answer"
    assert ends["bad", 0].finish in ("stop", "length")
    assert {key: ids for key, ids in tokens.items() if key[0] != "bad"} == alone


def test_neighbours_of_grammars_draw_as_alone() -> None:
    requests = [wanted(f"g{i}", SCHEMA, seed=i) if i % 2 else generate(f"g{i}", max_tokens=25, seed=i) for i in range(12)]
    together = serve(requests)[0]
    for request in requests:
        alone = serve([request])[0]
        assert together[request.request_id, 0] == alone[request.request_id, 0]


def test_preempted_and_resumed_is_undisturbed() -> None:
    requests = [wanted(f"p{i}", grammar(regex_rule("([a-c]{9} ?){12}", "r")), seed=i, max_tokens=200) for i in range(4)]
    small = random_lane(num_blocks=14)
    tokens, ends = serve(requests, lane=small)
    assert small.scheduler.stats.preemptions > 0
    assert {end.finish for end in ends.values()} == {"stop"}
    assert tokens == serve(requests)[0]


def test_a_grammar_before_the_vocabulary_is_an_error() -> None:
    lane = random_lane()
    mailbox = WakingMailbox([[wanted("a", SCHEMA)]])
    Engine([lane], mailbox, mailbox.clock).run()
    (end,) = mailbox.events
    assert (end.finish, end.error_status) == ("error", 500)


# --- while it compiles ---


@pytest.fixture
def slow_compile(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Grammars compile only once the event is set."""
    gate = threading.Event()
    true_compile = constraint.compile_grammar

    def compile_later(tokenizer: Any, text: str) -> Any:
        assert gate.wait(10)
        return true_compile(tokenizer, text)

    monkeypatch.setattr(constraint, "compile_grammar", compile_later)
    yield gate
    gate.set()


class GatedMailbox(WakingMailbox):
    """Opens the gate with its last visit."""

    def __init__(self, gate: threading.Event, visits: list[list[Any]]) -> None:
        super().__init__([[VOCABULARY], *visits])
        self.gate = gate

    def receive(self, timeout_s: float | None) -> Any:
        messages = super().receive(timeout_s)
        if not self.visits:
            self.gate.set()
        return messages


def run_gated(gate: threading.Event, *visits: list[Any]) -> list[Any]:
    mailbox = GatedMailbox(gate, list(visits))
    lane = random_lane()
    engine = Engine([lane], mailbox, mailbox.clock)
    engine.run()
    assert not lane.is_compiling
    assert not lane.scheduler.has_work
    return mailbox.events


def test_neighbours_run_while_a_grammar_compiles(slow_compile: threading.Event) -> None:
    events = run_gated(slow_compile, [wanted("g", SCHEMA), generate("free", max_tokens=10)], *[[] for _ in range(30)])
    ends = [event.request_id for event in events if event.finish]
    assert ends == ["free", "g"]


def test_abort_while_compiling(slow_compile: threading.Event) -> None:
    visits = [
        [wanted("all", SCHEMA, n=2), wanted("one", SCHEMA, n=3)],
        [Abort("all"), Abort("one", 1)],
        [Abort("one", 1), Abort("nobody")],
        [],
    ]
    events = run_gated(slow_compile, *visits)
    ends = {(event.request_id, event.choice): event.finish for event in events if event.finish}
    assert len([event for event in events if event.finish]) == 5
    assert ends["all", 0] == ends["all", 1] == ends["one", 1] == "abort"
    assert {ends["one", 0], ends["one", 2]} <= {"stop", "length"}
    assert not [event for event in events if event.tokens and (event.request_id, event.choice) in {("all", 0), ("all", 1), ("one", 1)}]


def test_the_deadline_runs_while_compiling(slow_compile: threading.Event) -> None:
    events = run_gated(slow_compile, [wanted("late", SCHEMA, n=2, timeout_s=0.05), wanted("ok", SCHEMA)], *[[] for _ in range(20)])
    ends = [(event.request_id, event.finish) for event in events if event.finish]
    assert ends[:2] == [("late", "deadline")] * 2
    assert ends[2][0] == "ok"
    assert events[0].usage.queue_s >= 0.05


def test_shutdown_waits_for_no_grammar_but_the_one_that_has_begun(monkeypatch: pytest.MonkeyPatch, slow_compile: threading.Event) -> None:
    begun: list[str] = []
    patched = constraint.compile_grammar

    def compile_and_note(tokenizer: Any, text: str) -> Any:
        begun.append(text)
        return patched(tokenizer, text)

    monkeypatch.setattr(constraint, "compile_grammar", compile_and_note)
    lane = random_lane()
    mailbox = WakingMailbox([[VOCABULARY], [wanted(str(i), f'start: "{i}"\n') for i in range(20)], [Shutdown()]])
    Engine([lane], mailbox, mailbox.clock).run()
    slow_compile.set()
    assert lane.constraints is not None
    lane.constraints._thread.shutdown(wait=True)
    assert len(begun) <= 1


def test_nothing_of_an_ended_request_is_kept() -> None:
    lane = random_lane()
    dead: list[weakref.ref[constraint.Constraint]] = []
    true_copies = Constraints._copies

    def copies(matcher: Any, num_choices: int) -> list[constraint.Constraint]:
        made = true_copies(matcher, num_choices)
        dead.extend(map(weakref.ref, made))
        return made

    lane.constraints = Constraints(WIDTH, lambda: None)
    lane.constraints._copies = copies  # type: ignore[method-assign]
    serve(
        [wanted("done", SCHEMA, n=3), wanted("short", SCHEMA, max_tokens=1), wanted("again", SCHEMA)],
        [wanted("gone", SCHEMA, n=2)],
        [Abort("gone", 0)],
        [Abort("gone")],
        lane=lane,
    )
    assert len(dead) >= 5
    gc.collect()
    assert not [one for one in dead if one() is not None]


def test_constrained_choices_are_begun_ahead_like_all_others() -> None:
    """Their masks are those of the id in front, which is known by then."""
    crowd = [wanted("r", grammar(regex_rule(r"[a-c]{2}/\d+\n?", "regex")), n=4, max_tokens=60), generate("b", max_tokens=40, seed=3)]
    crowd.append(wanted("o", grammar(object_rule()), n=2, max_tokens=300))
    lane = random_lane(is_ahead=True)
    tokens, ends = serve(crowd, lane=lane)
    one_by_one, other_ends = serve(crowd)
    assert tokens == one_by_one
    assert {key: (end.finish, end.stop_id) for key, end in ends.items()} == {
        key: (end.finish, end.stop_id) for key, end in other_ends.items()
    }
    assert isinstance(lane.runner, RandomRunner)
    assert lane.runner.num_ahead > 30


def test_a_step_that_fails_ends_its_grammars_and_the_next_one_is_as_new(monkeypatch: pytest.MonkeyPatch) -> None:
    second = wanted("second", SCHEMA, seed=4)
    alone = serve([second])[0]
    mailbox = WakingMailbox([[VOCABULARY], [wanted("first", SCHEMA, n=4)]])
    true_sample = RandomRunner.sample

    def fail_once(self: RandomRunner, handle: Any, masks: Any = None) -> Any:
        if handle.samples and handle.samples[0].num_generated == 1:
            monkeypatch.setattr(RandomRunner, "sample", true_sample)
            mailbox.visits.append([second])
            raise RuntimeError("the device has gone")
        return true_sample(self, handle, masks)

    monkeypatch.setattr(RandomRunner, "sample", fail_once)
    Engine([random_lane()], mailbox, mailbox.clock).run()
    ends = [(event.request_id, event.finish, event.error_status) for event in mailbox.events if event.finish]
    assert ends[:4] == [("first", "error", 500)] * 4
    assert [token for event in mailbox.events if event.request_id == "second" for token in event.tokens] == alone["second", 0]


def test_the_same_grammar_compiles_once_for_all_who_wait(monkeypatch: pytest.MonkeyPatch, slow_compile: threading.Event) -> None:
    count = 0
    patched = constraint.compile_grammar

    def compile_and_count(tokenizer: Any, text: str) -> Any:
        nonlocal count
        count += 1
        return patched(tokenizer, text)

    monkeypatch.setattr(constraint, "compile_grammar", compile_and_count)
    events = run_gated(slow_compile, [wanted(str(i), SCHEMA, seed=i) for i in range(8)], [wanted("again", SCHEMA)], [])
    assert len([event for event in events if event.finish]) == 9
    assert count == 1


# --- the cache ---


def settle_all(constraints: Constraints) -> None:
    end = time.monotonic() + 30
    while constraints.num_waiting and time.monotonic() < end:
        constraints.settle()
        time.sleep(0.0005)
    assert not constraints.num_waiting


def deep_objects(levels: int, inner: Any) -> Any:
    for _ in range(levels):
        inner = {"type": "object", "properties": {"a": inner}, "required": ["a"]}
    return inner


DEEP = {
    "references": schema_rule(
        {
            "$defs": {
                **{f"d{i}": deep_objects(MAX_DEPTH // 2 - 2, {"$ref": f"#/$defs/d{i + 1}"}) for i in range(MAX_REFERENCES - 1)},
                f"d{MAX_REFERENCES - 1}": {"type": "null"},
            },
            "$ref": "#/$defs/d0",
        },
        "s",
    ),
    "rules": lark_rule(
        "start: r0\n" + "".join(f'r{i}: {"(" * 20}"a" r{i + 1}{")?" * 20}\n' for i in range(MAX_RULES - 2)) + f'r{MAX_RULES - 2}: "z"\n',
        "g",
    ),
}


@pytest.mark.parametrize("name", DEEP)
def test_the_deepest_that_may_be_asked_for_is_compiled(name: str) -> None:
    """The library recurses: on a usual stack a few times the depth ended the whole process."""
    constraints = Constraints(WIDTH, lambda: None)
    constraints.teach(VOCABULARY)
    try:
        assert constraints.take(wanted("deep", grammar(DEEP[name])), 0.0) is None
        results = []
        end = time.monotonic() + 30
        while not results and time.monotonic() < end:
            results = list(constraints.settle())
            time.sleep(0.001)
        assert isinstance(results[0][1], list), results
    finally:
        constraints.close()


def test_two_thousand_schemas_stay_under_the_cap() -> None:
    constraints = Constraints(WIDTH, lambda: None, max_grammars=100, max_bytes=10 << 20)
    constraints.teach(VOCABULARY)
    try:
        for index in range(2000):
            text = grammar(schema_rule({"type": "object", "properties": {f"p{index}": {"type": "integer"}}}, "s"))
            if constraints.take(wanted(str(index), text), 0.0) is None and constraints.num_waiting >= 200:
                settle_all(constraints)
            count, size = constraints.cached
            assert count <= 100
            assert size <= 10 << 20
        settle_all(constraints)
        assert constraints.cached[0] == 100
        assert constraints.take(wanted("hit", text), 0.0) is not None
    finally:
        constraints.close()


def test_one_grammar_larger_than_the_cap_is_served_and_not_kept() -> None:
    constraints = Constraints(WIDTH, lambda: None, max_bytes=100)
    constraints.teach(VOCABULARY)
    assert constraints.take(wanted("a", SCHEMA), 0.0) is None
    end = time.monotonic() + 10
    settled: list[Any] = []
    while not settled and time.monotonic() < end:
        settled = constraints.settle()
    assert len(settled[0][1]) == 1
    assert constraints.cached == (0, 0)
    constraints.close()


def test_a_grammar_that_is_not_kept_drives_none_out() -> None:
    constraints = Constraints(WIDTH, lambda: None, max_bytes=1 << 20)
    constraints.teach(VOCABULARY)
    constraints.take(wanted("small", SCHEMA), 0.0)
    settle_all(constraints)
    kept = constraints.cached
    assert kept[0] == 1
    constraints.take(wanted("large", SCHEMA + "// " + "x" * 20_000), 0.0)
    settle_all(constraints)
    assert constraints.cached == kept
    constraints.close()


def test_too_many_at_once_are_refused_and_aborted_ones_leave_nothing(slow_compile: threading.Event) -> None:
    constraints = Constraints(WIDTH, lambda: None)
    constraints.teach(VOCABULARY)
    for round_ in range(3):
        for index in range(constraint.MAX_COMPILING):
            assert constraints.take(wanted(f"{round_} {index}", f'start: "{round_} {index}"\n'), 0.0) is None
        with pytest.raises(constraint.OverloadedError):
            constraints.take(wanted("more", 'start: "more"\n'), 0.0)
        for index in range(constraint.MAX_COMPILING):
            assert constraints.abort(f"{round_} {index}", None) is not None
    assert constraints.num_waiting == 0
    assert len(constraints._jobs) <= 2  # the one that has begun
    constraints.close()


def test_a_vocabulary_that_can_not_be_used_is_told() -> None:
    lane = random_lane()
    broken = type(VOCABULARY)("tiny", [b"a"], [], [])
    mailbox = WakingMailbox([[broken, wanted("a", SCHEMA)]])
    Engine([lane], mailbox, mailbox.clock).run()
    (end,) = mailbox.events
    assert (end.error, end.error_status) == ("grammars can't be used with this model", 500)


def test_steps_without_grammars_have_no_masks() -> None:
    lane = random_lane()
    serve([generate("a", max_tokens=5)], lane=lane)
    assert isinstance(lane.runner, RandomRunner)
    assert lane.runner.num_masks == 0
    assert lane.runner.unmasked == 5
