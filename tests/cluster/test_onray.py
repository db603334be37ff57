"""A Ray cluster of two nodes on this machine, of which one dies in mid-work."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import families
import sliplm
from sliplm.cli import app
from sliplm.cluster import onray
from sliplm.cluster.onray import executor
from sliplm.cluster.tasks import in_order
from sliplm.engines.transformers.plan import make_plan
from sliplm.engines.writing import write_split
from sliplm.errors import ClusterError, RecipeError, SlipWarning
from sliplm.masks.maskfile import NAME
from sliplm.shares.recipe import Recipe
from sliplm.shares.splitter import Splitter

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
ray: Any = pytest.importorskip("ray", reason="Ray is not installed: make test-cluster")
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own

from ray.cluster_utils import Cluster

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # what its processes cannot import

MEMORY = 100 << 20
LIMIT = 60.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    made = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": MEMORY},
    )
    yield made
    made.shutdown()


@pytest.fixture(autouse=True)
def two_nodes(cluster: Any) -> None:
    """A second one, where the last test has killed it."""
    while len(cluster.list_all_nodes()) < 2:
        cluster.add_node(num_cpus=1, object_store_memory=MEMORY)
    cluster.wait_for_nodes()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.make_with_tokenizer(
        "llama", tmp_path_factory.mktemp("ray") / "model", num_hidden_layers=2
    )


def wait_then_hang(marker: Path) -> None:
    """In the first process that comes here, on the second node: say where, and go no further."""
    node = ray.get_runtime_context().get_node_id()
    there = {n["NodeID"]: n["Resources"] for n in ray.nodes() if n["Alive"]}
    if "node:__internal_head__" not in there[node] and not marker.exists():
        marker.write_text(node)
        while True:
            time.sleep(1)  # until it is killed


def hanging(marker: Path) -> Splitter:
    wait_then_hang(marker)
    return Splitter("cpu")


class Killer(threading.Thread):
    """Kills the second node once a task hangs on it."""

    def __init__(self, cluster: Any, marker: Path) -> None:
        super().__init__()
        self.cluster, self.marker, self.killed = cluster, marker, False

    def run(self) -> None:
        until = time.monotonic() + LIMIT
        while not self.marker.exists() and time.monotonic() < until:
            time.sleep(0.05)
        if self.marker.exists():
            [node] = [n for n in self.cluster.list_all_nodes() if n is not self.cluster.head_node]
            self.cluster.remove_node(node, allow_graceful=False)
            self.killed = True


def text_of(out: Path, **options: Any) -> list[int]:
    with sliplm.open(out, **options) as opened:
        asked = torch.tensor([[72, 101, 108]])
        found: list[int] = opened.generate(asked, max_new_tokens=8, do_sample=False)[0].tolist()
        return found


@pytest.fixture(scope="module")
def alone(model: Path) -> list[int]:
    """The text of a split that was made without a cluster."""
    sliplm.split(model, model.parent / "alone", i_know=True)
    return text_of(model.parent / "alone")


def test_a_node_dies_and_the_split_is_whole(
    cluster: Any, model: Path, alone: list[int], tmp_path: Path
) -> None:
    out, marker = tmp_path / "out", tmp_path / "marker"
    killer = Killer(cluster, marker)
    killer.start()
    with executor(cluster.address) as there:
        write_split(
            make_plan(model, Recipe()), out, None, lambda *_: None, i_know=True, executor=there,
            splitter=partial(hanging, marker),
        )  # fmt: skip
    killer.join()
    assert killer.killed
    assert sorted(path.name for path in out.iterdir()) == ["vault", "worker"]
    assert CliRunner().invoke(app, ["inspect", str(out)]).exit_code == 0
    assert text_of(out) == alone


def test_masks_are_dealt_on_all_nodes(cluster: Any, model: Path, alone: list[int], tmp_path: Path) -> None:
    """Each is checked here, and none is there twice."""
    out, pool = model.parent / "alone", tmp_path / "pool"
    given = ["deal", str(out / "vault"), str(pool), "--tokens", "20", "--ray", cluster.address]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    assert "masks for 20 tokens are ready" in done.output
    ids = [name[3] for path in pool.rglob("*.masks") if (name := NAME.fullmatch(path.name))]
    assert ids and len(set(ids)) == len(ids)
    assert text_of(out, pool=pool) == alone


def test_a_campaign_runs_there(cluster: Any, model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 40)
    given = [
        *(
            "attack",
            str(model),
            str(tmp_path / "out"),
            "--text",
            str(text),
            "--window",
            "16",
            "--held-out",
            "4",
        ),
        *("--placement", "0-0", "--access", "logits", "--budget", "1%", "--seeds", "2", "--only", "default"),
        *("--attack", "3", "--jobs", "2", "--ray", cluster.address),
    ]
    done = CliRunner().invoke(app, given)
    assert done.exception is None, done.output
    rows = (tmp_path / "out" / "runs.jsonl").read_text().splitlines()
    assert len(rows) == len(set(rows)) > 2  # the driver alone has written them


def fail(_: None, number: int) -> int:
    import warnings

    warnings.warn("as the task says", SlipWarning, stacklevel=1)
    if number == 2:
        raise RecipeError("two is too much")
    return number


def test_errors_and_warnings_of_tasks_are_those_of_the_work(cluster: Any) -> None:
    with executor(cluster.address) as there, there.pool(lambda: None, fail) as pool:
        assert pool.width == 2
        values = in_order(pool, (1, 2, 3))
        with pytest.warns(SlipWarning, match="as the task says"):
            assert next(values) == 1
        with pytest.raises(RecipeError, match="two is too much"):
            list(values)


def test_one_cluster_at_a_time_and_cards_where_there_are_some(cluster: Any) -> None:
    with pytest.raises(ClusterError, match="no machine left with a card"), executor(cluster.address, cards=1):
        pass
    with executor(cluster.address):
        with pytest.raises(ClusterError, match="already"), executor(cluster.address):
            pass


def test_what_is_no_cluster_is_told_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onray, "_STATUS_SECONDS", 2.0)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ClusterError, match="is no Ray cluster"), executor(address):
            pass
