"""Batches by the official SDK: run to every end, counted right, kept through sudden deaths, and never in the way of who waits.

Long, because every end of a batch has its own course.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import Batch, BatchError

from service.api.insider import PRIORITY
from service.errors import OverloadedError, UnavailableError
from service.jobs import answering as answering_module
from service.jobs import batch as batch_module
from service.jobs import batches as batches_module
from service.jobs import disk as disk_module
from service.jobs import files as files_module
from tests.api.conftest import eventually
from tests.api.desks import LIMITS, Office, jsonl, line, office
from tests.api.fakes import TEXT, Running, Script
from tests.api.openai_forms import check_official
from tests.api.test_openapi import check as check_form
from tests.api.test_validation import check

CHAT = "/v1/chat/completions"
KEYS = ("first-key-123", "second-key-456")


def submit(client: openai.OpenAI, *lines: object, endpoint: str = CHAT, **more: Any) -> Batch:
    source = client.files.create(file=("in.jsonl", jsonl(*lines)), purpose="batch")
    return client.batches.create(input_file_id=source.id, endpoint=endpoint, completion_window="24h", **more)  # type: ignore[arg-type]


def ended(client: openai.OpenAI, batch_id: str, seconds: float = 20) -> Batch:
    end = time.monotonic() + seconds
    while True:
        batch = client.batches.retrieve(batch_id)
        if batch.status in ("completed", "failed", "cancelled", "expired"):
            return batch
        assert time.monotonic() < end, batch
        time.sleep(0.02)


def answers(client: openai.OpenAI, file_id: str | None) -> dict[str, dict[str, Any]]:
    """By custom_id; none may come twice."""
    if file_id is None:
        return {}
    lines = [json.loads(each) for each in client.files.content(file_id).text.splitlines()]
    found = {each["custom_id"]: each for each in lines}
    assert len(found) == len(lines)
    return found


def check_batch(found: Office, batch_id: str) -> None:
    """What of it is not there yet is null, as in OpenAI's own answers; their schemas only let it be absent."""
    body, page = (httpx.get(f"{found.server.url}/v1/batches{path}").json() for path in (f"/{batch_id}", ""))
    check_form(body, "Batch")
    check_official(body, "Batch")
    check_form(page, "BatchPage")
    check_official(page, "ListBatchesResponse")


def failures(batch: Batch) -> list[BatchError]:
    assert batch.errors is not None
    assert batch.errors.data is not None
    return batch.errors.data


def counts(batch: Batch) -> tuple[int, int, int]:
    assert batch.request_counts is not None
    return batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed


def test_a_batch(tmp_path: Path) -> None:
    with office(tmp_path) as found, found.client() as client:
        lines = [line(f"id-{number}", f"question {number}") for number in range(10)]
        made = submit(client, *lines, b"", line("bad", temperature=9), line("nobody", model="gpt-nothing"), metadata={"night": "1"})
        assert (made.object, made.status, made.endpoint, made.completion_window) == ("batch", "validating", CHAT, "24h")
        assert made.expires_at == made.created_at + 86_400
        batch = ended(client, made.id)
        assert (batch.status, batch.metadata, counts(batch)) == ("completed", {"night": "1"}, (12, 10, 2))
        check_batch(found, made.id)
        assert all((batch.in_progress_at, batch.finalizing_at, batch.completed_at))
        assert not any((batch.failed_at, batch.cancelled_at, batch.expired_at, batch.errors))
        good = answers(client, batch.output_file_id)
        assert set(good) == {f"id-{number}" for number in range(10)}
        for answer in good.values():
            assert set(answer) == {"id", "custom_id", "response", "error"}
            assert (answer["error"], answer["response"]["status_code"]) == (None, 200)
            assert answer["response"]["request_id"].startswith("req_")
            assert answer["response"]["body"]["choices"][0]["message"]["content"] == TEXT
        bad = answers(client, batch.error_file_id)
        assert {name: answer["response"]["status_code"] for name, answer in bad.items()} == {"bad": 400, "nobody": 404}
        assert bad["bad"]["response"]["body"]["error"]["param"] == "temperature"
        assert client.files.retrieve(batch.output_file_id or "").purpose == "batch_output"
        prompts = {bytes(request.prompt).decode() for request in found.server.engine.requests}
        assert prompts == {f"user:question {number}\n" for number in range(10)}
        assert not list((tmp_path / "batches").glob("*.outputs"))


