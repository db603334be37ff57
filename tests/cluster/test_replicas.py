"""Two replicas on a Ray cluster of two nodes on this machine; one is killed in mid-work, and a node dies."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest
from typer.testing import CliRunner

from rogues import serving
from served import Model, Running, model
from server import LIMIT, Paced, slip_serve, until
from sliplm.cli import app
from sliplm.cluster import onserve
from sliplm.errors import ClusterError
from sliplm.parties.chain import verify
from sliplm.serving import clients
from sliplm.shares.share import open_worker

pytest.importorskip("grpc", reason="Ray Serve is not installed: make test-cluster")

__all__ = ["model"]

PROMPT, MOST = "The vault", 40
ASKED = len(PROMPT) + MOST  # tokens: its tokenizer has bytes
BUDGET = 10 * ASKED
PEOPLE = ("alice", "bob", "carol", "dave", "erin", "frank")
CLUSTER = """
import sys
from ray.cluster_utils import Cluster
options = {"num_cpus": 1, "object_store_memory": 100 << 20}
made = Cluster(initialize_head=True, head_node_args={**options, "include_dashboard": False})
node = made.add_node(**options)
made.wait_for_nodes()
print(made.address, flush=True)
for line in sys.stdin:
    if line == "kill\\n":
        made.remove_node(node, allow_graceful=False)
    else:
        node = made.add_node(**options)
