"""What grammars cost and hold: time per mask and coverage of JSON schemas, llguidance beside xgrammar, and whole steps with and without.

`python -m bench.grammars [--model FILE.gguf] [--parts coverage,masks,steps]`; xgrammar is tried where it is installed. The steps need a
model's file, the masks its tokenizer.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
from llguidance import LLExecutor, LLMatcher
from llguidance.numpy import fill_next_token_bitmask_par
from numpy.typing import NDArray

from bench.grammar_schemas import CASES, Case
from service.codec.grammar import grammar, schema_rule
from service.codec.prompt import Codec, load_codec
from service.engine.constraint import compile_grammar, make_tokenizer
from service.engine.engine import Lane
from service.engine.messages import Generate, Load, ModelSource, Vocabulary
from service.errors import RequestError
from service.scheduling.plan import StepPlan
from service.scheduling.sampling import SamplingParams

BATCH = 16
SCHEMA = next(case.schema for case in CASES if case.name == "list of persons")
ANSWER = json.dumps({"people": [{"name": f"Person {i}", "age": 20 + i, "email": None} for i in range(40)]}, separators=(", ", ": "))


def vocabulary_of(codec: Codec) -> Vocabulary:
    tokenizer = codec.tokenizer
    return Vocabulary(codec.name, tokenizer.pieces, sorted(tokenizer.special.ids), list(codec.eos_ids))


class Ours:
    """llguidance as the server uses it: behind its own checks of schemas."""

    name = "llguidance"

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.tokenizer = make_tokenizer(vocabulary_of(codec), codec.vocab_size)
        self.executor = LLExecutor(2)

    def compile(self, schema: Any) -> LLMatcher:
        """Raises: RequestError."""
        return compile_grammar(self.tokenizer, grammar(schema_rule(schema, "schema")))

    def admits(self, compiled: LLMatcher, text: str) -> bool:
        matcher, ids = compiled.deep_copy(), self.codec.tokenizer.encode(text)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    def start(self, compiled: LLMatcher) -> LLMatcher:
        return compiled.deep_copy()

    def fill(self, matchers: list[LLMatcher], masks: NDArray[np.int32]) -> None:
        fill_next_token_bitmask_par(self.executor, [(matcher, row) for row, matcher in enumerate(matchers)], masks)

    def accept(self, matcher: LLMatcher, token: int) -> None:
        if not matcher.consume_token(token):
            raise ValueError(f"{token} was refused")


class Theirs:
    """xgrammar, told to be strict about white space as we are."""

    name = "xgrammar"

    def __init__(self, codec: Codec) -> None:
        xgrammar = importlib.import_module("xgrammar")
        pieces = codec.tokenizer.pieces
        special = codec.tokenizer.special.ids
        tokens = [b"" if token in special else piece for token, piece in enumerate(pieces)]
        self.codec = codec
        self.library = xgrammar
        info = xgrammar.TokenizerInfo(tokens, vocab_type=xgrammar.VocabType.RAW, stop_token_ids=list(codec.eos_ids))
        self.compiler = xgrammar.GrammarCompiler(info, max_threads=2, cache_enabled=False)
        self.batch = xgrammar.BatchGrammarMatcher(2)

    def compile(self, schema: Any) -> Any:
        return self.compiler.compile_json_schema(json.dumps(schema), any_whitespace=False, separators=(", ", ": "), strict_mode=False)

    def admits(self, compiled: Any, text: str) -> bool:
        matcher = self.library.GrammarMatcher(compiled, terminate_without_stop_token=False)
        if not all(matcher.accept_token(token) for token in self.codec.tokenizer.encode(text)):
            return False
        return bool(matcher.accept_token(self.codec.eos_ids[0]))

    def start(self, compiled: Any) -> Any:
        return self.library.GrammarMatcher(compiled)

    def fill(self, matchers: list[Any], masks: NDArray[np.int32]) -> None:
        self.batch.batch_fill_next_token_bitmask(matchers, masks)

    def accept(self, matcher: Any, token: int) -> None:
        if not matcher.accept_token(token):
            raise ValueError(f"{token} was refused")


def libraries(codec: Codec) -> Iterator[Ours | Theirs]:
    yield Ours(codec)
    if importlib.util.find_spec("xgrammar") is not None:
        yield Theirs(codec)


# --- coverage ---


def written(value: Any) -> str:
    return json.dumps(value, separators=(", ", ": "), ensure_ascii=False)


def verdict(library: Ours | Theirs, case: Case) -> str:
    """held, refused (a clean error), or wrong: it admits what the schema does not, or the other way round."""
    try:
        compiled = library.compile(case.schema)
    except (RequestError, RuntimeError, ValueError) as error:
        return "refused" if case.good else f"refused, rightly: {str(error)[:60]!r}"
    too_wide = [value for value in case.bad if library.admits(compiled, written(value))]
    too_narrow = [value for value in case.good if not library.admits(compiled, written(value))]
    if too_wide:
        return f"WRONG: admits {written(too_wide[0])[:50]}"
    return f"narrow: not {written(too_narrow[0])[:50]}" if too_narrow else "held"


def check_cases() -> None:
    """The cases themselves, by jsonschema. Raises: AssertionError."""
    unchecked = ("format", "remote", "pattern and", "unknown format", "tuple of old drafts")
    for case in CASES:
        if not case.name.startswith(unchecked):
            validator = jsonschema.Draft202012Validator(case.schema)
            assert all(validator.is_valid(value) for value in case.good), case.name
            assert not any(validator.is_valid(value) for value in case.bad), case.name


def coverage(codec: Codec) -> None:
    check_cases()
    for library in libraries(codec):
        found: dict[str, list[str]] = {}
        for case in CASES:
            said = verdict(library, case)
            found.setdefault(said.partition(":")[0], []).append(case.name + said.partition(":")[1] + said.partition(":")[2])
        print(f"{library.name}: {len(CASES)} schemas; " + ", ".join(f"{len(names)} {kind}" for kind, names in sorted(found.items())))
        for kind in sorted(found):
            if kind != "held":
                print(f"  {kind}: " + "; ".join(found[kind]))


# --- masks ---


def masks(codec: Codec) -> None:
    """Compilation, and time per mask, along one long answer."""
    ids = codec.tokenizer.encode(ANSWER)
    print(f"vocabulary of {codec.vocab_size}, an answer of {len(ids)} tokens; medians, 2 threads")
    print(f"{'library':>12} {'compile ms':>11} {'1 mask us':>10} {'99 % us':>9} {'16 masks us':>12} {'accept us':>10}")
    for library in libraries(codec):
        compiling, single, batch, accepting = times_of(library, ids, np.zeros((BATCH, (codec.vocab_size + 31) // 32), np.int32))
        print(
            f"{library.name:>12} {statistics.median(compiling) * 1e3:11.2f} {statistics.median(single) * 1e6:10.1f} "
            f"{np.percentile(single, 99) * 1e6:9.1f} {statistics.median(batch) * 1e6:12.1f} {statistics.median(accepting) * 1e6:10.2f}"
        )


def times_of(library: Ours | Theirs, ids: list[int], buffer: NDArray[np.int32]) -> tuple[list[float], ...]:
    """Seconds of compilations, of single masks, of BATCH masks, and of accepted tokens."""

    def fill(count: int) -> None:
        library.fill(matchers[:count], buffer)

    def accept_all(token: int) -> None:
        for matcher in matchers:
            library.accept(matcher, token)

    compiling = [timed(library.compile, SCHEMA) for _ in range(5)]
    compiled = library.compile(SCHEMA)
    matchers = [library.start(compiled) for _ in range(BATCH)]
    single, batch, accepting = [], [], []
    for token in ids:
        single.append(timed(fill, 1))
        batch.append(timed(fill, BATCH))
        accepting.append(timed(accept_all, token) / BATCH)
    return compiling, single, batch, accepting


def timed(call: Callable[[Any], object], argument: Any) -> float:
    start = time.perf_counter()
    call(argument)
    return time.perf_counter() - start


# --- whole steps ---


class Stepper:
    """The engine's own road without a mailbox: plan, forward, masks, sample, commit; with BATCH users who decode."""

    def __init__(self, model: Path, codec: Codec, top_p: float) -> None:
        from service.engine.constraint import Constraints
        from service.runner.load import load_models
        from service.worker import build_lane

        load = Load((ModelSource("model", str(model)),), "auto", "cpu", 4 << 30, 2048, 512, BATCH, False, threads=2)
        (loaded,) = load_models(load, lambda phase, fraction: None)
        self.lane: Lane = build_lane(loaded, load)
        self.constraints = self.lane.constraints = Constraints(self.lane.info.vocab_size, lambda: None)
        self.constraints.teach(vocabulary_of(codec))
        self.prompt = codec.encode_text("A list of people as JSON: ")
        self.text = grammar(schema_rule({"type": "array", "items": SCHEMA["properties"]["people"]["items"], "minItems": 1000}, "schema"))
        self.top_p = top_p
        self.num_runs = 0
        self.filling: list[float] = []

    def run(self, num_steps: int, with_grammar: bool) -> list[float]:
        """Seconds of each step, with BATCH users in it. The prompts' own steps are left out."""
        from service.engine.constraint import Constraint
        from service.scheduling.sequence import Request

        self.num_runs += 1
        name = f"run{self.num_runs}"
        sampling = SamplingParams(max_tokens=num_steps + 1, temperature=0.8, top_p=self.top_p, seed=7)
        grammars: tuple[Constraint, ...] = ()
        if with_grammar:
            wanted = Generate(name, "model", self.prompt, sampling, num_choices=BATCH, grammar=self.text)
            ready = self.constraints.take(wanted, 0.0)
            while ready is None:
                settled = self.constraints.settle()
                ready = settled[0][1] if settled else None  # type: ignore[assignment]
            grammars = tuple(ready)
        self.lane.scheduler.add(Request(name, (tuple(self.prompt),), sampling, BATCH, grammars=grammars), 0.0)
        seconds: list[float] = []
        while True:
            start = time.perf_counter()
            plan, _ = self.lane.scheduler.plan(0.0)
            if plan is None:
                return seconds
            self._compute(plan)
            if plan.num_tokens == BATCH == len(plan.samples):
                seconds.append(time.perf_counter() - start)

    def _compute(self, plan: StepPlan) -> None:
        from service.engine.constraint import Constraint

        handle = self.lane.runner.forward(plan)
        grammars = [one if isinstance(one, Constraint) else None for one in self.lane.scheduler.grammars(plan)]
        start = time.perf_counter()
        bits, stops = self.constraints.masks.fill(plan.samples, grammars)
        if bits is not None:
            self.filling.append(time.perf_counter() - start)
        if stops:
            raise RuntimeError("the grammar of the benchmark must not end")
        self.lane.scheduler.commit(plan, self.lane.runner.sample(handle, bits), 0.0)