def test_other_endpoints(tmp_path: Path) -> None:
    with office(tmp_path) as found, found.client() as client:
        lines = [line("a", url="/v1/completions", prompt="One,", max_tokens=3)]
        batch = ended(client, submit(client, *lines, endpoint="/v1/completions").id)
        assert answers(client, batch.output_file_id)["a"]["response"]["body"]["choices"][0]["text"]
        lines = [line("a", url="/v1/responses", input="hi", max_output_tokens=20)]
        batch = ended(client, submit(client, *lines, endpoint="/v1/responses").id)
        assert answers(client, batch.output_file_id)["a"]["response"]["body"]["object"] == "response"


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (b"{", "invalid_json_line"),
        (b"[]", "invalid_json_line"),
        (b"\xff\xfe", "invalid_json_line"),
        ({"custom_id": "b", "method": "POST", "url": CHAT}, "invalid_json_line"),
        ({**line("b"), "body": []}, "invalid_json_line"),
        ({**line("b"), "custom_id": 7}, "invalid_json_line"),
        (line(""), "invalid_custom_id"),
        (line("a"), "duplicate_custom_id"),
        ({**line("b"), "method": "GET"}, "invalid_method"),
        ({**line("b"), "url": "/v1/completions"}, "mismatched_endpoint"),
        ({**line("b"), "url": "/v1/files"}, "mismatched_endpoint"),
        (line("b", stream=True), "unsupported_parameter"),
        (line("b", background=True), "unsupported_parameter"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, bad: object, code: str) -> None:
    path = tmp_path / "in"
    path.write_bytes(jsonl(line("a"), bad))
    places, (failure,) = batch_module.survey(path, CHAT, batch_module.LineLimits())
    assert [place.custom_id for place in places] == ["a"]
    assert (failure.code, failure.line) == (code, 2)
    assert failure.message


def test_a_bad_line_fails_the_batch_before_anything_runs(tmp_path: Path) -> None:
    with office(tmp_path) as found, found.client() as client:
        batch = ended(client, submit(client, line("a"), b"{").id)
        assert (batch.status, batch.output_file_id, batch.error_file_id) == ("failed", None, None)
        check_batch(found, batch.id)
        assert batch.failed_at
        assert [(failure.code, failure.line) for failure in failures(batch)] == [("invalid_json_line", 2)]
        assert not found.server.engine.requests


def test_an_empty_input(tmp_path: Path) -> None:
    with office(tmp_path) as found, found.client() as client:
        batch = ended(client, submit(client, b"").id)
        assert [failure.code for failure in failures(batch)] == ["empty_file"]


def test_limits_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_bytes(jsonl(line("a"), line("b"), line("c")))
    limits = batch_module.LineLimits(max_lines=2)
    assert [failure.code for failure in batch_module.survey(path, CHAT, limits)[1]] == ["too_many_requests"]
    path.write_bytes(jsonl(line("a"), line("b", "x" * 1000)) + b"y" * 5000)
    limits = batch_module.LineLimits(max_line_bytes=500)
    assert [(failure.code, failure.line) for failure in batch_module.survey(path, CHAT, limits)[1]] == [("line_too_long", 2)]


def test_requests_that_are_refused_come_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering_module, "_LONGEST_WAIT_S", 0.02)
    with office(tmp_path) as found, found.client() as client:
        for refusal in (OverloadedError("full", retry_after_s=1), UnavailableError("loading")):
            found.server.engine.refusal = refusal
            made = submit(client, line("a"), line("b"))
            time.sleep(0.2)
            assert client.batches.retrieve(made.id).status == "in_progress"
            found.server.engine.refusal = None
            assert counts(ended(client, made.id)) == (2, 2, 0)


