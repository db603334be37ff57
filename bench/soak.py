"""A vault at work while its network, keys, workers and dealer fail one after the other.

A tiny split model, two workers and a dealer as processes of their own with TLS, each behind a proxy of this
bench.  At random moments of a seed: connections are cut, a worker or the dealer does not answer the network
for a while, certificates are replaced and the old ones revoked, or expire first, a process restarts, a key
file vanishes.  Every answer is compared with the quantised model, bit for bit; a failure may last as long as
its trouble and two seconds.  Descriptors, threads and memory, of the vault's process (with this bench in it)
and of the worker that never restarts, are compared between both halves.

    python bench/soak.py [--minutes 60] [--seed 0] [--away 10]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest.mock
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.progress import Progress
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import sliplm
from _common import console, finish, machine
from sliplm.errors import SlipError
from sliplm.network import authority, keys
from sliplm.parties.local_products import LocalProducts
from sliplm.parties.local_worker import worker_environment
from sliplm.parties.terms import Terms
from sliplm.parties.vault import Vault
from sliplm.shares.share import open_vault, open_worker

GRACE = 2.0
CALM = (4.0, 8.0)  # seconds between two troubles: longer than the grace, so that each is judged
START_LIMIT = 120.0
PARTIES = ("worker", "second", "dealer")  # the second worker never restarts
SHORT_LIFE = 2.0  # seconds of a certificate that is to expire


class Proxy:
    """Passes bytes on between the vault and one party; cuts connections, and swallows what it is told to."""

    def __init__(self) -> None:
        self.target = 0
        self.hole = False
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._front = socket.create_server(("127.0.0.1", 0))
        self.port = self._front.getsockname()[1]
        self._wake, self._woken = socket.socketpair()
        self._asked = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """End every connection; returns when they are ended."""
        self._asked.clear()
        self._wake.send(b"c")
        self._asked.wait(10)

    def close(self) -> None:
        self._ended = True
        self._wake.send(b"e")
        self._thread.join(10)
        for sock in (self._front, self._wake, self._woken):
            sock.close()

    def _run(self) -> None:
        while not self._ended:
            socks = [sock for pair in self._pairs for sock in pair]
            watched = [self._front, self._woken, *([] if self.hole else socks)]
            for sock in select.select(watched, [], [], 0.1)[0]:
                if sock is self._woken:
                    self._woken.recv(64)
                    self._end_all()
                    break
                if sock is self._front:
                    self._accept()
                else:
                    self._pass_on(sock)
        self._end_all()

    def _accept(self) -> None:
        near = self._front.accept()[0]
        try:
            far = socket.create_connection(("127.0.0.1", self.target), 2)
        except OSError:
            near.close()
            return
        for sock in (near, far):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        far.settimeout(None)
        self._pairs.append((near, far))

    def _pass_on(self, sock: socket.socket) -> None:
        pair = next((pair for pair in self._pairs if sock in pair), None)
        if pair is None:
            return  # ended in this round
        try:
            data = sock.recv(1 << 16)
            if data:
                pair[1 if sock is pair[0] else 0].sendall(data)
        except OSError:
            data = b""
        if not data:
            self._pairs.remove(pair)
            for one in pair:
                one.close()

    def _end_all(self) -> None:
        for pair in self._pairs:
            for sock in pair:
                sock.close()
        self._pairs = []
        self._asked.set()


class Party:
    """A worker or dealer process behind a proxy."""

    def __init__(self, share: Path, home: Path, name: str) -> None:
        self.name, self.proxy = name, Proxy()
        self._share, self._keys, self._log = share, home / name, home.parent / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.address = f"127.0.0.1:{self.proxy.port}?keys={home / 'vault'}"

    def start(self) -> None:
        """Returns once it listens."""
        command = [
            sys.executable, "-P", "-m", "sliplm", "worker", str(self._share), "--json", "--threads", "1",
            "--listen", "127.0.0.1:0", "--keys", str(self._keys),
        ]  # fmt: skip
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, env=worker_environment()
            )
        if self._process.stdout is None:
            raise ChildProcessError(f"{self.name} has no output")
        if not select.select([self._process.stdout], [], [], START_LIMIT)[0]:
            raise TimeoutError(f"{self.name} does not start")
        line = self._process.stdout.readline()
        if not line:
            raise ChildProcessError(self._log.read_text()[-2000:])
        self.proxy.target = int(json.loads(line)["listening"].rpartition(":")[2])

    def sample(self) -> Sample:
        """As `sample`, of this process."""
        if self._process is None:
            raise ChildProcessError(f"{self.name} does not run")
        return sample(str(self._process.pid))

    def stop(self, how: int = signal.SIGTERM) -> None:
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(30)
            if self._process.stdout is not None:
                self._process.stdout.close()
            self._process = None

    def close(self) -> None:
        self.stop(signal.SIGKILL)
        self.proxy.close()


class Sample(NamedTuple):
    """What a process holds; bytes are resident."""

    descriptors: int
    threads: int
    bytes: int


def sample(process: str = "self") -> Sample:
    """Of a process, by its number."""
    folder = Path("/proc") / process
    descriptors, threads = (sum(1 for _ in (folder / of).iterdir()) for of in ("fd", "task"))
    pages = int((folder / "statm").read_text().split()[1])
    return Sample(descriptors, threads, pages * os.sysconf("SC_PAGE_SIZE"))


@dataclass
class Trouble:
    """One fault: when it began and ended, by time.monotonic()."""

    kind: str
    begun: float
    ended: float = float("inf")


@dataclass
class Found:
    """What a soak found."""

    requests: int = 0
    wrong: int = 0
    failed: int = 0
    slowest: float = 0.0  # seconds of a request that was answered, also while there was trouble
    longest_beyond: float = 0.0  # seconds that a failure lasted after all troubles it met had ended
    late: list[str] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    troubles: list[Trouble] = field(default_factory=list)
    quarantined: dict[str, str] = field(default_factory=dict)
    samples: dict[str, list[Sample]] = field(default_factory=lambda: {"vault": [], "worker": []})

    def failure(self, begun: float, ended: float, why: str) -> None:
        """No request was answered between these moments: no calm between two troubles may be within it
        for longer than the grace.
        """
        troubles, calm, after = list(self.troubles), begun, "no trouble"
        for trouble in [*troubles, Trouble("the end", ended)]:
            if trouble.ended < begun:
                after = trouble.kind
                continue
            beyond = min(trouble.begun, ended) - calm
            self.longest_beyond = max(self.longest_beyond, beyond)
            if beyond > GRACE:
                self.late.append(f"{beyond:.1f} s after {after}: {why}")
            calm, after = max(calm, trouble.ended), trouble.kind
            if calm >= ended:
                return

    def halves(self, whose: str) -> tuple[Sample, Sample]:
        """The most of each resource in the first half, its start left out, and in the second."""
        samples = self.samples[whose]
        n = len(samples)
        first, second = samples[n // 8 : n // 2], samples[n // 2 :]
        return Sample(*map(max, *first)), Sample(*map(max, *second))

    def flat(self) -> bool:
        """Whether nothing grows: a few descriptors and threads are connections under way."""
        return all(
            second.descriptors <= first.descriptors + 4
            and second.threads <= first.threads + 2
            and second.bytes <= first.bytes * 1.02 + (4 << 20)
            for first, second in map(self.halves, self.samples)
        )


class Troubles:
    """Makes trouble, one at a time, each kind in turn and in random order."""

    def __init__(self, parties: dict[str, Party], home: Path, found: Found, seed: int, away: float) -> None:
        self._parties, self._home, self._found = parties, home, found
        self._chance, self._away = random.Random(seed), away  # noqa: S311 - faults, no secrets
        self._over = threading.Event()
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._guarded, daemon=True)

    def __enter__(self) -> Troubles:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(START_LIMIT)

    def _guarded(self) -> None:
        try:
            self._run()
        except BaseException as error:
            self.error = error

    def _run(self) -> None:
        kinds: dict[str, Callable[[], None]] = {
            "connections cut": self._cut,
            "network silent": self._hole,
            "certificate replaced": self._rotate,
            "certificate expired": self._expire,
            "worker restarts": lambda: self._restart("worker"),
            "dealer restarts": lambda: self._restart("dealer"),
            "key file away": self._key_away,
        }
        while True:
            for kind in self._chance.sample(list(kinds), len(kinds)):
                if self._over.wait(self._chance.uniform(*CALM)):
                    return
                trouble = Trouble(kind, time.monotonic())
                self._found.troubles.append(trouble)
                try:
                    kinds[kind]()
                finally:
                    trouble.ended = time.monotonic()

    def _cut(self) -> None:
        for party in self._parties.values():
            party.proxy.cut()

    def _hole(self) -> None:
        proxy = self._parties[self._chance.choice(PARTIES)].proxy
        proxy.hole = True
        self._over.wait(self._chance.uniform(1, 4))
        proxy.hole = False
        proxy.cut()

    def _rotate(self) -> None:
        authority.rotate(self._home, self._chance.choice(("vault", *PARTIES)), days=1)

    def _expire(self) -> None:
        name = self._chance.choice(("vault", *PARTIES))
        past = keys.now() - timedelta(days=1) + timedelta(seconds=SHORT_LIFE)
        with unittest.mock.patch("sliplm.network.authority.now", return_value=past):
            authority.rotate(self._home, name, days=1)
        self._over.wait(SHORT_LIFE + 1)
        self._cut()  # what is connected may stay so
        self._over.wait(self._chance.uniform(1, 4))
        authority.rotate(self._home, name, days=1)

    def _restart(self, name: str) -> None:
        party = self._parties[name]
        party.stop(self._chance.choice((signal.SIGTERM, signal.SIGKILL)))
        party.start()

    def _key_away(self) -> None:
        folder = self._home / self._chance.choice(("vault", *PARTIES))
        file = folder / self._chance.choice((keys.KEY, keys.CERTIFICATE))
        aside = folder / "away"
        file.rename(aside)
        self._cut()  # what is connected needs no key
        self._over.wait(self._away)
        aside.rename(file)


@contextlib.contextmanager
def scene(folder: Path) -> Iterator[tuple[Path, Path, dict[str, Party]]]:
    """A tiny split model, its key folders, and the parties running."""
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=176, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    sliplm.split(folder / "model", folder / "out", i_know=True, ledger=folder / "ledger")
    home = folder / "keys"
    authority.init(home)
    authority.issue(home, "worker", "second")
    parties = {name: Party(folder / "out" / "worker", home, name) for name in PARTIES}
    try:
        for party in parties.values():
            party.start()
        yield folder / "out", home, parties
    finally:
        for party in parties.values():
            party.close()


def soak(folder: Path, seconds: float, seed: int = 0, away: float = 10.0) -> Found:
    """Ask for so many seconds while there is trouble."""
    found, chance = Found(), np.random.default_rng(seed)
    with scene(folder) as (out, home, parties):
        share = open_vault(out / "vault")
        local = LocalProducts(share, open_worker(out / "worker"))
        terms = Terms(
            [parties[name].address for name in PARTIES[:2]],
            dealers=[parties["dealer"].address], ahead=64, timeout=2.0,
        )  # fmt: skip
        with Vault(share, terms) as vault, Progress(console=console) as progress:
            task = progress.add_task("soak", total=seconds)
            for address in terms.workers:
                vault.rejoin(address)  # else the second is connected to when the first fails
            with Troubles(parties, home, found, seed, away) as troubles:
                begun = time.monotonic()
                while time.monotonic() < begun + seconds and troubles.error is None:
                    _until_answered(vault, local, chance, found)
                    if (passed := time.monotonic() - begun) > len(found.samples["vault"]):  # each second
                        found.samples["vault"].append(sample())
                        found.samples["worker"].append(parties["second"].sample())
                    progress.update(task, completed=passed)
                    time.sleep(0.02)
            found.quarantined = vault.quarantined
            if troubles.error is not None:
                raise troubles.error
    return found


def _until_answered(vault: Vault, local: LocalProducts, chance: np.random.Generator, found: Found) -> None:
    """One request, again and again until it is answered or has failed for forty seconds."""
    name = vault.groups[chance.integers(len(vault.groups))]
    n = local._codecs[name].n
    x = chance.standard_normal((int(chance.integers(1, 5)), n)).astype(np.float32)
    begun, failed, why = time.monotonic(), False, ""
    while True:
        found.requests, asked = found.requests + 1, time.monotonic()
        try:
            answer = vault.product(name, x)
        except SlipError as error:
            found.failed, failed = found.failed + 1, True
            why = f"{type(error).__name__}: {str(error)[:300]}"
            found.errors[type(error).__name__] += 1
        else:
            found.slowest = max(found.slowest, time.monotonic() - asked)
            found.wrong += not np.array_equal(answer, local.product(name, x))
            break
        if time.monotonic() > begun + 40:
            break
        time.sleep(0.1)
    if failed:
        found.failure(begun, time.monotonic(), why)


def document(found: Found, seconds: float, seed: int) -> dict[str, Any]:
    """What the last line says."""
    halves = {whose: [half._asdict() for half in found.halves(whose)] for whose in found.samples}
    return {
        "bench": "soak", "machine": machine(), "seconds": seconds, "seed": seed,
        "requests": found.requests, "wrong": found.wrong, "failed": found.failed,
        "longest_beyond_trouble": round(found.longest_beyond, 2), "late": found.late,
        "slowest_answer": round(found.slowest, 2),
        "errors": dict(found.errors), "troubles": dict(Counter(t.kind for t in found.troubles)),
        "quarantined": found.quarantined, "halves": halves, "flat": found.flat(),
    }  # fmt: skip


def main() -> None:
    """Run, print, and end with 1 where something was not as it has to be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.5, help="how long; a release is soaked for 60")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--away", type=float, default=10.0, help="seconds for which a key file is away")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = soak(Path(folder), 60 * args.minutes, args.seed, args.away)
    said = document(found, 60 * args.minutes, args.seed)
    table = Table(title=f"{args.minutes:g} minutes of trouble", width=80)
    for heading in ("what", "count"):
        table.add_column(heading, overflow="fold")
    for name in ("requests", "wrong", "failed", "longest_beyond_trouble", "slowest_answer"):
        table.add_row(name.replace("_", " "), str(said[name]))
    table.add_row("late", "; ".join(found.late[:3]) or "0")
    for kind, count in said["troubles"].items():
        table.add_row(f"trouble: {kind}", str(count))
    for whose in found.samples:
        first, second = found.halves(whose)
        for resource, before, after in zip(Sample._fields, first, second, strict=True):
            table.add_row(f"{whose}: most {resource}, each half", f"{before:,}, {after:,}")
    console.print(table)
    finish(said)
    if found.wrong or found.late or found.quarantined or not found.flat():
        raise SystemExit(1)


if __name__ == "__main__":
    main()
