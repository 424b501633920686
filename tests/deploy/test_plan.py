"""What a person tells `braid deploy`, and the file it makes of that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from service import cli
from service.deploy.plan import Plan, plan_of, read_replicas, serve_arguments, serve_config
from service.errors import StartupError


def deploy(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, ["deploy", *arguments], terminal_width=200)


@pytest.mark.parametrize(("text", "found"), [("4", (4, 4)), ("1:8", (1, 8)), ("1:1", (1, 1))])
def test_replicas_are_a_number_or_a_range(text: str, found: tuple[int, int]) -> None:
    assert read_replicas(text) == found


@pytest.mark.parametrize("text", ["", "0", "0:4", "4:1", "-1", "1:2:3", "a", "1:", ":1", "1e3", "1.5"])
def test_other_words_for_replicas_are_refused(text: str) -> None:
    with pytest.raises(StartupError, match="--replicas"):
        read_replicas(text)


def test_replicas_get_what_the_deployment_knows() -> None:
    plan = Plan((), high=4, cpus=2.0, host="0.0.0.0")
    assert serve_arguments(["m"], ["--memory", "1GiB"], plan) == (
        *("m", "--memory", "1GiB", "--data-dir", "off", "--threads", "2", "--allowed-host", "*"),
    )
    assert serve_arguments([], ["--threads=8"], Plan((), high=1)) == ("--threads=8",)
    assert serve_arguments([], [], Plan((), high=2, gpus=1.0)) == ("--data-dir", "off")


@pytest.mark.parametrize("flags", [["--port", "1"], ["--host=::"], ["--data-dir", "/x"]])
def test_flags_that_cannot_be_a_replicas_are_refused(flags: list[str]) -> None:
    with pytest.raises(StartupError, match=flags[0].partition("=")[0]):
        serve_arguments([], flags, Plan((), high=2))


def test_a_plan_survives_its_file() -> None:
    plan = Plan(("m", "--memory", "1GiB"), low=2, high=9, gpus=0.5, port=81)
    config = json.loads(json.dumps(serve_config(plan)))
    assert plan_of(config["applications"][0]["args"]) == plan
    assert config["http_options"] == {"host": "127.0.0.1", "port": 81}
    with pytest.raises(StartupError, match="replicsa"):
        plan_of({"serve": [], "replicsa": 1})


def test_the_command_writes_the_file_and_runs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "braid.yaml"
    result = deploy("--model", "braid-nano", "--replicas", "1:4", "--write", str(path), "--", "--memory", "1GiB")
    assert (result.exit_code, result.output) == (0, "")
    config = yaml.safe_load(path.read_text())
    (application,) = config["applications"]
    assert application["import_path"] == "service.deploy.cluster:build"
    assert application["args"]["serve"][:3] == ["braid-nano", "--memory", "1GiB"]
    assert (application["args"]["low"], application["args"]["high"]) == (1, 4)
    assert deploy("--model", "braid-nano", "--write", "-").output.startswith("proxy_location:")


def test_a_flag_that_no_replica_would_take_is_told_at_once() -> None:
    result = deploy("--write", "-", "--", "--memry", "1GiB")
    assert result.exit_code == 2
    assert "--memry" in result.output


def test_without_ray_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    monkeypatch.delitem(__import__("sys").modules, "service.deploy.cluster", raising=False)
    result = deploy("--model", "braid-nano")
    assert result.exit_code == 1
    assert "braid[ray]" in result.output
