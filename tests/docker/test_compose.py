"""docker/compose.yaml and what it mounts: images, ports, health, and that each piece finds the other. Starts nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from service.cli import main as braid
from service.settings import ENVIRONMENT_PREFIX, Settings
from tests.docker.test_image import DOCKERFILE, ROOT, instructions, last, stages

FOLDER = ROOT / "docker"
COMPOSE = FOLDER / "compose.yaml"
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE.read_text())["services"]


def mounts(service: str) -> dict[str, str]:
    """Source by target."""
    return {target: source for source, target, *_ in (each.split(":") for each in SERVICES[service]["volumes"])}


def test_compose_itself_accepts_it() -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("docker compose is not installed")
    done = subprocess.run([docker, "compose", "--file", str(COMPOSE), "config", "--quiet"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", SERVICES)
class TestService:
    def test_image_is_pinned_or_ours(self, name: str) -> None:
        service = SERVICES[name]
        if "image" in service:
            assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+", service["image"])
        else:
            assert (COMPOSE.parent / service["build"]["context"] / "Dockerfile").resolve() == DOCKERFILE

    def test_ports_are_for_this_machine_only(self, name: str) -> None:
        assert SERVICES[name]["ports"]
        assert all(re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port) for port in SERVICES[name]["ports"])

    def test_says_how_it_is(self, name: str) -> None:
        if "build" in SERVICES[name]:
            assert last("cpu", "HEALTHCHECK").startswith("--")
            return
        words = SERVICES[name]["healthcheck"]["test"]
        port = SERVICES[name]["ports"][0].rpartition(":")[2]
        assert words[0] == "CMD"
        assert any(f"127.0.0.1:{port}" in word for word in words)

    def test_may_do_no_more_than_it_needs(self, name: str) -> None:
        assert SERVICES[name]["cap_drop"] == ["ALL"]
        assert SERVICES[name]["security_opt"] == ["no-new-privileges:true"]
        assert "privileged" not in SERVICES[name]

    def test_waits_for_what_it_needs_until_that_is_healthy(self, name: str) -> None:
        for other, condition in SERVICES[name].get("depends_on", {}).items():
            assert other in SERVICES
            assert condition == {"condition": "service_healthy"}

    def test_mounted_files_exist_and_volumes_are_declared(self, name: str) -> None:
        declared = yaml.safe_load(COMPOSE.read_text())["volumes"]
        for source in mounts(name).values():
            assert (FOLDER / source).exists() if source.startswith("./") else source in declared


def test_chain_of_waiting_is_whole() -> None:
    assert set(SERVICES["grafana"]["depends_on"]) == {"prometheus"}
    assert set(SERVICES["prometheus"]["depends_on"]) == {"braid"}


def test_build_asks_for_a_target_and_arguments_that_exist() -> None:
    build = SERVICES["braid"]["build"]
    default = re.fullmatch(r"\$\{BRAID_TARGET:-(\w+)\}", build["target"])
    assert default is not None
    assert default[1] in stages()
    known = {value.partition("=")[0] for name, value in instructions() if name == "ARG"}
    assert set(build["args"]) <= known


def test_environment_names_are_settings() -> None:
    """A misspelt variable would be passed on and ignored."""
    serve = braid.commands["serve"] if isinstance(braid, click.Group) else braid
    known = {f"{ENVIRONMENT_PREFIX}_{option.name}".upper() for option in serve.params}
    passed = {name for name in SERVICES["braid"]["environment"] if name.startswith(ENVIRONMENT_PREFIX)}
    assert passed
    assert passed <= known
    assert not {"BRAID_HOST", "BRAID_PORT"} & passed, "the container's own address is fixed; the published one is under ports"


def test_no_value_is_written_down_that_should_be_secret() -> None:
    assert all("=" not in name for name in SERVICES["braid"]["environment"])
    assert not [name for name in SERVICES["grafana"]["environment"] if "PASSWORD" in name]


def test_weights_are_kept_where_the_image_looks_for_them() -> None:
    assert f'["{next(iter(mounts("braid")))}"]' == last("cpu", "VOLUME")


def test_stopping_leaves_time_to_drain() -> None:
    assert int(SERVICES["braid"]["stop_grace_period"].removesuffix("s")) > Settings().drain_timeout_s


def test_prometheus_scrapes_the_service() -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    assert (
        f"--config.file={next(target for target, source in mounts('prometheus').items() if source == './prometheus.yml')}"
        in SERVICES["prometheus"]["command"]
    )
    (job,) = config["scrape_configs"]
    assert job["metrics_path"] == "/metrics"
    assert job["static_configs"] == [{"targets": [f"braid:{last('cpu', 'EXPOSE')}"]}]


def test_provisioned_paths_are_mounted() -> None:
    mounted = mounts("grafana")
    assert mounted["/etc/grafana/provisioning"] == "./grafana/provisioning"
    (provider,) = yaml.safe_load((FOLDER / "grafana/provisioning/dashboards/braid.yaml").read_text())["providers"]
    folder = FOLDER / mounted[provider["options"]["path"]]
    assert list(folder.glob("*.json"))
    home = Path(SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (folder / home.name).is_file()
    assert str(home.parent) == provider["options"]["path"]


def test_data_source_is_the_prometheus_of_this_file() -> None:
    (source,) = yaml.safe_load((FOLDER / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    port = SERVICES["prometheus"]["ports"][0].rpartition(":")[2]
    assert source["url"] == f"http://prometheus:{port}"
    interval = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == interval
