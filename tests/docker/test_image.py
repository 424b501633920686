"""The Dockerfile, linted and read: what an image of it would run, as whom, and what would lie in it. Builds nothing."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
from dockerfile_parse import DockerfileParser

from service.cli import main as braid

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "Dockerfile"
TARGETS = ("cpu", "cuda")


def instructions() -> list[tuple[str, str]]:
    with DOCKERFILE.open("rb") as file:
        return [(each["instruction"], each["value"]) for each in DockerfileParser(fileobj=file).structure]


def stages() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """By name: what the stage is from, and its own instructions."""
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    name = ""
    for instruction, value in instructions():
        if instruction == "FROM":
            base, _, name = value.partition(" AS ")
            found[name] = (base, [])
        elif name:
            found[name][1].append((instruction, value))
    return found


def effective(target: str) -> list[tuple[str, str]]:
    """A stage's instructions after those of the stages that it is built upon."""
    base, own = stages()[target]
    return [*(effective(base) if base in stages() else []), *own]


def last(target: str, instruction: str) -> str:
    return [value for name, value in effective(target) if name == instruction][-1]


def test_linter_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, "--no-color", str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_foreign_base_names_its_exact_version() -> None:
    bases = {base for base, _ in stages().values()} - set(stages())
    assert bases
    for base in bases:
        assert re.fullmatch(r"python:\d+\.\d+\.\d+(-slim)?-[a-z]+", base), base


def test_both_targets_exist_and_cpu_is_the_default() -> None:
    assert set(TARGETS) <= set(stages())
    assert list(stages())[-1] == "cpu"


@pytest.mark.parametrize("target", TARGETS)
class TestTarget:
    def test_runs_as_nobody_in_particular(self, target: str) -> None:
        # By number: Kubernetes cannot tell from a name that it isn't root.
        user, _, group = last(target, "USER").partition(":")
        assert int(user) > 0
        assert int(group) > 0
        assert effective(target)[-1][0] == "USER", "whatever follows USER would run with other rights than the server"
        assert f"useradd --uid {user} " in " ".join(value for name, value in effective(target) if name == "RUN")

    def test_entrypoint_is_a_valid_braid_serve(self, target: str) -> None:
        words = json.loads(last(target, "ENTRYPOINT"))
        assert words[:2] == ["braid", "serve"]
        assert isinstance(braid, click.Group)
        context = braid.commands["serve"].make_context("serve", words[2:])
        assert context.params["host"] == "0.0.0.0"
        assert str(context.params["port"]) == last(target, "EXPOSE")

    def test_health_check_runs_a_file_of_the_image(self, target: str) -> None:
        flags, _, command = last(target, "HEALTHCHECK").partition("CMD ")
        assert "--start-period=" in flags
        program, script = json.loads(command)
        assert program == "python"
        source, destination = next(value.split() for name, value in effective(target) if name == "COPY")
        assert script == destination
        assert (ROOT / source).is_file()

    def test_stops_as_the_server_expects(self, target: str) -> None:
        assert last(target, "STOPSIGNAL") == "SIGTERM"

    def test_caches_lie_in_the_volume(self, target: str) -> None:
        (volume,) = json.loads(last(target, "VOLUME"))
        values = dict(pair.split("=", 1) for name, value in effective(target) if name == "ENV" for pair in shlex.split(value))
        assert values["BRAID_CACHE"] == volume
        assert all(values[name].startswith(volume) for name in ("BRAID_DATA_DIR", "HF_HOME", "TRITON_CACHE_DIR"))

    def test_installs_once_with_the_torch_that_make_installs(self, target: str) -> None:
        installs = [value for name, value in effective(target) if name == "RUN" and "pip install" in value]
        assert len(installs) == 1
        assert '"torch==$TORCH"' in installs[0]
        pinned = dict(value.split("=", 1) for name, value in instructions() if name == "ARG" and "=" in value)
        assert f"TORCH ?= {pinned['TORCH']}\n" in (ROOT / "Makefile").read_text()
        assert not json.loads(pinned["TORCH_INDEX_URL"])

    def test_holds_no_cxx_compiler(self, target: str) -> None:
        base, _ = stages()["runtime"]
        assert "-slim-" in base
        assert not re.search(r"g\+\+|build-essential|clang", " ".join(value for name, value in effective(target) if name == "RUN"))


def test_no_secret_is_baked_in() -> None:
    for instruction, value in instructions():
        if instruction in ("ARG", "ENV"):
            assert not re.search(r"(?i)token|secret|password|api_?key", value), f"{instruction} {value}"


def admitted() -> list[str]:
    lines = [line.strip() for line in (ROOT / ".dockerignore").read_text().splitlines()]
    assert next(line for line in lines if line and not line.startswith("#")) == "*", "all is left out but what is named"
    return [line[1:] for line in lines if line.startswith("!")]


def test_context_holds_what_the_package_is_built_from() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = project["tool"]["setuptools"]["packages"]["find"]["include"]
    for folder in (path.name for path in ROOT.iterdir() if (path / "__init__.py").is_file() and path.name != "tests"):
        assert any(fnmatch.fnmatch(folder, pattern) for pattern in wanted), folder
        assert folder in admitted()
    files = {"pyproject.toml", "setup.py", project["project"]["readme"], *project["project"]["license-files"]}
    assert files <= set(admitted())
    for _, value in [each for each in stages()["runtime"][1] if each[0] == "COPY"]:
        assert value.split()[0] in admitted()


def test_context_leaves_out_everything_else() -> None:
    for name in (".git", ".venv", "tests", ".env", "docs"):
        assert name not in admitted()