def steps(model: Path, codec: Codec, top_p: float, num_turns: int = 40, num_steps: int = 25) -> None:
    """In short turns, so that both see the same moods of the machine."""
    stepper = Stepper(model, codec, top_p)
    for with_grammar in (False, True):
        stepper.run(20, with_grammar)
    plain, masked, ratios = [], [], []
    for turn in range(num_turns):
        order = (False, True) if turn % 2 else (True, False)
        pair = {with_grammar: statistics.median(stepper.run(num_steps, with_grammar)) for with_grammar in order}
        plain.append(pair[False])
        masked.append(pair[True])
        ratios.append(pair[True] / pair[False])
    print(f"{BATCH} users, top_p {top_p:g}, medians of {num_steps} steps, {num_turns} turns")
    print(f"without masks {statistics.median(plain) * 1e3:.2f} ms, with {statistics.median(masked) * 1e3:.2f} ms a step")
    quarters = statistics.quantiles(ratios, n=4)
    print(f"with / without: median {quarters[1]:.3f}, quartiles {quarters[0]:.3f} and {quarters[2]:.3f}")
    print(f"least medians of a turn: {min(plain) * 1e3:.2f} and {min(masked) * 1e3:.2f} ms; filling {BATCH} rows takes "
          f"{statistics.median(stepper.filling) * 1e6:.0f} us")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a .gguf file")
    parser.add_argument("--parts", default="coverage,masks,steps")
    parser.add_argument("--top-p", type=float, default=1.0, help="of the steps; below 1 the masks save more than they cost")
    options = parser.parse_args()
    codec = load_codec(options.model)
    for part in options.parts.split(","):
        print(f"--- {part}")
        {"coverage": lambda: coverage(codec), "masks": lambda: masks(codec), "steps": lambda: steps(options.model, codec, options.top_p)}[
            part
        ]()


if __name__ == "__main__":
    main()
