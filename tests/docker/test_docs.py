"""docs/operations.md, docs/security.md and docs/errors.md against the code: settings, metrics, limits and samples are what they say."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from service.api import json_bounds, schema, schema_chat, schema_tools
from service.api.auth import PUBLIC_PATHS
from service.api.body import MAX_TOTAL_BYTES, BodyLimits
from service.api.connection import TimedConnection
from service.api.envelope import MAX_HEADER_BYTES, MAX_HEADERS
from service.cli import main as braid
from service.codec.template import MOST_OUTPUT_CHARS
from service.engine.messages import MAX_CHOICES
from service.errors import BraidError, StartupError
from service.settings import ENVIRONMENT_PREFIX, Settings
from tests.docker.test_compose import SERVICES
from tests.docker.test_dashboard import SHOWN
from tests.docker.test_image import ROOT, last

OPERATIONS = (ROOT / "docs/operations.md").read_text()
SECURITY = (ROOT / "docs/security.md").read_text()
ERRORS = (ROOT / "docs/errors.md").read_text()


def samples(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", OPERATIONS, re.DOTALL)


def serve_command() -> click.Command:
    assert isinstance(braid, click.Group)
    return braid.commands["serve"]


def test_every_setting_stands_in_the_table() -> None:
    rows = re.findall(rf"^\| `(.+?)` \| `{ENVIRONMENT_PREFIX}_(\w+)` \|", OPERATIONS, re.MULTILINE)
    documented = {variable.lower(): flag for flag, variable in rows}
    options = {str(each.name): each for each in serve_command().params if each.expose_value}
    assert set(documented) == set(options)
    for name, flag in documented.items():
        if flag.startswith("--"):
            assert flag in (*options[name].opts, *options[name].secondary_opts)


def test_defaults_in_the_table_are_the_defaults() -> None:
    shown = dict(re.findall(rf"^\| `.+?` \| `{ENVIRONMENT_PREFIX}_(\w+)` \| `([^`]+)`", OPERATIONS, re.MULTILINE))
    assert len(shown) > 8
    for variable, default in shown.items():
        value = getattr(Settings(), variable.lower())
        usual = {"20MiB": 20 * 2**20, "32MiB": 32 * 2**20, "200MiB": 200 * 2**20, "4GiB": 4 * 2**30, "8GiB": 8 * 2**30}.get(
            default, default
        )
        assert str(usual) in (
            str(value),
            f"{value:g}" if isinstance(value, float) else value[0] if isinstance(value, tuple) else str(value),
        )


def test_settings_file_of_the_docs_is_accepted(tmp_path: Path) -> None:
    (sample,) = samples("toml")
    file = tmp_path / "braid.toml"
    file.write_text(sample)
    context = serve_command().make_context("serve", ["--config", str(file)])
    for name, value in tomllib.loads(sample).items():
        usual = {"4GiB": 4 * 2**30}.get(value, value) if isinstance(value, str) else value
        found = context.params[name]
        assert (list(found) if isinstance(found, tuple) else found) == usual


def test_every_metric_stands_in_the_table() -> None:
    table = OPERATIONS[OPERATIONS.index("## Metrics") : OPERATIONS.index("## Logs")]
    rows = re.findall(r"^\| (`.+?) \| (gauge|counter|histogram) \|", table, re.MULTILINE)
    documented = {name for names, _ in rows for name in re.findall(r"`(\w+)`", names)}
    families = {re.sub(r"_(bucket|sum|count|created)$", "", name.removeprefix("braid:")) for name in SHOWN}
    # prometheus_client also shows when each counter began, under the counter's name without its ending.
    families -= {name.removesuffix("_total") for name in families if name.endswith("_total")} - documented
    assert documented == families


def test_kubernetes_sample_fits_the_image() -> None:
    pod: dict[str, Any] = next(found["spec"] for found in map(yaml.safe_load, samples("yaml")) if "spec" in found)
    (container,) = pod["containers"]
    port = int(last("cpu", "EXPOSE"))
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] in PUBLIC_PATHS
        assert container[probe]["httpGet"]["port"] == port
    assert container["volumeMounts"][0]["mountPath"] in last("cpu", "VOLUME")
    assert str(pod["securityContext"]["fsGroup"]) == last("cpu", "USER").partition(":")[2]
    assert pod["terminationGracePeriodSeconds"] > Settings().drain_timeout_s
    known = {f"{ENVIRONMENT_PREFIX}_{option.name}".upper() for option in serve_command().params}
    assert {each["name"] for each in container["env"]} <= known


def test_ports_of_the_compose_file_are_the_documented_ones() -> None:
    for service, port in (("braid", 8000), ("prometheus", 9090), ("grafana", 3000)):
        assert SERVICES[service]["ports"] == [f"127.0.0.1:{port}:{port}"]
        assert str(port) in OPERATIONS


@pytest.mark.parametrize(
    ("row", "limits"),
    [
        ("request body", [Settings().max_body_bytes >> 20]),
        ("bodies that are being read, together", [MAX_TOTAL_BYTES >> 20]),
        (
            "commas in a body; colons; brackets that open a list or an object",
            [json_bounds.MAX_VALUES, json_bounds.MAX_KEYS, json_bounds.MAX_CONTAINERS],
        ),
        ("nesting of a body", [json_bounds.MAX_DEPTH]),
        ("fields of one object", [schema.MAX_FIELDS]),
        ("bytes of a header; its fields", [MAX_HEADER_BYTES, MAX_HEADERS]),
        ("rest of a body that has been answered", [TimedConnection.linger_s]),
        ("parts of all messages together", [schema_chat.MAX_TOTAL_PARTS]),
        ("tools of a request", [schema_tools.MAX_TOOLS]),
        ("pause within a body; the whole body", [BodyLimits().idle_s, BodyLimits().total_s]),
        ("request header", [TimedConnection.header_s]),
        ("client that does not read its answer", [TimedConnection.write_s]),
        ("messages; parts of a message", [schema.MAX_MESSAGES, schema.MAX_PARTS]),
        ("prompts of a completion; choices of a request", [schema.MAX_PROMPTS, MAX_CHOICES]),
        ("requests in flight", [Settings().max_queue_requests]),
        ("tokens in flight", [Settings().max_queue_tokens]),
        ("text that a chat template writes", [MOST_OUTPUT_CHARS]),
    ],
)
def test_limits_are_those_of_the_code(row: str, limits: list[float]) -> None:
    (cell,) = re.findall(rf"^\| {re.escape(row)} \| ([^|]+) \|", ERRORS, re.MULTILINE)
    assert [float(number.replace(",", "")) for number in re.findall(r"(?<![\w-])\d[\d,]*", cell)] == [float(limit) for limit in limits]


@pytest.mark.parametrize(("field", "limit"), [("stop", 64), ("logit_bias", 4096), ("stop_token_ids", 128), ("timeout", 86_400)])
def test_limits_of_fields(field: str, limit: int) -> None:
    described = schema_chat.ChatRequest.model_json_schema()["properties"][field]
    branches = [described, *described.get("anyOf", [])]
    assert limit in [each.get(key) for each in branches for key in ("maxItems", "maxProperties", "maximum")]


def errors_below(kind: type[BraidError]) -> set[type[BraidError]]:
    return {kind}.union(*map(errors_below, kind.__subclasses__())) - {StartupError, *StartupError.__subclasses__()}


def test_every_error_stands_in_the_table() -> None:
    rows = re.findall(r"^\| (\d{3}) \| `(\w+)` \|([^|]*)\| [^|]+ \| (yes|no) \|$", ERRORS, re.MULTILINE)
    assert {(int(status), kind) for status, kind, _, _ in rows} == {(error.status, error.type) for error in errors_below(BraidError)}
    for error in errors_below(BraidError):
        found = [(codes, retry) for status, kind, codes, retry in rows if (int(status), kind) == (error.status, error.type)]
        assert error.code is None or any(f"`{error.code}`" in codes for codes, _ in found), error
        assert {retry for _, retry in found} == {"yes" if error.retry else "no"}, error


def test_open_paths_are_the_documented_ones() -> None:
    sentence = SECURITY[SECURITY.index("every path needs one") : SECURITY.index("are open")]
    assert set(re.findall(r"`(/\w+)`", sentence)) == PUBLIC_PATHS
