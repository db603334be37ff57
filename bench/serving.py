"""Many clients of OpenAI's own package at a server, while workers lie, die and come back.

`slip serve` as a process of its own with three workers: one is killed at a quarter of the time and started
again at half of it, one gives wrong products from a third on, one is honest.  Every text is compared with the
one that was given before, to one client, undisturbed.  Memory, descriptors and threads of the server are
compared between its second and its last quarter.

With --console a console is open all the time, which shows true activations too.

    python bench/serving.py [--minutes 1] [--clients 32] [--real] [--console]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from openai import OpenAI
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import sliplm
from _common import console, finish, machine, split_smollm2
from sliplm.arithmetic.field import P
from sliplm.parties.worker import Worker
from sliplm.serving import clients as registry
from sliplm.serving.door import STATE
from sliplm.shares.share import open_worker

PROMPTS = [f"Of {thing} it is known that" for thing in ("water", "iron", "the moon", "bees", "ink", "salt")]
MOST = 32
LIMIT = 300.0
LOOKS = 0.4  # seconds between two looks of the console's page


class Liar(Worker):
    """Wrong by one in one entry, from when it is told."""

    lies = False

    def _answer(self, connection: Any, side: Any, asked: Any) -> None:
        if not self.lies:
            super()._answer(connection, side, asked)
            return
        x = np.frombuffer(asked.payload, np.uint32).reshape(asked.rows, -1)
        y = self._matrices[asked.group].product(x).copy()
        y[0, 0] = (int(y[0, 0]) + 1) % P
        connection.send(side.product(1), memoryview(y), deadline=time.monotonic() + LIMIT)


@dataclass
class Found:
    """What came of it."""

    answers: int = 0
    wrong: int = 0
    lost: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)  # seconds to a stream's first text
    between: list[float] = field(default_factory=list)  # seconds from one text of a stream to the next
    samples: list[dict[str, int]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def tiny(folder: Path) -> Path:
    """A split model of two layers whose tokens are bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder / "model")
    sliplm.split(folder / "model", folder / "out", i_know=True, ledger=folder / "ledger")
    return folder / "out"


