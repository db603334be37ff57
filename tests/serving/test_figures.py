"""What the server exports, and that the dashboard asks for nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from served import Running

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = DEPLOY / "grafana" / "sliplm.json"


@pytest.fixture(scope="module")
def exported(running: Running) -> dict[str, Metric]:
    """All families, after a request and a refusal."""
    server, keys = running.server, running.keys
    body = {"model": "tiny", "prompt": "a", "max_tokens": 4, "temperature": 0}
    assert server.post("/completions", body, keys["bob"]).status_code == 200
    assert server.post("/completions", body, "nobody").status_code == 401
    text = server.get("/metrics", keys["graph"]).text
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(exported: dict[str, Metric], family: str, **labels: str) -> float:
    found = [s.value for s in exported[f"sliplm:{family}"].samples if labels.items() <= s.labels.items()]
    assert found, (family, labels)
    return sum(found)


def test_what_is_counted(exported: dict[str, Metric]) -> None:
    assert value(exported, "generation_tokens", model_name="tiny") >= 4
    assert value(exported, "prompt_tokens", model_name="tiny") >= 1
    for family in (
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "e2e_request_latency_seconds",
    ):
        assert value(exported, family, model_name="tiny") > 0
    assert value(exported, "num_requests_running") == value(exported, "num_requests_waiting") == 0
    served = value(exported, "exchanges", kind="served")
    assert value(exported, "worker_exchanges", role="worker") == served > 0
    for direction in ("sent", "received"):
        assert value(exported, "wire_bytes", direction=direction) > 0
    for stage in ("vault", "burn", "check", "worker", "link", "dealing"):
        assert value(exported, "stage_seconds", stage=stage) > 0
    assert value(exported, "rows", kind="dealt") >= value(exported, "rows", kind="all") > 0
    assert value(exported, "mask_stock_rows") >= value(exported, "mask_stock_rows_min") >= 0
    assert value(exported, "failed_checks") == value(exported, "quarantines") == 0


def test_the_dashboard_asks_for_what_is_exported(exported: dict[str, Metric]) -> None:
    """Each series, each label and each value of a label that it names."""
    names: dict[str, Metric] = {}
    for family in exported.values():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"]}
        names |= {family.name + suffix: family for suffix in suffixes.get(family.type, [""])}
    asked = 0
    for query in queries(json.loads(DASHBOARD.read_text(encoding="utf-8"))):
        series = re.findall(r"(sliplm:\w+)(?:\{([^}]*)\})?", query)
        assert series, query
        for name, matchers in series:
            assert name in names, name
            asked += 1
            labels: dict[str, set[str]] = {}
            for sample in names[name].samples:
                for label, found in sample.labels.items():
                    labels.setdefault(label, set()).add(found)
            for label, pattern in re.findall(r'(\w+)=~?"([^"]*)"', matchers):
                assert label in labels, (name, label)
                if pattern != "$model":
                    assert set(pattern.split("|")) <= labels[label], (name, pattern)
            for grouped in re.findall(r"by \(([^)]*)\)", query):
                assert set(grouped.split(", ")) <= set(labels), (name, grouped)
    assert asked > 30


def queries(dashboard: Any) -> list[str]:
    found = [t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", ())]
    return found + [v["definition"] for v in dashboard["templating"]["list"] if "definition" in v]


def test_the_files_beside_it_hold_together() -> None:
    """What the compose file mounts is there, and Prometheus scrapes the vault that the other one starts."""
    files = {path.name: yaml.safe_load(path.read_text()) for path in DEPLOY.glob("*.yaml")}
    watch, base = files["compose.watch.yaml"], files["compose.yaml"]
    for service in watch["services"].values():
        for volume in service["volumes"]:
            place = volume.partition(":")[0]
            if place.startswith("./") and not place.startswith("./tls/"):
                assert (DEPLOY / place).exists(), place
        assert set(service["secrets"]) <= set(watch["secrets"])
        assert set(service["depends_on"]) <= {*watch["services"], *base["services"]}
    [job] = files["prometheus.yaml"]["scrape_configs"]
    [target] = job["static_configs"][0]["targets"]
    host, port = target.split(":")
    assert host in base["services"]
    assert any(option.endswith(f":{port}") for option in base["services"][host]["command"])
    [source] = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    assert source["url"].removeprefix("http://").split(":")[0] in watch["services"]
