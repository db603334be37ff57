"""What the gaps between exchanges tell a worker: the length of a prompt, whatever `pad_to` hides in sizes.

SmolLM2-135M, and a process between vault and worker that reads nothing and looks at the clock: a gap is the
time from an answer's last byte to the next message's first, in which the vault works.  Masks are dealt
before the clock starts.  Two prompts are read in turn, in random order, and whoever watches calls the one
with the longer sum of gaps the longer one: right in half of the pairs if gaps told nothing.  All messages
have one size, `--pad-to` rows.

    lengths   16 and 250 tokens
    control   two other texts of 250 tokens: nothing to tell, so about half
    values    one text of 250 tokens and 250 times one token: do gaps tell texts of one length apart?

    python bench/timing.py [--pairs 100] [--pad-to 256]
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import secrets
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from rich.table import Table
from transformers import AutoTokenizer

import sliplm
from _common import console, finish, machine, median, split_smollm2
from sliplm.examples import smollm2, wikipedia
from sliplm.network import authority
from sliplm.network.addresses import TcpAddress, parse_address

SHORT, LONG = 16, 250


def watch(host: str, port: str) -> None:
    """Pass all bytes on between a vault and the worker; says the port for the vault first.

    A line on stdin is answered with the seconds of gaps since the last line.
    """
    with socket.create_server(("127.0.0.1", 0)) as vault:
        print(vault.getsockname()[1], flush=True)
        front = vault.accept()[0]
    behind = socket.create_connection((host, int(port)))
    for sock in (front, behind):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    gaps, answered = 0.0, 0.0
    while True:
        ready = select.select([front, behind, sys.stdin.buffer], [], [])[0]
        now = time.perf_counter()
        if sys.stdin.buffer in ready:
            if not os.read(0, 64):
                return
            print(gaps, flush=True)
            gaps, answered = 0.0, 0.0
        for source, target in ((front, behind), (behind, front)):
            if source in ready:
                data = source.recv(2**20)
                if not data:
                    return
                if source is front and answered:
                    gaps, answered = gaps + now - answered, 0.0
                target.sendall(data)
                if source is behind:
                    answered = time.perf_counter()


@contextlib.contextmanager
def watched(out: Path, pad_to: int) -> Iterator[tuple[Any, subprocess.Popen[str]]]:
    """The hybrid model, and the process that looks at the clock."""
    with contextlib.ExitStack() as stack:
        keys = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "keys"
        authority.init(keys)
        worker = stack.enter_context(sliplm.LocalWorker(out / "worker", authority=keys))
        target = parse_address(worker.address)
        if not isinstance(target, TcpAddress):
            raise TypeError("the local worker listens on TCP")
        command = [sys.executable, __file__, "--watch", target.host, str(target.port)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as tap:
            port = tap.stdout.readline().strip() if tap.stdout is not None else ""
            address = f"127.0.0.1:{port}?keys={target.keys}"
            model = sliplm.load(out / "vault", [address], share=out / "worker", ahead=0, pad_to=pad_to)
            with contextlib.closing(model.slip):
                yield model, tap


def gaps(model: Any, tap: subprocess.Popen[str], ids: torch.Tensor, pad_to: int) -> float:
    """Seconds in gaps while one prompt is read."""
    model.slip.deal(math.ceil(ids.shape[1] / pad_to) * pad_to)
    asked(tap)
    late = model.slip.counters.rows_dealt_late
    with torch.inference_mode():
        model(ids, use_cache=False)
    if model.slip.counters.rows_dealt_late != late:
        raise RuntimeError("masks ran out in a prompt that should have had them ready")
    return asked(tap)


def asked(tap: subprocess.Popen[str]) -> float:
    """The sum of gaps since the last call."""
    if tap.stdin is None or tap.stdout is None:
        raise RuntimeError("the process that watches has no pipes")
    tap.stdin.write("\n")
    tap.stdin.flush()
    return float(tap.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--pad-to", type=int, default=256)
    parser.add_argument("--watch", nargs=2, metavar=("HOST", "PORT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.watch:
        watch(*args.watch)
        return
    torch.manual_seed(0)
    text = AutoTokenizer.from_pretrained(smollm2(), trust_remote_code=False)(
        wikipedia()[: 8 * LONG * (args.pairs + 2)], return_tensors="pt"
    ).input_ids
    before, rows = machine(), {}
    with watched(split_smollm2(12), args.pad_to) as (model, tap):
        gaps(model, tap, text[:, :LONG], args.pad_to)  # warm
        for name in ("lengths", "control", "values"):
            found = []
            for pair in track(range(args.pairs), name, console=console):
                part = text[:, pair * LONG : (pair + 1) * LONG]
                other = text[:, (pair + 1) * LONG : (pair + 2) * LONG]
                one = {"lengths": part[:, :SHORT], "control": part, "values": part[:, :1].expand(1, LONG)}[
                    name
                ]
                first = secrets.randbelow(2)  # whichever comes first, for no drift to tell
                order = [one, other] if first == 0 else [other, one]
                times = [gaps(model, tap, ids, args.pad_to) for ids in order]
                found.append((times[first], times[1 - first]))
            rows[name] = {
                "right": sum(other > one for one, other in found),
                "first_seconds": median([one for one, _ in found]),
                "other_seconds": median([other for _, other in found]),
            }
    table = Table("pairs", "told apart", "first, s", "other, s", title=f"gaps, pad_to={args.pad_to}")
    for name, row in rows.items():
        table.add_row(
            name, f"{row['right']} of {args.pairs}", f"{row['first_seconds']}", f"{row['other_seconds']}"
        )
    console.print(table)
    finish({"machine": before, "pairs": args.pairs, "pad_to": args.pad_to, "gaps": rows})


if __name__ == "__main__":
    main()
