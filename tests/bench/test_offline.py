"""The offline benchmark on a tiny model: every answer has its full length, and the requests are those of nano-vllm's test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.offline import main, requests_of
from tests.model.checkpoints import TINY, random_tensors, write_gguf


def test_the_requests_are_nano_vllms() -> None:
    """Its read-me tells how many tokens they draw."""
    asked = requests_of(256, 100, 1024, 49_152, seed=0)
    assert sum(each.num_drawn for each in asked) == 133_966
    assert {100 <= len(each.prompt) <= 1024 and 100 <= each.num_drawn <= 1024 for each in asked} == {True}
    assert max(max(each.prompt) for each in requests_of(20, 5, 9, 96, seed=0)) <= 95


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", TINY, random_tensors(TINY))


def test_it_draws_all_that_was_asked_for(tiny: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(tiny), "--requests", "5", "--min-len", "3", "--max-len", "9", "--json", str(tmp_path / "out.json")]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    figures = json.loads((tmp_path / "out.json").read_text())["figures"]
    asked = requests_of(5, 3, 9, TINY.vocab_size, seed=0)
    assert figures["requests"] == 5
    assert figures["prompt_tokens"] == sum(len(each.prompt) for each in asked)
    assert figures["output_tokens"] == sum(each.num_drawn for each in asked)
    assert 1 < figures["mean_batch"] <= 5
    assert figures["output_throughput"] == pytest.approx(figures["output_tokens"] / figures["seconds"])
    assert f"{figures['output_tokens']} of answers" in done.output


def test_lengths_that_do_not_fit_are_refused(tiny: Path) -> None:
    for arguments in (["--max-len", "65"], ["--min-len", "9", "--max-len", "3"]):
        done = CliRunner().invoke(main, ["--model", str(tiny), "--requests", "1", "--min-len", "1", *arguments])
        assert done.exit_code == 2, done.output