def test_who_waits_comes_first_and_few_run_at_once(tmp_path: Path) -> None:
    with office(tmp_path) as found, found.client() as client:
        engine, hold = found.server.engine, threading.Event()
        engine.choose = lambda request: Script(hold=hold) if request.priority else Script()
        names = ("one", "two")
        made = [submit(client, *[line(f"id-{number}", name, priority=number - 5) for number in range(20)]) for name in names]
        eventually(lambda: all(client.batches.retrieve(batch.id).status == "in_progress" for batch in made))
        time.sleep(0.1)
        assert engine.num_in_flight == len(engine.requests) == LIMITS["concurrency"]
        assert sorted(request.priority for request in engine.requests) == [PRIORITY + number - 5 for number in range(4)]
        assert found.server.chat("me").status_code == 200
        hold.set()
        assert [counts(ended(client, batch.id)) for batch in made] == [(20, 20, 0)] * 2
        # The batches take turns: the second does not wait for the end of the first.
        order = [bytes(request.prompt).decode().split(":")[1].strip() for request in engine.requests[5:]]
        assert "two" in order[:3]
        assert set(order[:12]) == set(names)


def test_no_line_can_push_in_front_of_who_waits(tmp_path: Path) -> None:
    with office(tmp_path) as found, found.client() as client:
        batch = ended(client, submit(client, line("a", priority=-(2**31) + 1), line("b", priority=2**31 - 1)).id)
        assert counts(batch) == (2, 2, 0)
        assert all(0 < request.priority < 2**31 for request in found.server.engine.requests)
        found.server.chat("me", priority=-(2**31) + 1)
        assert found.server.engine.requests[-1].priority == -(2**31) + 1


def test_cancelling_keeps_what_is_done(tmp_path: Path) -> None:
    with office(tmp_path) as found, found.client() as client:
        never = threading.Event()
        found.server.engine.choose = lambda request: Script() if b"quick" in bytes(request.prompt) else Script(hold=never)
        made = submit(client, *[line(f"q{number}", "quick") for number in range(3)], *[line(f"s{number}", "slow") for number in range(20)])
        eventually(lambda: counts(client.batches.retrieve(made.id)) == (23, 3, 0))
        assert client.batches.cancel(made.id).status in ("cancelling", "cancelled")
        batch = ended(client, made.id)
        assert (batch.status, counts(batch)) == ("cancelled", (23, 3, 0))
        assert all((batch.cancelling_at, batch.cancelled_at, batch.completed_at is None))
        assert set(answers(client, batch.output_file_id)) == {"q0", "q1", "q2"}
        eventually(found.server.is_idle)
        assert client.batches.cancel(made.id).status == "cancelled"
        done = ended(client, submit(client, line("a", "quick")).id)
        with pytest.raises(openai.BadRequestError):
            client.batches.cancel(done.id)


def test_a_batch_that_waits_for_its_turn_is_cancelled_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "MAX_ACTIVE", 1)
    with office(tmp_path) as found, found.client() as client:
        found.server.engine.script = Script(hold=threading.Event())
        first = submit(client, line("a"))
        eventually(lambda: found.server.engine.num_in_flight == 1)
        second = submit(client, line("b"))
        client.batches.cancel(second.id)
        assert ended(client, second.id).status == "cancelled"
        assert client.batches.retrieve(first.id).status == "in_progress"


def test_time_runs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "WINDOW_S", 1)
    with office(tmp_path) as found, found.client() as client:
        never = threading.Event()
        found.server.engine.choose = lambda request: Script() if b"quick" in bytes(request.prompt) else Script(hold=never)
        batch = ended(client, submit(client, line("a", "quick"), *[line(f"s{number}", "slow") for number in range(8)]).id)
        assert (batch.status, counts(batch)) == ("expired", (9, 1, 8))
        assert all((batch.expired_at, batch.completed_at is None))
        assert set(answers(client, batch.output_file_id)) == {"a"}
        late = answers(client, batch.error_file_id)
        assert {each["error"]["code"] for each in late.values()} == {"batch_expired"}
        assert {each["response"] for each in late.values()} == {None}


def test_a_restart_goes_on_where_it_was(tmp_path: Path) -> None:
    lines = [line(f"id-{number}", f"question {number}") for number in range(30)]
    with office(tmp_path) as first, first.client() as client:
        never = threading.Event()
        first.server.engine.choose = lambda request: Script(hold=never) if len(first.server.engine.requests) > 12 else Script()
        made = submit(client, *lines, line("bad", n=0))
        eventually(lambda: counts(client.batches.retrieve(made.id))[1] >= 8)
        waiting = submit(client, line("later"))
    (outputs,) = (tmp_path / "batches").glob(f"{made.id}.outputs")
    finished = {json.loads(each)["custom_id"] for each in outputs.read_bytes().splitlines()}
    assert 8 <= len(finished) < 30
    with outputs.open("ab") as torn:
        torn.write(b'{"id":"batch_req_1","custom_id":"id-29","resp')
    with office(tmp_path) as second, second.client() as client:
        batch = ended(client, made.id)
        assert (batch.status, counts(batch)) == ("completed", (31, 30, 1))
        assert set(answers(client, batch.output_file_id)) == {each["custom_id"] for each in lines}
        asked = [bytes(request.prompt).decode() for request in second.server.engine.requests]
        for custom_id in finished:
            assert f"user:question {custom_id.removeprefix('id-')}\n" not in asked
        assert counts(ended(client, waiting.id)) == (1, 1, 0)


