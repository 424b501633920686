"""The Grafana dashboard against the server's own metrics: every name and label that a panel asks for is one that the server shows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from service.engine.messages import Delivery, Event, LaneStats, ModelInfo, Usage
from service.metrics import Metrics
from tests.docker.test_image import ROOT

FOLDER = ROOT / "docker/grafana"
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "dashboards/braid.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
WANTED = (
    "request_success_total",
    "num_requests_running",
    "num_requests_waiting",
    "time_to_first_token_seconds_bucket",
    "inter_token_latency_seconds_bucket",
    "e2e_request_latency_seconds_bucket",
    "prompt_tokens_total",
    "generation_tokens_total",
    "kv_cache_usage_perc",
    "prefix_cache_hits_total",
    "prefix_cache_queries_total",
    "num_preemptions_total",
    "kernel_compiles_total",
    "graph_misses_total",
    "request_queue_time_seconds_bucket",
    "iteration_tokens_total_bucket",
    "http_requests_total",
    "engine_ready",
    "picture_seconds_bucket",
    "picture_work_seconds_bucket",
    "picture_failures_total",
    "time_to_first_preview_seconds_bucket",
)


def expressions() -> Iterator[str]:
    for panel in PANELS:
        yield from (target["expr"] for target in panel["targets"])


def shown() -> dict[str, set[str]]:
    """Labels by name of sample, of a server that has answered a request and refused one."""
    metrics = Metrics("braid", ["tiny"])
    stats = LaneStats("tiny", 1, 0, 1, 0, 8, 0, 3, 2, 3, 0, 1)
    info = ModelInfo("tiny", 64, 100, "float32", 1000, 128, 8, 16)
    metrics.watch_engine(stats=lambda: {"tiny": stats}, models=lambda: {"tiny": info}, is_ready=lambda: True, has_prefix_cache=True)
    metrics.begin("r1", "tiny", arrival=0.0, num_choices=1, max_tokens=2)
    usage = Usage(3, 0, 2, 0.0, 0.1, 0.1)
    events = [Event("r1", 0, [5]), Event("r1", 0, [6], finish="length", usage=usage)]
    metrics.on_delivery(Delivery(events=events, stats=[stats], step_tokens=3, step_s=0.1))
    for request_id, finish in (("p1", "stop"), ("p2", "error")):
        metrics.begin_picture(request_id, "tiny", "draw")
        metrics.on_delivery(Delivery(events=[Event(request_id, 0, [], finish=finish, usage=usage)], stats=[]))
    metrics.drawn("tiny", 0.0)
    metrics.previewed("tiny", 0.0)
    metrics.reject("tiny", "requests")
    metrics.count_http("POST", "/v1/chat/completions", 200)
    found: dict[str, set[str]] = {}
    for family in metrics.registry.collect():
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


SHOWN = shown()


def test_every_metric_of_a_panel_is_one_of_the_server() -> None:
    asked = {name for expression in expressions() for name in re.findall(r"braid:\w+", expression)}
    assert {f"braid:{name}" for name in WANTED} <= asked
    assert asked <= set(SHOWN), f"not shown by the server: {sorted(asked - set(SHOWN))}"


@pytest.mark.parametrize("expression", sorted(set(expressions())))
def test_labels_exist(expression: str) -> None:
    """What selects, and what is summed by, is a label of the metric."""
    for name, selector in re.findall(r"(braid:\w+)(\{[^}]*\})?", expression):
        labels = set(re.findall(r"(\w+)(?==~|!~|!=|=)", selector))
        labels |= {label for group in re.findall(r"by \(([\w, ]+)\)", expression) for label in group.split(", ")}
        assert labels <= SHOWN[name]


@pytest.mark.parametrize("expression", sorted(set(expressions())))
def test_expression_is_well_formed(expression: str) -> None:
    for opening, closing in ("()", "[]", "{}"):
        assert expression.count(opening) == expression.count(closing)
    for name, rest in re.findall(r"(braid:\w+)([^)]*)", expression):
        grows = name.endswith(("_total", "_bucket", "_sum", "_count"))
        assert ("[$__rate_interval]" in rest) == grows, "a counter is read as a rate, a gauge is not"
    assert ("histogram_quantile" in expression) == ("_bucket" in expression)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: f"{panel['id']}-{panel['title']}")
def test_panel_says_what_it_shows_and_asks_for_something(panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert panel["description"]
    assert panel["targets"]
    assert all(target["expr"].strip() and target["legendFormat"] for target in panel["targets"])
    letters = [target["refId"] for target in panel["targets"]]
    assert len(set(letters)) == len(letters)


def test_panels_have_places_of_their_own() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)


def test_one_data_source_everywhere() -> None:
    (source,) = yaml.safe_load((FOLDER / "provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    used = re.findall(r'"datasource": (\{[^}]*\})', json.dumps(DASHBOARD))
    assert used
    assert {(json.loads(each)["type"], json.loads(each)["uid"]) for each in used} == {(source["type"], source["uid"])}


def test_variables_in_use_are_declared() -> None:
    declared = {each["name"] for each in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$(\w+)", " ".join(expressions()))) - {"__rate_interval"}
    assert used == declared
