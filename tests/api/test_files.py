"""Files by the official SDK: brought, listed in pages, fetched whole and deleted; limits; tenants apart; names that are never paths."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from service.jobs import files as files_module
from service.jobs.desk import open_desk
from service.jobs.files import FileStore
from tests.api.desks import LIMITS, Office, office
from tests.api.fakes import Running
from tests.api.test_openapi import check as check_form
from tests.api.test_validation import check

KEYS = ("first-key-123", "second-key-456")
DATA = "häppy\n".encode() * 100


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Office]:
    with office(tmp_path / "data") as found:
        yield found


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Office]:
    """For tests that leave nothing behind."""
    with office(tmp_path_factory.mktemp("common")) as found:
        yield found


def bring(client: openai.OpenAI, data: bytes = DATA, name: str = "a.jsonl", purpose: str = "batch") -> str:
    return client.files.create(file=(name, data), purpose=purpose).id  # type: ignore[arg-type]


def test_a_files_life(desk: Office, tmp_path: Path) -> None:
    with desk.client() as client:
        made = client.files.create(file=("notes.txt", DATA), purpose="user_data")
        assert (made.object, made.bytes, made.filename, made.purpose, made.status) == (
            "file",
            len(DATA),
            "notes.txt",
            "user_data",
            "processed",
        )
        assert made.expires_at is None
        assert client.files.retrieve(made.id) == made
        check_form(httpx.get(f"{desk.server.url}/v1/files/{made.id}").json(), "File")
        check_form(httpx.get(f"{desk.server.url}/v1/files").json(), "FilePage")
        assert client.files.content(made.id).read() == DATA
        headers = httpx.get(f"{desk.server.url}/v1/files/{made.id}/content").headers
        assert (headers["content-type"], headers["x-content-type-options"]) == ("application/octet-stream", "nosniff")
        assert headers["content-disposition"] == "attachment"
        assert httpx.head(f"{desk.server.url}/v1/files/{made.id}/content").headers["content-length"] == str(len(DATA))
        assert client.files.delete(made.id).deleted
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(made.id)
        assert not list((tmp_path / "data" / "files").iterdir())


@pytest.mark.parametrize(
    ("asked", "status", "got"),
    [
        ("bytes=0-3", 206, DATA[:4]),
        ("bytes=-4", 206, DATA[-4:]),
        ("bytes=600-", 206, DATA[600:]),
        (f"bytes={len(DATA)}-", 416, b""),
        *((odd, 200, DATA) for odd in ("bytes=abc", "bytes=5-2", "bytes=-", "bytes=0-0,0-0", "lines=1-2", "bytes=\u0663-", "")),
    ],
)
def test_a_stretch_of_a_file(common: Office, asked: str, status: int, got: bytes) -> None:
    with common.client() as client:
        file_id = bring(client)
        answer = httpx.get(f"{common.server.url}/v1/files/{file_id}/content", headers={"range": asked.encode()})  # type: ignore[arg-type]
        assert (answer.status_code, answer.content) == (status, got)
        client.files.delete(file_id)


def test_fields_of_a_form_that_are_ignored_are_told(common: Office) -> None:
    data = {"purpose": "batch", "expires_after": '{"anchor": "created_at", "seconds": 3600}', "col our": "1"}
    answer = httpx.post(f"{common.server.url}/v1/files", files={"file": ("a", b"x")}, data=data)
    assert answer.json()["warnings"] == ["unknown field 'expires_after' was ignored", "unknown field 'col?our' was ignored"]
    assert "expires_after" in answer.headers["x-braid-warnings"]
    with common.client() as client:
        client.files.delete(answer.json()["id"])


def test_pages(desk: Office) -> None:
    with desk.client() as client:
        ids = [bring(client) for _ in range(5)]
        other = bring(client, purpose="vision")
        newest = [file.id for file in client.files.list()]
        assert set(newest) == {*ids, other}
        assert [file.id for file in client.files.list(order="asc")] == newest[::-1]
        assert [file.id for file in client.files.list(purpose="vision")] == [other]
        first = client.files.list(limit=4)
        assert (len(first.data), first.has_more) == (4, True)
        rest = client.files.list(limit=4, after=first.data[-1].id)
        assert (len(rest.data), rest.has_more) == (2, False)
        assert [file.id for file in client.files.list(limit=2)] == newest  # the SDK walks through the pages
    for query, param in (
        ("limit=0", "limit"),
        ("limit=x", "limit"),
        ("order=up", "order"),
        ("after=file-1", "after"),
        ("purpose=x", "purpose"),
    ):
        assert check(httpx.get(f"{desk.server.url}/v1/files?{query}"), 400)["param"] == param


def test_files_outlive_the_server_and_their_names_are_data(tmp_path: Path) -> None:
    name = '../../etc/passwd\n"<x>\x00'
    with office(tmp_path / "data") as first, first.client() as client:
        made = client.files.retrieve(bring(client, name=name))
        before = {path.name for path in (tmp_path / "data").rglob("*")}
        assert all(made.id in path or path in ("files", "batches", "lock") for path in before)
    assert "/" in made.filename
    assert all(char.isprintable() for char in made.filename)
    with office(tmp_path / "data") as second, second.client() as client:
        assert client.files.retrieve(made.id) == made
        assert client.files.content(made.id).read() == DATA
    for path in (tmp_path / "data").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


@pytest.mark.parametrize("file_id", ["file-" + "0" * 32, "..%2ffiles", "..%2f..%2fetc%2fpasswd", "file-x", "%00", "file-" + "0" * 5000])
def test_ids_that_are_none(common: Office, file_id: str) -> None:
    for path in (f"/v1/files/{file_id}", f"/v1/files/{file_id}/content"):
        assert httpx.get(common.server.url + path).status_code == 404
    assert httpx.delete(f"{common.server.url}/v1/files/{file_id}").status_code == 404


def test_tenants_are_apart(tmp_path: Path) -> None:
    with office(tmp_path / "data", keys=KEYS) as found, found.client(KEYS[0]) as mine, found.client(KEYS[1]) as yours:
        file_id = bring(mine)
        assert [file.id for file in mine.files.list()] == [file_id]
        assert not yours.files.list().data
        for attempt in (yours.files.retrieve, yours.files.content, yours.files.delete):
            with pytest.raises(openai.NotFoundError):
                attempt(file_id)
        assert mine.files.retrieve(file_id).id == file_id
        assert httpx.get(f"{found.server.url}/v1/files").status_code == 401
    stored = b"".join(path.read_bytes() for path in (tmp_path / "data").rglob("*.json"))
    assert not any(key.encode() in stored for key in KEYS)


@pytest.mark.parametrize(
    ("parts", "param"),
    [
        ({"data": {"purpose": "batch"}}, "file"),
        ({"files": {"file": ("a", b"x")}}, "purpose"),
        ({"files": {"file": ("a", b"x")}, "data": {"purpose": "fun"}}, "purpose"),
        ({"files": {"other": ("a", b"x")}, "data": {"file": "text", "purpose": "batch"}}, "file"),
        ({"files": {"file": ("a", b"x")}, "data": {"purpose": "batch", "expires_after[anchor]": "now"}}, "expires_after.anchor"),
        (
            {
                "files": {"file": ("a", b"x")},
                "data": {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "5"},
            },
            "expires_after.seconds",
        ),
    ],
)
def test_bad_forms_name_the_field(common: Office, parts: dict[str, dict[str, object]], param: str) -> None:
    parts.setdefault("files", {"nothing": ("b", b"")})
    assert check(httpx.post(f"{common.server.url}/v1/files", **parts), 400)["param"] == param  # type: ignore[arg-type]


def test_forms_that_are_none(common: Office) -> None:
    url = f"{common.server.url}/v1/files"
    check(httpx.post(url, json={"purpose": "batch"}), 415)
    broken = {"content-type": "multipart/form-data; boundary=x"}
    for body in (b"", b"--y\r\n", b'--x\r\ncontent-disposition: form-data; name="file"\r\n\r\nabc', b"\xff" * 1000):
        check(httpx.post(url, content=body, headers=broken), 400)
    check(httpx.post(url, content=b"x", headers={"content-type": "multipart/form-data"}), 400)
    many = [("file", (f"{number}", b"x")) for number in range(50)]
    check(httpx.post(url, files=many, data={"purpose": "batch"}), 400)
    check(httpx.post(url, files={"file": ("a", b"x")}, data={"purpose": "b" * 100_000}), 400)
    assert not common.desk.files.of_tenant("")


@pytest.mark.parametrize("is_told", [True, False])
def test_too_large_a_body(common: Office, is_told: bool) -> None:
    data = b"x" * (1 << 20)
    form = b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n' + data + b"\r\n--x--\r\n"
    content = form if is_told else (form[start : start + 65536] for start in range(0, len(form), 65536))
    answer = httpx.post(f"{common.server.url}/v1/files", content=content, headers={"content-type": "multipart/form-data; boundary=x"})
    assert check(answer, 413)["param"] == "file"


def test_too_large_a_file_in_a_body_that_is_not(common: Office) -> None:
    answer = httpx.post(f"{common.server.url}/v1/files", files={"file": ("a", b"x" * 100_001)}, data={"purpose": "batch"})
    assert check(answer, 413)["param"] == "file"
    assert not common.desk.files.of_tenant("")


def test_there_is_room_for_so_much(desk: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    with desk.client() as client:
        with monkeypatch.context() as patch:
            patch.setattr(files_module, "MAX_FILES", 0)
            with pytest.raises(openai.InternalServerError) as caught:
                bring(client, b"x")
            assert caught.value.code == "storage_full"
        ids = [bring(client, b"x" * 100_000) for _ in range(4)]
        with pytest.raises(openai.InternalServerError) as caught:
            bring(client, b"x")
        assert (caught.value.status_code, caught.value.code) == (507, "storage_full")
        assert caught.value.response.headers["x-should-retry"] == "false"
        client.files.delete(ids[0])
        bring(client, b"x")


def test_a_full_disk(desk: Office, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path))

    with desk.client() as client:
        kept = bring(client)
        with monkeypatch.context() as patch:
            patch.setattr(files_module, "sync", full)
            with pytest.raises(openai.InternalServerError) as caught:
                bring(client)
        assert caught.value.status_code == 507
        assert "No space left" in caught.value.message
        assert str(tmp_path) not in caught.value.message
        assert [file.id for file in client.files.list()] == [kept]
        assert len(list((tmp_path / "data" / "files").iterdir())) == 2
        bring(client)


def test_expiry(tmp_path: Path) -> None:
    now = 1_000_000.0
    store = FileStore(tmp_path, max_file_bytes=1000, max_total_bytes=1000, clock=lambda: now)
    with open(__file__, "rb") as source:
        source.seek(0, os.SEEK_END)
        file = store.create(source, tenant="", filename="a", purpose="batch", lifetime_s=3600)
    assert file.expires_at == 1_003_600
    assert store.of_tenant("") == [file]
    now += 3600
    assert not store.of_tenant("")
    assert not list(tmp_path.iterdir())


def test_expiry_is_asked_for_by_the_sdk(desk: Office) -> None:
    with desk.client() as client:
        made = client.files.create(file=("a", b"x"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600})
        assert made.expires_at == made.created_at + 3600


def test_what_a_crash_leaves_is_cleared_away(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "files"
    with office(tmp_path / "data") as found, found.client() as client:
        kept, torn = bring(client), bring(client)
    (folder / f"{torn}.json").write_text("{", encoding="utf-8")
    (folder / ("file-" + "1" * 32 + ".data")).write_bytes(b"orphan")
    (folder / ("file-" + "2" * 32 + ".tmp")).write_bytes(b"half")
    (folder / ("file-" + "3" * 32 + ".json")).write_text(
        json.dumps({"id": "file-" + "4" * 32, "tenant": "", "filename": "", "purpose": "batch", "bytes": 1, "created_at": 1}),
        encoding="utf-8",
    )
    with office(tmp_path / "data") as found, found.client() as client:
        assert [file.id for file in client.files.list()] == [kept]
        assert client.files.content(kept).read() == DATA
    assert not list(folder.glob("*.tmp"))
    assert [path.stem for path in folder.glob("*.data")] == [kept]


def test_one_server_a_folder_and_folders_that_cannot_be(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with office(tmp_path / "data"):
        assert open_desk(tmp_path / "data", **LIMITS) is None
        assert "another server" in caplog.text
    (tmp_path / "file").write_bytes(b"")
    assert open_desk(tmp_path / "file" / "data", **LIMITS) is None
    assert "can't be used" in caplog.text


def test_a_server_without_a_folder(server: Running) -> None:
    answers = [
        httpx.get(f"{server.url}/v1/files"),
        httpx.get(f"{server.url}/v1/batches"),
        httpx.post(f"{server.url}/v1/files", files={"file": ("a", b"x")}, data={"purpose": "batch"}),
        server.post("/v1/batches", input_file_id="file-1", endpoint="/v1/completions", completion_window="24h"),
    ]
    for answer in answers:
        assert check(answer, 400)["code"] == "unsupported_operation"
