"""`braid bench serve`: what is sent, when, and what is made of the answers; against a server that has no model."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from click.testing import CliRunner, Result

from service import cli
from service.bench.datasets import WORDS
from service.bench.options import Options
from service.bench.report import details, figures, percentile, remarks
from service.bench.request import Answer, ask
from service.bench.run import arrival_times, measure
from service.bench.server import Server
from service.errors import StartupError
from tests.bench.fake_server import OVERHEAD, FakeServer, running

SMALL = Options(num_prompts=6, random_input_len=40, random_output_len=4, warmups=0)


@pytest.fixture
def serve() -> Iterator[Callable[..., FakeServer]]:
    with ExitStack() as stack:
        yield lambda **traits: stack.enter_context(running(FakeServer(**traits)))


def measured(server: FakeServer, options: Options = SMALL, **more: Any) -> tuple[dict[str, Any], list[Answer]]:
    return asyncio.run(measure(replace(options, base_url=server.url, **more)))


# -- figures --

ANSWERS = [
    Answer(sent=10.0, chunk_times=[10.5, 11.0, 12.0], ended=12.5, prompt_tokens=8, cached_tokens=4, output_tokens=5),
    Answer(sent=20.0, chunk_times=[20.1, 20.4], ended=20.4, prompt_tokens=8, output_tokens=4),
    Answer(sent=1.0, error="refused"),
]


def test_figures_by_hand() -> None:
    found = figures(ANSWERS, 4.0, Options(max_concurrency=2))
    assert (found["completed"], found["failed"], found["errors"]) == (2, 1, ["refused"])
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (16, 9)
    assert (found["request_throughput"], found["output_throughput"], found["total_token_throughput"]) == (0.5, 2.25, 6.25)
    assert found["mean_ttft_ms"] == pytest.approx((500 + 100) / 2)
    assert found["mean_tpot_ms"] == pytest.approx((2000 / 4 + 300 / 3) / 2)
    assert found["mean_itl_ms"] == pytest.approx((500 + 1000 + 300) / 3)
    assert found["mean_e2el_ms"] == pytest.approx((2500 + 400) / 2)
    assert found["std_ttft_ms"] == pytest.approx(200)
    assert found["p99_ttft_ms"] == pytest.approx(100 + 0.99 * 400)
    assert (found["max_concurrency"], found["request_rate"], found["cached_tokens_per_request"]) == (2, "inf", 2)


def test_keys_are_those_of_vllm() -> None:
    keys = "duration completed failed total_input_tokens total_output_tokens request_throughput request_goodput output_throughput".split()
    keys += [f"{word}_{name}_ms" for word in ("mean", "median", "std", "p95", "p99") for name in ("ttft", "tpot", "itl", "e2el")]
    assert set(figures(ANSWERS, 1.0, Options())) >= {*keys, "total_token_throughput", "max_concurrency", "request_rate"}


def test_goodput_wants_every_goal() -> None:
    def goodput(**goals: float) -> float:
        return float(figures(ANSWERS, 2.0, Options(goodput=goals))["request_goodput"])

    assert goodput(ttft=600) == 1.0
    assert goodput(ttft=200) == 0.5
    assert goodput(ttft=600, tpot=50) == 0.0
    assert goodput(ttft=600, tpot=200, e2el=500) == 0.5
    assert figures(ANSWERS, 2.0, Options())["request_goodput"] is None


def test_an_answer_of_one_token_has_no_time_between_tokens() -> None:
    one = Answer(sent=0.0, chunk_times=[1.0], ended=3.0, output_tokens=1)
    two = Answer(sent=0.0, chunk_times=[1.0, 3.0], ended=3.0, output_tokens=2)
    assert figures([one, two], 1.0, Options())["mean_tpot_ms"] == 2000


def test_nothing_but_failures_is_no_crash() -> None:
    found = figures([Answer(sent=0.0, error="gone")], 1.0, Options())
    assert (found["completed"], found["output_throughput"], found["mean_ttft_ms"]) == (0, 0, 0)
    assert details([Answer(sent=0.0, error="gone")])["ttfts"] == [None]


@pytest.mark.parametrize(("percent", "value"), [(0, 1.0), (50, 2.5), (100, 4.0), (95, 3.85)])
def test_percentiles_lie_between_neighbours(percent: float, value: float) -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0], percent) == pytest.approx(value)


def test_remarks_tell_what_was_not_as_asked() -> None:
    answer = Answer(sent=0.0, prompt_tokens=139, output_tokens=128)
    assert remarks([answer], Options(ignore_eos=True)) == []
    other = replace(answer, prompt_tokens=141, output_tokens=7)
    assert remarks([answer, other], Options(ignore_eos=True)) == [
        "prompts had 139 to 141 tokens and not 139",
        "answers had 7 to 128 tokens and not 128",
    ]


# -- arrivals --


@pytest.mark.parametrize(("burstiness", "variation"), [(1.0, 1.0), (0.25, 2.0), (100.0, 0.1)])
def test_arrivals_have_the_rate_and_the_burstiness_that_are_asked_for(burstiness: float, variation: float) -> None:
    times = list(itertools.islice(arrival_times(20.0, burstiness, Random(3)), 20_000))
    gaps = [later - earlier for earlier, later in itertools.pairwise([0.0, *times])]
    assert all(gap >= 0 for gap in gaps)
    # The mean of 20,000 gaps has a standard error of variation / 141 of itself; 5 of those are allowed.
    assert statistics.fmean(gaps) == pytest.approx(0.05, rel=5 * variation / math.sqrt(len(gaps)))
    assert statistics.pstdev(gaps) / statistics.fmean(gaps) == pytest.approx(variation, rel=0.1)
    assert times == list(itertools.islice(arrival_times(20.0, burstiness, Random(3)), 20_000))


def test_arrivals_send_everything_with_the_cap_kept(serve: Callable[..., FakeServer]) -> None:
    server = serve(waits_for=3)
    found, _ = measured(server, num_prompts=12, request_rate=10_000.0, max_concurrency=3)
    assert (found["completed"], len(server.asked), server.most_running) == (12, 12, 3)


def test_a_closed_loop_keeps_so_many_in_flight(serve: Callable[..., FakeServer]) -> None:
    server = serve(waits_for=3)
    found, _ = measured(server, num_prompts=12, max_concurrency=3)
    assert (found["completed"], len(server.asked), server.most_running) == (12, 12, 3)


def test_without_a_bound_all_are_in_flight(serve: Callable[..., FakeServer]) -> None:
    server = serve(waits_for=6)
    measured(server)
    assert server.most_running == 6


# -- what is sent --


def test_prompts_have_the_length_that_was_asked_for(serve: Callable[..., FakeServer]) -> None:
    server = serve()
    found, answers = measured(server)
    assert {answer.prompt_tokens for answer in answers} == {40}
    assert (found["total_input_tokens"], found["total_output_tokens"], found["notes"]) == (240, 24, [])
    assert len({json.dumps(body) for body in server.asked}) == 6
    assert found["cached_tokens_per_request"] == 3


@pytest.mark.parametrize("endpoint", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("dataset", ["random", "shared-prefix"])
def test_words_that_are_several_tokens_are_left_out(serve: Callable[..., FakeServer], dataset: str, endpoint: str) -> None:
    server = serve(costs={word: 1 + number % 3 for number, word in enumerate(WORDS)})
    found, answers = measured(server, dataset_name=dataset, shared_prefix_len=60, endpoint=endpoint)
    assert {answer.prompt_tokens for answer in answers} == {100 if dataset == "shared-prefix" else 40}
    assert (found["notes"], set(server.routes)) == ([], {endpoint})


def test_where_every_word_is_several_tokens_it_is_said(serve: Callable[..., FakeServer]) -> None:
    found, answers = measured(serve(costs=dict.fromkeys(WORDS, 2)))
    assert {answer.prompt_tokens for answer in answers} <= {39, 40, 41}
    assert "few words are one token" in found["notes"][0]


def test_a_server_that_does_not_count_gets_a_word_for_a_token(serve: Callable[..., FakeServer]) -> None:
    server = serve(counts=False, has_usage=False)
    found, _ = measured(server)
    assert (found["num_without_usage"], found["total_input_tokens"], found["total_output_tokens"]) == (6, 240, 24)
    assert {server.tokens_of(body) for body in server.asked} == {40 + OVERHEAD}
    assert [note.partition(":")[0] for note in found["notes"]] == [
        "the server does not count prompts",
        "6 answers came without usage",
    ]


def test_a_prompt_shorter_than_its_frame_is_refused(serve: Callable[..., FakeServer]) -> None:
    with pytest.raises(StartupError, match=f"more than {OVERHEAD}"):
        measured(serve(), random_input_len=OVERHEAD)


def test_a_shared_prefix_is_the_same_in_all_prompts(serve: Callable[..., FakeServer]) -> None:
    server = serve()
    measured(server, dataset_name="shared-prefix", shared_prefix_len=60)
    systems, questions = zip(*(body["messages"] for body in server.asked), strict=True)
    assert {each["role"] for each in systems} == {"system"}
    assert (len({each["content"] for each in systems}), len({each["content"] for each in questions})) == (1, 6)


def test_a_conversation_sends_its_history_again(serve: Callable[..., FakeServer]) -> None:
    server = serve()
    found, _ = measured(server, dataset_name="multi-turn", num_turns=3, max_concurrency=1)
    lengths = [len(body["messages"]) for body in server.asked]
    assert (found["completed"], lengths) == (6, [1, 3, 5, 1, 3, 5])
    first, second, third = (body["messages"] for body in server.asked[:3])
    assert second[:1] == first
    assert third[:3] == second
    assert second[1] == {"role": "assistant", "content": "w0 w1 w2 w3 "}
    assert [each["role"] for each in third] == ["user", "assistant", "user", "assistant", "user"]


def test_a_conversation_as_plain_text(serve: Callable[..., FakeServer]) -> None:
    server = serve()
    measured(server, dataset_name="multi-turn", num_turns=2, max_concurrency=1, endpoint="/v1/completions")
    assert server.asked[1]["prompt"].startswith(server.asked[0]["prompt"] + " w0 w1 w2 w3 ")


def test_a_conversation_ends_where_an_answer_fails(serve: Callable[..., FakeServer]) -> None:
    server = serve(fails=frozenset({1}))
    found, _ = measured(server, dataset_name="multi-turn", num_turns=3, max_concurrency=1)
    assert [len(body["messages"]) for body in server.asked] == [1, 3, 1, 3, 5, 1]
    assert (found["completed"], found["failed"]) == (5, 1)


def test_pictures_are_timed_by_preview_and_whole(serve: Callable[..., FakeServer]) -> None:
    server = serve()
    found, answers = measured(server, dataset_name="pictures", num_prompts=3, partial_images=2)
    assert set(server.routes) == {"/v1/images/generations"}
    assert all("model" not in body for body in server.asked)
    assert (found["completed"], found["total_output_tokens"], found["mean_tpot_ms"]) == (3, 192, 0)
    assert [len(answer.chunk_times) for answer in answers] == [3, 3, 3]
    assert len({body["seed"] for body in server.asked}) == 3


def test_warm_ups_are_not_measured_and_ask_other_things(serve: Callable[..., FakeServer]) -> None:
    server = serve()
    found, _ = measured(server, warmups=2, random_output_len=20)
    assert (found["completed"], len(server.asked)) == (6, 8)
    assert [body["max_tokens"] for body in server.asked[:2]] == [16, 16]
    assert len({body["messages"][0]["content"] for body in server.asked}) == 8


def test_the_same_seed_sends_the_same(serve: Callable[..., FakeServer]) -> None:
    server = serve()
    for seed in (1, 1, 2):
        measured(server, seed=seed, max_concurrency=1)
    assert server.asked[:6] == server.asked[6:12] != server.asked[12:]


# -- answers --


@pytest.mark.parametrize("is_chunked", [True, False])
def test_every_chunk_with_text_is_an_arrival(serve: Callable[..., FakeServer], is_chunked: bool) -> None:
    server = serve(is_chunked=is_chunked)
    body = {"prompt": "a b", "max_tokens": 5, "stream": True}
    answer = asyncio.run(ask(Server(server.url), "/v1/completions", body, keeps_text=True))
    assert (len(answer.chunk_times), answer.output_tokens, answer.text) == (5, 5, "w0 w1 w2 w3 w4 ")
    assert answer.chunk_times == sorted(answer.chunk_times)
    assert answer.sent < answer.chunk_times[0] <= answer.ended


def test_failures_are_counted_and_not_fatal(serve: Callable[..., FakeServer]) -> None:
    found, answers = measured(serve(fails=frozenset({0, 3})), max_concurrency=2)
    assert (found["completed"], found["failed"], len(answers)) == (4, 2, 6)
    assert found["errors"] == ["HTTP/1.1 500 Fine: no luck"]


@pytest.mark.parametrize("is_chunked", [True, False])
def test_a_stream_that_breaks_off_is_a_failure(serve: Callable[..., FakeServer], is_chunked: bool) -> None:
    found, _ = measured(serve(breaks_off=True, is_chunked=is_chunked))
    assert (found["completed"], found["failed"]) == (0, 6)
    assert "before" in found["errors"][0]


def test_a_server_without_ignore_eos_is_asked_without_it(serve: Callable[..., FakeServer]) -> None:
    server = serve(knows_ignore_eos=False)
    found, _ = measured(server, ignore_eos=True)
    assert (found["completed"], "ignore_eos" in server.asked[0]) == (6, False)
    assert "refuses ignore_eos" in found["notes"][0]
    other = serve()
    measured(other, ignore_eos=True)
    assert all(body["ignore_eos"] is True for body in other.asked)


# -- the command --


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, ["bench", "serve", *arguments])


FEW = ("--num-prompts", "3", "--random-input-len", "20", "--random-output-len", "4")


def test_the_command_writes_figures_and_details(serve: Callable[..., FakeServer], tmp_path: Path) -> None:
    server, path = serve(), tmp_path / "figures.json"
    given = ("--base-url", server.url + "/v1", "--api-key", "secret", "--goodput", "e2el:60000", "--json", str(path), "--save-detailed")
    result = bench(*FEW, *given)
    assert result.exit_code == 0, result.output
    assert "Mean TTFT (ms)" in result.output
    found = json.loads(path.read_text())
    assert (found["completed"], found["model_id"], found["input_lens"], found["output_lens"]) == (3, "fake", [20] * 3, [4] * 3)
    assert found["request_goodput"] == pytest.approx(found["request_throughput"])
    assert [len(found[name]) for name in ("ttfts", "itls", "e2els", "start_times", "cached_lens", "request_errors")] == [3] * 6
    assert (found["options"]["num_prompts"], found["options"]["goodput"]) == (3, {"e2el": 60000.0})
    assert "Bearer secret".lower() in server.keys
    assert "secret" not in path.read_text()


def test_nothing_answered_is_status_1(serve: Callable[..., FakeServer]) -> None:
    result = bench("--base-url", serve(fails=frozenset(range(9))).url, "--warmups", "0", *FEW)
    assert result.exit_code == 1
    assert "no luck" in result.output
    assert "Mean TTFT" not in result.output


def test_a_server_that_is_not_there_is_said_in_one_line() -> None:
    result = bench("--base-url", "http://127.0.0.1:1")
    assert result.exit_code == 1
    assert "Error: no server answers at http://127.0.0.1:1" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base-url", "ftp://here"], "should look like http://"),
        (["--endpoint", "/v1/embeddings"], "--endpoint of --dataset-name random is"),
        (["--goodput", "itl:5"], "is not ttft, tpot or e2el"),
        (["--goodput", "ttft"], "is not ttft, tpot or e2el"),
        (["--dataset-name", "pictures", "--goodput", "tpot:5"], "pictures have no tpot"),
        (["--request-rate", "0"], "--request-rate"),
        (["--api-key", "a\nb"], "visible ASCII"),
    ],
)
def test_what_cannot_be_is_refused(arguments: list[str], message: str) -> None:
    result = bench(*arguments)
    assert result.exit_code in (1, 2)
    assert message in result.output