made.shutdown()
"""


class Nodes(NamedTuple):
    """A cluster of two."""

    address: str
    process: subprocess.Popen[str]

    def tell(self, what: str) -> None:
        """Kill the second one, or add another."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    """In a process of its own: Ray asks for a token there, and in other tests not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        with subprocess.Popen(
            [sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdin is not None and process.stdout is not None
            try:
                yield Nodes(process.stdout.readline().strip(), process)
            finally:
                process.stdin.close()
                process.wait(LIMIT)


@pytest.fixture(scope="module")
def group(model: Model, cluster: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("group")
    people = folder / "clients"
    keys = {name: clients.add(people, name, budget=BUDGET) for name in PEOPLE}
    keys |= {name: clients.add(people, name) for name in ("grace", "heidi")}
    keys["graph"] = clients.add(people, "graph", watch=True, ask=False)
    worker = Paced(open_worker(model.out / "worker"))
    with serving(worker, folder / "w") as address:
        options = [
            "--clients",
            str(people),
            "--replicas",
            "2",
            "--ray",
            cluster.address,
            "--cache-tokens",
            "2048",
        ]
        with slip_serve(model.out, folder, *options, workers=[address]) as server:
            yield Running(server, worker, folder, keys)


def ask(group: Running, name: str, most: int = MOST, **more: Any) -> Any:
    client = group.server.client(group.keys[name])
    return client.completions.create(model="tiny", prompt=PROMPT, max_tokens=most, temperature=0, **more)


def text(group: Running, name: str, **more: Any) -> str:
    return "".join(chunk.choices[0].text for chunk in ask(group, name, stream=True, **more))


def lines(group: Running, event: str) -> list[dict[str, Any]]:
    found = map(json.loads, (group.folder / "clients" / "audit.jsonl").read_text().splitlines())
    return [line for line in found if line["event"] == event]


def homes(group: Running) -> dict[str, set[str]]:
    """The replicas that let in requests of each client."""
    found: dict[str, set[str]] = {}
    for line in lines(group, "begun"):
        found.setdefault(line["address"], set()).add(line["detail"]["replica"])
    return found


def used(group: Running, name: str) -> int:
    """What a client has had, as the audit record says."""
    taken = {}
    for event in ("begun", "asked"):  # the second in the place of the first
        for line in lines(group, event):
            if line["address"] == name:
                taken[line["detail"]["request"]] = line["detail"]["charged"]
    return sum(taken.values())


def process_of(replica: str) -> int:
    """Of our cluster, which our token shows."""
    token, name = os.environ["RAY_AUTH_TOKEN"].encode(), b"ray::ServeReplica:sliplm-"
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes()
            ours = title.startswith(name) and token in (folder / "environ").read_bytes()
            if ours and title.split(b":")[3].endswith(b"-" + replica.encode()):
                return int(folder.name)
        except OSError:
            continue
    raise AssertionError(f"there is no replica {replica}")


def test_answers_are_those_of_undisturbed_runs_and_each_client_keeps_to_one(
    model: Model, group: Running
) -> None:
    truth = model.text(PROMPT, MOST)
    with ThreadPoolExecutor(len(PEOPLE) * 2) as pool:
        whole = [pool.submit(ask, group, name) for name in PEOPLE]
        streamed = [pool.submit(text, group, name) for name in PEOPLE]
    assert {each.result().choices[0].text for each in whole} == {truth}
    assert {each.result() for each in streamed} == {truth}
    found = homes(group)
    assert set(found) >= set(PEOPLE)
    assert all(len(replicas) == 1 for replicas in found.values())
    assert set.union(*found.values()) == {"0", "1"}
    answered = {line["detail"]["request"] for line in lines(group, "asked")}
    assert answered == {each.result().id.removeprefix("cmpl-") for each in whole} | {
        line["detail"]["request"] for line in lines(group, "begun")
    }


def test_figures_have_their_replica(group: Running) -> None:
    shown = group.server.get("/metrics", group.keys["graph"]).text
    for name in ("0", "1"):
        assert f'sliplm:replica_up{{model_name="tiny",replica="{name}"}} 1.0' in shown
        assert f'sliplm:generation_tokens_total{{model_name="tiny",replica="{name}"}}' in shown
    assert group.server.get("/metrics").status_code == 401
    assert group.server.get("/metrics", group.keys["alice"]).status_code == 403
    assert group.server.get("/ready").json() == {"status": "ok", "replicas": {"0": "ok", "1": "ok"}}
    assert group.server.get("/console").status_code == 200
    assert group.server.post("/completions", b" " * (3 << 20), group.keys["alice"]).status_code == 413


def test_who_hangs_up_is_computed_no_further(group: Running) -> None:
    group.worker.pause = 0.02
    try:
        stream = ask(group, "grace", 400, stream=True)
        next(stream)
        stream.close()
        until(lambda: any(line["address"] == "grace" for line in lines(group, "asked")))
    finally:
        group.worker.pause = 0.0
    [ended] = [line for line in lines(group, "asked") if line["address"] == "grace"]
    assert ended["reason"] == "given up"
    assert ended["detail"]["generated"] < 400


def test_a_key_that_is_taken_back_ends_a_stream_and_opens_nothing(group: Running) -> None:
    group.worker.pause = 0.02
    try:
        stream = ask(group, "heidi", 400, stream=True)
        next(stream)
        clients.revoke(group.folder / "clients", "heidi")
        with pytest.raises(openai.APIError, match="taken back"):
            list(stream)
    finally:
        group.worker.pause = 0.0

    def refused() -> bool:
        try:
            ask(group, "heidi", 1)
        except openai.AuthenticationError:
            return True
        return False

    until(refused)


def test_one_is_killed_in_mid_work(model: Model, group: Running) -> None:
    """Its requests fail, and are counted; those of the other go on; budgets hold wherever a client goes."""
    server, truth, home = group.server, model.text(PROMPT, MOST), homes(group)
    mine = next(name for name in PEOPLE if home[name] == {"0"})
    other = next(name for name in PEOPLE if home[name] == {"1"})
    before = used(group, mine)
    group.worker.pause = 0.01
    with ThreadPoolExecutor(1) as pool:
        lost, kept = ask(group, mine, stream=True), ask(group, other, stream=True)
        pieces = [next(lost).choices[0].text], [next(kept).choices[0].text]
        begun = len(lines(group, "begun"))
        whole = pool.submit(ask, group, mine)
        until(lambda: len(lines(group, "begun")) == begun + 1)
        os.kill(process_of("0"), signal.SIGKILL)
        with pytest.raises(openai.APIError, match="was lost"):
            pieces[0].extend(chunk.choices[0].text for chunk in lost)
        with pytest.raises(openai.InternalServerError, match="was lost") as said:
            whole.result()
        assert said.value.status_code == 503
        pieces[1].extend(chunk.choices[0].text for chunk in kept)
    group.worker.pause = 0.0
    assert truth.startswith("".join(pieces[0]))
    assert "".join(pieces[1]) == truth
    until(lambda: server.get("/health").json()["replicas"]["0"] == "down")
    assert server.get("/health").status_code == 200

    # at the other one he has had all that: what was lost counts with what it might have taken, and once
    assert used(group, mine) == before + 2 * ASKED
    left = BUDGET - used(group, mine)
    with pytest.raises(openai.RateLimitError, match=f"has {left} tokens left"):
        ask(group, mine, left - len(PROMPT) + 1)
    assert ask(group, mine).choices[0].text == truth
    assert homes(group)[mine] == {"0", "1"}

    until(lambda: server.get("/ready").json()["replicas"]["0"] == "ok")
    left -= ASKED
    with pytest.raises(openai.RateLimitError, match=f"has {left} tokens left"):
        ask(group, mine, left - len(PROMPT) + 1)
    assert text(group, mine) == truth  # at home again
    last = [line for line in lines(group, "begun") if line["address"] == mine][-1]
    assert last["detail"]["replica"] == "0"
    head, _ = verify(group.folder / "clients" / "audit.jsonl")
    assert head.broken is None
    assert "Traceback" not in server.log


def test_a_machine_dies_and_another_comes(model: Model, group: Running, cluster: Nodes) -> None:
    """Until then the other replica serves all."""
    server, truth = group.server, model.text(PROMPT, 3)

    def state() -> list[str]:
        return sorted(server.get("/ready").json()["replicas"].values())

    cluster.tell("kill")
    until(lambda: state() == ["down", "ok"])
    assert {ask(group, name, 3).choices[0].text for name in PEOPLE} == {truth}
    cluster.tell("add")
    until(lambda: state() == ["ok", "ok"])
    assert {ask(group, name, 3).choices[0].text for name in PEOPLE} == {truth}


def busiest_below(short: str) -> int:
    """Of the worker processes whose sockets lie in a folder the one that has computed most."""
    spent = {}
    for each in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if f"shm:{short}/".encode() in (each / "cmdline").read_bytes():
                fields = (each / "stat").read_text().rpartition(")")[2].split()
                spent[int(each.name)] = int(fields[11]) + int(fields[12])
    assert len(spent) == 2
    return max(spent, key=lambda pid: spent[pid])


def test_without_a_cluster_this_machine_has_one_until_the_end(model: Model, tmp_path: Path) -> None:
    """And without clients whoever has least to do answers."""
    with tempfile.TemporaryDirectory(prefix="s") as short, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", short)  # paths of sockets have 107 characters
        with slip_serve(model.out, tmp_path, "--replicas", "2") as server:
            asked = [
                server.client().completions.create(model="tiny", prompt=PROMPT, max_tokens=3, temperature=0)
                for _ in range(2)
            ]
            assert {each.choices[0].text for each in asked} == {model.text(PROMPT, 3)}
            [folder] = [each.parent for each in Path(short).glob("sliplm-*/ray")]
            assert folder.stat().st_mode & 0o077 == 0
            assert (folder / ".alive").exists()  # so that the next one removes it after a kill -9
            for how in ("POST /health", "CONNECT /ready", "PUT /metrics"):
                with server.connect() as sock:
                    sock.sendall(f"{how} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                    assert sock.recv(12) == b"HTTP/1.1 405"
            assert "Traceback" not in server.log

            def served() -> bool:
                """Greedily, and right; or not at all, by one whose worker is gone."""
                try:
                    again = server.client().completions.create(
                        model="tiny", prompt=PROMPT, max_tokens=3, temperature=0
                    )
                except openai.InternalServerError:  # 503
                    return False
                assert again.choices[0].text == model.text(PROMPT, 3)
                return True

            os.kill(busiest_below(short), signal.SIGKILL)  # of who is asked first; the other serves all
            until(served)
            assert all(served() for _ in range(3))
        assert not any(Path(short).glob("sliplm-*/ray"))


def test_what_cannot_be_is_told(model: Model, cluster: Nodes, tmp_path: Path) -> None:
    def told(*options: str) -> str:
        done = CliRunner().invoke(app, ["serve", str(model.out), "--listen", "127.0.0.1:0", *options])
        assert done.exit_code != 0
        return " ".join(f"{done.output} {done.exception}".split())

    assert "cannot share a pool" in told("--replicas", "2", "--pool", str(tmp_path))
    assert "nobody can be asked for a passphrase" in told("--replicas", "2", "--key", "passphrase")
    assert "greater than or equal to 1" in told("--replicas", "0")
    assert "HOST:PORT" in told("--ray", "ray://head:1")
    command = [sys.executable, "-m", "sliplm", "serve", str(model.out), "--listen", "127.0.0.1:0"]
    done = subprocess.run(
        [*command, "--replicas", "3", "--ray", cluster.address], check=False,
        capture_output=True, text=True, timeout=LIMIT,
    )  # fmt: skip
    assert "no room for 3 replicas" in " ".join(done.stderr.split())


def test_a_cluster_without_a_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with pytest.raises(ClusterError, match="RAY_AUTH_MODE=token"):
        onserve._check(onserve.release())
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    onserve._check(onserve.release())
    with pytest.raises(ClusterError, match=r"not 9\.9"):
        onserve._check("9.9")
