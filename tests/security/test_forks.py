"""Forked children: whatever they try with their parent's vault is refused at once; their own vault works."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import sliplm
from families import make
from ledger import Ledger
from sliplm import forks
from sliplm.arithmetic.field import Elements
from sliplm.errors import ForkError
from sliplm.masks import masks
from sliplm.masks.maskpool import MaskPool
from sliplm.parties.local_products import LocalProducts
from sliplm.parties.local_worker import LocalWorker
from sliplm.parties.terms import Terms
from sliplm.parties.vault import Vault
from sliplm.shares.share import VaultShare, WorkerShare, open_vault, open_worker

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # newer Pythons warn of fork beside threads

LIMIT = 60.0  # seconds after which a child counts as hanging
ROWS = 32  # enough that the vault's arithmetic uses its threads

Shares = tuple[VaultShare, WorkerShare]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("forks")
    sliplm.split(make("llama", base / "model"), base / "out")
    return base / "out"


@pytest.fixture(scope="module")
def shares(folder: Path) -> Shares:
    return open_vault(folder / "vault"), open_worker(folder / "worker")


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with LocalWorker(folder / "worker") as worker:
        yield worker.address


@pytest.fixture
def vault(shares: Shares, address: str) -> Iterator[Vault]:
    """A vault in the midst of its work: its threads, connection and masks are there."""
    with Vault(shares[0], Terms([address], shares[1], ahead=8)) as made:
        made.product(made.groups[0], inputs(shares))
        yield made


def inputs(shares: Shares) -> np.ndarray:
    n = next(iter(shares[0].groups.values())).n
    return np.random.default_rng(1).standard_normal((ROWS, n)).astype(np.float32)


def in_child(act: Callable[[], object], fork: Callable[[], int] = os.fork) -> str:
    """What comes of an act in a forked child: "ForkError", "done", another error's name, or "hung"."""
    outcomes = ["done", "ForkError", "other"]
    child = fork()
    if child == 0:
        code = 2
        try:
            act()
            code = 0
        except ForkError:
            code = 1
        finally:
            os._exit(code)
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return outcomes[os.waitstatus_to_exitcode(status)]
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hung"


def bare_fork() -> int:
    """fork without Python's hooks, as a C library does it; the GIL is held across it.

    No thread may have asked for the GIL by then: Python would wait for it in the child, where it is not.
    """
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e3)
    time.sleep(0.05)  # whoever waits with the old interval is served
    try:
        return ctypes.PyDLL(None).fork()
    finally:
        sys.setswitchinterval(interval)


def acts(vault: Vault, x: np.ndarray) -> dict[str, Callable[[], object]]:
    group = vault.groups[0]
    link = vault._workers.links[0]
    return {
        "product of many rows": lambda: vault.product(group, x),
        "product of one row": lambda: vault.product(group, x[:1]),
        "deal": lambda: vault.deal(4),
        "take": lambda: vault._supply.take(0, 1),
        "memory": lambda: vault.mask_bytes(),
        "wait": lambda: vault.wait_dealt(LIMIT),
        "link": link.open,
        "workers": lambda: vault.workers,
        "drain": lambda: vault.drain(link.address),
        "rejoin": lambda: vault.rejoin(link.address),
    }


@pytest.mark.parametrize("fork", [os.fork, bare_fork], ids=["fork", "bare fork"])
def test_a_child_is_refused_whatever_it_tries(
    vault: Vault, shares: Shares, fork: Callable[[], int], ledger: Ledger
) -> None:
    x = inputs(shares)
    outcomes = {name: in_child(act, fork) for name, act in acts(vault, x).items()}
    ledger.record(
        "forks: a child uses its parent's vault",
        len(outcomes),
        sum(outcome == "ForkError" for outcome in outcomes.values()),
        sum(outcome == "done" for outcome in outcomes.values()),
    )
    assert set(outcomes.values()) == {"ForkError"}, outcomes
    assert in_child(vault.close, fork) == "done", "closing in a child does nothing"
    expected = LocalProducts(*shares).product(vault.groups[0], x)
    assert np.array_equal(vault.product(vault.groups[0], x), expected), "the parent goes on"
    assert vault.counters.retries == 0


