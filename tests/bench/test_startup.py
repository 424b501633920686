"""The start-up benchmark: what it reads of a process, and one start of the model that ships."""

from __future__ import annotations

import os

import pytest

from bench.startup import Start, largest_mapping, measure, memory_of, summarise

SMAPS = """\
7f0000000000-7f0000100000 r--p 00000000 00:00 1 /usr/lib/large.so
Size:            9000000 kB
Pss:              900000 kB
7f0000200000-7f0000300000 rw-p 00000000 00:00 0
Size:               1024 kB
Pss:                 512 kB
Pss_Anon:            512 kB
7f0000400000-7f0000500000 rw-p 00000000 00:00 0
Size:             409600 kB
Pss:                2048 kB
7f0000600000-7f0000700000 rw-p 00000000 00:00 0                          [heap]
Size:             999999 kB
Pss:              999999 kB
"""


def test_the_pool_is_the_largest_mapping_of_no_file() -> None:
    assert largest_mapping(SMAPS) == (409_600 * 1024, 2048 * 1024)


def test_memory_of_a_process() -> None:
    found = memory_of(os.getpid())
    assert found["pss"] > 10_000_000
    assert found["pss"] >= found["anonymous"] + found["file"] - 2**20


def test_medians() -> None:
    memory = {"first_answer": [{"pss": 2_000_000, "kv_pool": 0}, {"pss": 3_000_000, "kv_pool": 1_000_000}]}
    starts = [Start(health_s=0.2, ready_s=ready, first_token_s=ready + 0.1, memory=memory) for ready in (2.0, 3.0, 9.0)]
    found = summarise(starts, [1.0, 1.5, 2.0])
    assert (found["ready_s"], found["torch_s"], found["first_answer_pss_mb"], found["first_answer_kv_pool_mb"]) == (3.0, 1.5, 5.0, 1.0)
    assert found["over_torch_s"] == pytest.approx(1.6)


def test_one_start() -> None:
    found = measure("braid-nano", ("--data-dir", "off", "--memory", "600MB"), has_load=False)
    assert 0 < found.health_s < found.ready_s < found.first_token_s
    assert found.cpu_s > 0
    assert len(found.memory["first_answer"]) == 2
    assert list(found.phases)[-1] == "ready"