@pytest.mark.parametrize("step", range(1, 6))
def test_a_restart_while_the_files_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Each step of the end is done again, whichever was the last before the crash: four write a description, the fifth never comes."""
    num_written = 0

    def write_whole(path: Path, data: bytes) -> None:
        nonlocal num_written
        num_written += 1
        if num_written >= step:
            raise asyncio.CancelledError
        disk_module.write_whole(path, data)

    with office(tmp_path) as first, first.client() as client:
        hold = threading.Event()
        first.server.engine.script = Script(hold=hold)
        made = submit(client, line("a"), line("bad", n=0))
        eventually(lambda: counts(client.batches.retrieve(made.id))[2] == 1)
        with monkeypatch.context() as patch:
            patch.setattr(batches_module, "write_whole", write_whole)
            patch.setattr(files_module, "write_whole", write_whole)
            hold.set()
            eventually(lambda: not first.desk.batches._running)
        assert num_written == min(step, 4)
        assert client.batches.retrieve(made.id).status == ("completed" if step >= 4 else "finalizing")
    with office(tmp_path) as second, second.client() as client:
        batch = ended(client, made.id)
        assert (batch.status, counts(batch)) == ("completed", (2, 1, 1))
        assert set(answers(client, batch.output_file_id)) == {"a"}
        assert set(answers(client, batch.error_file_id)) == {"bad"}
        assert not second.server.engine.requests
        assert {file.purpose for file in client.files.list()} == {"batch", "batch_output"}
        assert len(client.files.list().data) == 3


def test_a_full_disk_fails_the_batch_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with office(tmp_path) as found, found.client() as client:
        hold = threading.Event()
        found.server.engine.choose = lambda request: Script(hold=hold) if b"held" in bytes(request.prompt) else Script()
        made = submit(client, line("a"), line("b", "held"))
        eventually(lambda: counts(client.batches.retrieve(made.id)) == (2, 1, 0))

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr("service.jobs.disk.sync", full)
            hold.set()
            eventually(lambda: client.batches.retrieve(made.id).status == "failed")
            (failure,) = failures(client.batches.retrieve(made.id))
            assert failure.code == "storage_error"
            assert str(tmp_path) not in (failure.message or "")
            assert found.server.chat("me").status_code == 200
        assert counts(ended(client, submit(client, line("c")).id)) == (1, 1, 0)


def test_killed_in_the_middle(tmp_path: Path) -> None:
    """A real process, really killed; what it had on disk is not run again, and nothing is lost or doubled."""
    script = """
import asyncio, sys
from pathlib import Path
from service.jobs.batch import Outcome
from service.jobs.desk import open_desk

async def main():
    desk = open_desk(Path(sys.argv[1]), max_file_bytes=10**6, max_total_bytes=10**7, concurrency=4)
    async def execute(tenant, path, body):
        await asyncio.sleep(0.01)
        print("ran", flush=True)
        return Outcome(200, "req_1", b'{"ok":true}')
    desk.batches.start(execute)
    await asyncio.sleep(60)