def test_locks_held_at_the_fork_hang_nobody(vault: Vault, shares: Shares, ledger: Ledger) -> None:
    """Another thread holds each lock of the vault while the process forks."""
    x, link, pool = inputs(shares), vault._workers.links[0], vault._supply.memory
    locks = [
        link._lock,
        pool._change,
        vault._workers._lock,
        vault.counters._lock,
        vault.audit._lock,
    ]
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        for lock in locks:
            lock.acquire()
        held.set()
        done.wait(10 * LIMIT)
        for lock in locks:
            lock.release()

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert held.wait(LIMIT)
        outcomes = [in_child(act) for act in acts(vault, x).values()]
        closed = in_child(vault.close)
    finally:
        done.set()
        thread.join()
    ledger.record(
        "forks: with every lock held", len(outcomes), outcomes.count("ForkError"), outcomes.count("done")
    )
    assert set(outcomes) == {"ForkError"}
    assert closed == "done"


def test_a_child_that_loads_its_own_vault_works(vault: Vault, shares: Shares, address: str) -> None:
    """And so does its own child's, which is refused that one in turn."""
    x = inputs(shares)
    expected = LocalProducts(*shares).product(vault.groups[0], x)

    def load() -> None:
        with Vault(shares[0], Terms([address], shares[1], ahead=4)) as own:
            if not np.array_equal(own.product(own.groups[0], x), expected):
                raise ValueError
            if in_child(lambda: own.product(own.groups[0], x)) != "ForkError":
                raise ValueError

    assert in_child(load) == "done"


NESTED = """
import ctypes, os, sys
import numpy as np
from sliplm.errors import ForkError
from sliplm.masks import masks
from sliplm.masks.maskpool import MaskPool

libc = ctypes.PyDLL(None, use_errno=True)

def apart():
    if libc.unshare(0x20000000):  # CLONE_NEWPID: the next child is number 1
        sys.exit(77)

pool = None

def inner():
    apart()
    if (libc.fork() if sys.argv[1] == "bare" else os.fork()) == 0:
        try:
            pool.take(0, 1)
        except ForkError:
            os._exit(10 + os.getpid())
        os._exit(1)
    os._exit(os.waitstatus_to_exitcode(os.wait()[1]))

dealt = lambda fresh: masks.Dealt(fresh()[1])
pool = MaskPool(1, lambda g, rows, *_: masks.deal(g, 8, rows, dealt, b""), 0)
pool.add([0], 4)
assert os.getpid() == 1
inner()
"""


@pytest.mark.parametrize("kind", ["bare", "hooked"])
def test_a_child_with_its_parents_number_is_refused(kind: str, ledger: Ledger) -> None:
    """Parent and child are both number 1, each in a PID namespace of its own."""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("unshare is not installed")
    apart = [unshare, "--user", "--map-root-user", "--pid", "--fork"]
    if subprocess.run([*apart, "true"], capture_output=True, check=False).returncode:
        pytest.skip("the kernel lets nobody make a PID namespace here")
    done = subprocess.run(
        [*apart, sys.executable, "-c", NESTED, kind], capture_output=True, timeout=LIMIT, check=False
    )
    if done.returncode == 77:
        pytest.skip("the kernel lets nobody nest PID namespaces here")
    ledger.record("forks: a child with its parent's number", 1, done.returncode == 11, done.returncode == 1)
    assert done.returncode == 11, done.stderr.decode()


def test_a_whole_model_is_refused_in_a_child(folder: Path, address: str, ledger: Ledger) -> None:
    """torch's own threads, which a child has not, are not waited for: the forward is refused before them."""
    model = sliplm.load(folder / "vault", [address], ahead=0)
    ids = torch.arange(3, 3 + 512).remainder(90).reshape(8, 64)
    with contextlib.closing(model.slip), torch.no_grad():
        model(ids)
        calls = [lambda: model(ids), lambda: model.generate(ids, max_new_tokens=2, do_sample=False)]
        found = [in_child(call) for call in calls]
    ledger.record("forks: a whole model", 2, found.count("ForkError"), 2 - found.count("ForkError"))
    assert found == ["ForkError"] * 2