@contextmanager
def process(*arguments: str, log: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A command of ours, and the first line that it says."""
    command = [sys.executable, "-m", "sliplm", *arguments]
    with log.open("ab") as errors:
        running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors)
    try:
        line = b"" if running.stdout is None else running.stdout.readline()
        yield running, line.decode()
    finally:
        running.terminate()
        running.wait(60)


@contextmanager
def liar_at(out: Path, socket: Path) -> Iterator[Liar]:
    """The liar, in a thread of this process."""
    liar, ready = Liar(open_worker(out / "worker")), threading.Event()
    thread = threading.Thread(target=liar.serve, args=(f"unix:{socket}", None, lambda _: ready.set()))
    thread.start()
    try:
        if not ready.wait(60):
            raise SystemExit("the liar did not start")
        yield liar
    finally:
        liar.stop()
        thread.join(60)


def ask(client: OpenAI, prompt: str, stream: bool, found: Found) -> str:
    """One answer, whole or as a stream."""
    options: dict[str, Any] = {"model": "served", "prompt": prompt, "max_tokens": MOST, "temperature": 0}
    if not stream:
        return str(client.completions.create(**options).choices[0].text)
    begun, text, times = time.perf_counter(), "", []
    for chunk in client.completions.create(**options, stream=True):
        times.append(time.perf_counter())
        text += chunk.choices[0].text
    with found.lock:
        found.first.append(times[0] - begun)
        found.between += [later - earlier for earlier, later in pairwise(times)]
    return text


def converse(url: str, key: str, number: int, end: float, truth: dict[str, str], found: Found) -> None:
    """One client, until it is time."""
    with OpenAI(base_url=url, api_key=key, max_retries=0, timeout=LIMIT) as client:
        while time.monotonic() < end:
            prompt = PROMPTS[number % len(PROMPTS)]
            try:
                text = ask(client, prompt, number % 2 == 0, found)
            except Exception as error:
                with found.lock:
                    found.lost.append(f"{type(error).__name__}: {error}"[:200])
                continue
            with found.lock:
                found.answers += 1
                found.wrong += text != truth[prompt]
            number += 1


def look(url: str, key: str, end: float) -> None:
    """A console, until it is time: what its page asks for, as often."""
    since, place = 0, urlsplit(url).netloc
    with closing(HTTPConnection(place, timeout=LIMIT)) as page:
        while time.monotonic() < end:
            page.request("GET", f"{STATE}?since={since}", headers={"Authorization": f"Bearer {key}"})
            shown = json.loads(page.getresponse().read())
            since = max([since, *(row["number"] for row in shown["rows"])])
            time.sleep(LOOKS)


def sample(pid: int) -> dict[str, int]:
    """Memory in KiB, threads and descriptors of a process."""
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
    )
    return {
        "kib": int(status["VmRSS"].split()[0]),
        "threads": int(status["Threads"]),
        "descriptors": len(list(Path(f"/proc/{pid}/fd").iterdir())),
    }


def storm(out: Path, folder: Path, seconds: float, clients: int, *, console: bool) -> Found:
    """Ask for so many seconds while workers fail."""
    found, log, people = Found(), folder / "log", folder / "people"
    key = registry.add(people, "bench", console=True, activations=True)
    places = [folder / name for name in ("killed", "liar", "honest")]
    worker = ["worker", str(out / "worker"), "--listen"]
    with ExitStack() as running, ExitStack() as first:
        killed, _ = first.enter_context(process(*worker, f"unix:{places[0]}", log=log))
        running.enter_context(process(*worker, f"unix:{places[2]}", log=log))
        liar = running.enter_context(liar_at(out, places[1]))
        named = [option for place in places for option in ("--worker", f"unix:{place}")]
        server, line = running.enter_context(
            process(
                "serve",
                str(out),
                "--name",
                "served",
                "--listen",
                "127.0.0.1:0",
                "--json",
                "--clients",
                str(people),
                *named,
                log=log,
            )
        )
        url = json.loads(line)["url"]
        with OpenAI(base_url=url, api_key=key, max_retries=0, timeout=LIMIT) as client:
            truth = {prompt: ask(client, prompt, False, found) for prompt in PROMPTS}
        begun = time.monotonic()
        threads = [
            threading.Thread(target=converse, args=(url, key, i, begun + seconds, truth, found))
            for i in range(clients)
        ]
        if console:
            threads.append(threading.Thread(target=look, args=(url, key, begun + seconds)))
        for thread in threads:
            thread.start()
        events = [
            (0.25, killed.kill),
            (1 / 3, lambda: setattr(liar, "lies", True)),
            (0.5, lambda: running.enter_context(process(*worker, f"unix:{places[0]}", log=log))),
        ]
        while any(thread.is_alive() for thread in threads):
            found.samples.append(sample(server.pid))
            while events and time.monotonic() > begun + seconds * events[0][0]:
                events.pop(0)[1]()
            time.sleep(0.25)
    return found


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median and the 99th of a hundred."""
    if len(values) < 2:
        return {}
    return {
        "median": round(statistics.median(values), 4),
        "p99": round(statistics.quantiles(values, n=100)[98], 4),
    }


def main() -> None:
    """Run, print, and end with 1 where an answer was lost or wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--real", action="store_true", help="SmolLM2-135M instead of a tiny model")
    parser.add_argument("--console", action="store_true", help="with a console open")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["SLIPLM_STATE"] = str(folder / "state")  # who lied here is remembered nowhere else
        out = split_smollm2(12) if args.real else tiny(folder)
        found = storm(out, folder, 60 * args.minutes, args.clients, console=args.console)
    quarter = len(found.samples) // 4
    halves = [found.samples[quarter : 2 * quarter], found.samples[3 * quarter :]]
    flat = [{key: round(statistics.mean(s[key] for s in half)) for key in half[0]} for half in halves if half]
    said = {
        "bench": "serving", "machine": machine(), "seconds": 60 * args.minutes, "clients": args.clients,
        "console": args.console,
        "answers": found.answers, "wrong": found.wrong, "lost": len(found.lost),
        "errors": dict(Counter(found.lost)),
        "tokens_per_second": round(found.answers * MOST / 60 / args.minutes, 1),
        "first": quantiles(found.first), "between": quantiles(found.between),
        "second_quarter": flat[0], "last_quarter": flat[-1],
    }  # fmt: skip
    table = Table(title=f"{args.clients} clients, {args.minutes:g} minutes of trouble", width=80)
    table.add_column("what")
    table.add_column("count", overflow="fold")
    for key, value in said.items():
        if key not in ("bench", "machine"):
            table.add_row(key.replace("_", " "), str(value))
    console.print(table)
    finish(said)
    sys.exit(bool(found.lost or found.wrong or not found.answers))


if __name__ == "__main__":
    main()