asyncio.run(main())
"""
    lines = [line(f"id-{number}") for number in range(200)]
    with office(tmp_path, is_working=False) as found, found.client() as client:
        made = submit(client, *lines)
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout is not None
        for _ in range(60):
            assert process.stdout.readline() == b"ran\n"
        os.kill(process.pid, signal.SIGKILL)
    (outputs,) = (tmp_path / "batches").glob("*.outputs")
    whole = outputs.read_bytes().rpartition(b"\n")[0].splitlines()
    finished = {json.loads(each)["custom_id"] for each in whole}
    assert 40 <= len(finished) < 200
    with office(tmp_path) as found, found.client() as client:
        batch = ended(client, made.id)
        assert (batch.status, counts(batch)) == ("completed", (200, 200, 0))
        good = answers(client, batch.output_file_id)
        assert {name for name, answer in good.items() if answer["response"]["body"] == {"ok": True}} == finished
        assert len(found.server.engine.requests) == 200 - len(finished)


def test_tenants_are_apart(tmp_path: Path) -> None:
    with office(tmp_path, keys=KEYS) as found, found.client(KEYS[0]) as mine, found.client(KEYS[1]) as yours:
        made = submit(mine, line("a"))
        batch = ended(mine, made.id)
        assert [each.id for each in mine.batches.list()] == [made.id]
        assert not yours.batches.list().data
        for attempt in (yours.batches.retrieve, yours.batches.cancel, yours.files.content):
            with pytest.raises(openai.NotFoundError):
                attempt(batch.output_file_id if attempt == yours.files.content else made.id)  # type: ignore[arg-type, operator]
        with pytest.raises(openai.NotFoundError) as caught:
            yours.batches.create(input_file_id=made.input_file_id, endpoint=CHAT, completion_window="24h")
        assert caught.value.param == "input_file_id"
        # Its requests use the prefix cache of the one who sent it.
        mine.chat.completions.create(model="tiny/bytes", messages=[{"role": "user", "content": "x"}])
        tenants = {request.tenant for request in found.server.engine.requests}
        assert len(tenants) == 1


def test_lists(tmp_path: Path) -> None:
    with office(tmp_path) as found, found.client() as client:
        made = {submit(client, line("a")).id for _ in range(5)}
        first = client.batches.list(limit=3)
        assert (len(first.data), first.has_more) == (3, True)
        assert {batch.id for batch in client.batches.list(limit=2)} == made
        url = f"{found.server.url}/v1/batches"
        for query, param in (("limit=101", "limit"), ("after=x", "after")):
            assert check(httpx.get(f"{url}?{query}"), 400)["param"] == param
        for batch_id in made:
            ended(client, batch_id)


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"input_file_id": None}, "input_file_id"),
        ({"endpoint": "/v1/files"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after.seconds"),
    ],
)
def test_bad_input_names_the_field(server: Running, more: dict[str, Any], param: str) -> None:
    body = {"input_file_id": "file-x", "endpoint": CHAT, "completion_window": "24h", **more}
    assert check(server.post("/v1/batches", **body), 400)["param"] == param


def test_files_that_are_no_input_or_in_use(tmp_path: Path) -> None:
    with office(tmp_path, is_working=False) as found, found.client() as client:
        other = client.files.create(file=("a", jsonl(line("a"))), purpose="user_data")
        with pytest.raises(openai.BadRequestError) as caught:
            client.batches.create(input_file_id=other.id, endpoint=CHAT, completion_window="24h")
        assert caught.value.param == "input_file_id"
        made = submit(client, line("a"))
        with pytest.raises(openai.BadRequestError):
            client.files.delete(made.input_file_id)
        client.batches.cancel(made.id)


def test_cancel_takes_no_body_or_an_object(tmp_path: Path) -> None:
    with office(tmp_path, is_working=False) as found, found.client() as client:
        url = f"{found.server.url}/v1/batches/{submit(client, line('a')).id}/cancel"
        check(httpx.post(url, content=b"[", headers={"content-type": "application/json"}), 400)
        check(httpx.post(url, content=b"x"), 415)
        assert httpx.post(url, json={}).json()["status"] == "cancelling"


def test_output_files_expire_as_asked(tmp_path: Path) -> None:
    with office(tmp_path) as found, found.client() as client:
        batch = ended(client, submit(client, line("a"), output_expires_after={"anchor": "created_at", "seconds": 3600}).id)
        file = client.files.retrieve(batch.output_file_id or "")
        assert file.expires_at == file.created_at + 3600


def test_the_way_in_for_the_server_itself_is_closed_to_others(tmp_path: Path) -> None:
    with office(tmp_path, keys=KEYS) as found:
        for headers in ({"braid.insider": "1"}, {"x-braid-insider": "1"}, {"host": "localhost"}):
            answer = httpx.post(f"{found.server.url}{CHAT}", json={"messages": []}, headers=headers)
            assert answer.status_code == 401