def test_the_kernel_wipes_the_page() -> None:
    """The token is gone in a child that no hook has seen."""
    mine = forks.token()
    assert in_child(lambda: None if forks._page[:16] == bytes(16) else 1 / 0, bare_fork) == "done"
    assert forks.token() == mine


class Through(Dataset[torch.Tensor]):
    """A dataset whose items go through the vault."""

    def __init__(self, vault: Vault, x: np.ndarray) -> None:
        self.vault, self.x = vault, x

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.vault.product(self.vault.groups[0], self.x))


def test_a_loader_of_data_is_refused(vault: Vault, shares: Shares, ledger: Ledger) -> None:
    refused = 0
    loader = DataLoader(
        Through(vault, inputs(shares)), num_workers=2, timeout=LIMIT, multiprocessing_context="fork"
    )
    try:
        list(loader)
    except ForkError:
        refused = 1
    ledger.record("forks: workers of a DataLoader", 1, refused, 1 - refused)
    assert refused


def serve(folder: Path, address: str, x: np.ndarray, queue: multiprocessing.Queue[np.ndarray]) -> None:
    """What a server's process does: load, and answer."""
    torch.set_num_threads(1)
    shares = open_vault(folder / "vault"), open_worker(folder / "worker")
    with Vault(shares[0], Terms([address], shares[1], ahead=4)) as own:
        queue.put(own.product(own.groups[0], x))


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_processes_that_load_for_themselves_work(
    vault: Vault, folder: Path, shares: Shares, address: str, method: str
) -> None:
    context, x = multiprocessing.get_context(method), inputs(shares)
    queue = context.Queue()
    process = context.Process(target=serve, args=(folder, address, x, queue))
    process.start()
    try:
        answer = queue.get(timeout=3 * LIMIT)
    finally:
        process.join(LIMIT)
    assert process.exitcode == 0
    assert np.array_equal(answer, LocalProducts(*shares).product(vault.groups[0], x))


def ask() -> None:
    """A request in a server's process that was forked after the load."""
    vault, x = KEPT[0]
    vault.product(vault.groups[0], x)


KEPT: list[tuple[Vault, np.ndarray]] = []


def test_a_prefork_server_is_told(vault: Vault, shares: Shares, ledger: Ledger) -> None:
    """Loaded before the fork: each of its processes gets an error that says where to load."""
    KEPT[:] = [(vault, inputs(shares))]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        asked = [pool.apply_async(ask) for _ in range(4)]
        for each in asked:
            with pytest.raises(ForkError, match="load the model here, after the fork"):
                each.get(LIMIT)
    ledger.record("forks: requests at a server that loaded before it forked", len(asked), len(asked), 0)
    KEPT.clear()


def test_no_child_keeps_what_the_parent_gives_back(vault: Vault) -> None:
    """A connection that the parent closes is closed, though a child lives on."""
    connection = vault._workers.links[0].connection
    assert connection is not None
    handle = connection._sock.fileno()

    def closed() -> None:
        try:
            os.fstat(handle)
        except OSError:
            return
        raise ValueError

    assert in_child(closed) == "done"


def make_batch(group: int, rows: int, background: bool, late: bool) -> masks.Batch:
    def product(key: bytes, r: Elements) -> Elements:
        return r

    return masks.deal(group, 8, rows, lambda fresh: masks.Dealt(product(*fresh())), b"")


def test_no_mask_is_handed_out_twice_by_any_fork(ledger: Ledger) -> None:
    pool = MaskPool(1, make_batch, 0)
    pool.add([0], 8)
    outcomes = [in_child(lambda: pool.take(0, 1), fork) for fork in (os.fork, bare_fork) for _ in range(8)]
    ledger.record(
        "forks: a child takes a mask", len(outcomes), outcomes.count("ForkError"), outcomes.count("done")
    )
    assert set(outcomes) == {"ForkError"}
    pool.close()
