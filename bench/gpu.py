"""Products on a card over those of bfloat16 on the same card, and what a worker and a dealer make of them.

Weights are random, the shapes are real models'.  Every product of a model's token is asked for in one
recorded launch, for the plain model and for ours; two layers' weights in turn stand for all of them, so that
none is found in the card's cache.  The second part is a worker, then a dealer, in a process of its own behind
a Unix socket.  All that is timed is also compared with exact integers.

python bench/gpu.py [--only MODEL] [--no-socket]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from _common import finish, machine
from sliplm.arithmetic import kernels
from sliplm.arithmetic.field import Elements, P, new_key
from sliplm.arithmetic.kernels.cuda import driver
from sliplm.arithmetic.kernels.cuda.card import Lane, card
from sliplm.arithmetic.kernels.cuda.matrix import CudaMatrix
from sliplm.arithmetic.kernels.placing import lay_out
from sliplm.network.attestation import NullAttester, NullVerifier
from sliplm.network.link import Link
from sliplm.parties.worker import Worker
from sliplm.shares.manifest import WorkerGroup, WorkerManifest
from sliplm.shares.share import WorkerShare

Shape = tuple[int, int]

MODELS: Final[dict[str, tuple[int, tuple[Shape, ...], Shape | None]]] = {
    "Llama-2-7B": (32, ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)), (32000, 4096)),
    "Qwen3-4B": (36, ((6144, 2560), (2560, 4096), (19456, 2560), (2560, 9728)), (151936, 2560)),
    "a layer of 70B": (2, ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)), None),
}
"""Layers, a layer's groups (m, n), and the head."""

SOME: Final = 10_000_019  # random weights, repeated
COPIES: Final = 2  # of a layer's weights, in turn
DECODING: Final = (1, 8, 16, 64)
DEALING, PROMPT = 1024, 2048
BITS: Final = {8: (np.int8, 127), 12: (np.int16, 2047)}
REPEATS: Final = 15
SPLIT_ID: Final = "5a" * 16
TOKENS: Final = 40

console = Console(stderr=True, width=80)


class Ours:
    """A model's products by sliplm on card 0."""

    def __init__(self, model: str, bits: int, stage: int) -> None:
        self.layers, shapes, head = MODELS[model]
        self.weights = list(random_weights(model, bits))
        laid = lay_out(self.weights, "cuda")
        self.matrices = [matrix for matrix in laid if isinstance(matrix, CudaMatrix)]
        self.lane, self.groups, self.head = Lane(stage), len(shapes), head is not None

    def order(self, *, head: bool) -> list[CudaMatrix]:
        """The products of one token."""
        layers = [self.matrices[(k % COPIES) * self.groups :][: self.groups] for k in range(self.layers)]
        return [matrix for layer in layers for matrix in layer] + self.matrices[-1:] * (self.head and head)

    def milliseconds(self, matrices: Sequence[CudaMatrix], rows: int) -> float:
        """One recorded launch of these products, on the card alone."""
        lane = self.lane

        def ask() -> None:
            for matrix in matrices:
                matrix.enqueue(lane, lane.x.address, lane.out.address, rows)

        with card(0).entered():
            ask()
            lane.stream.wait()
            lane.stream.record()
            ask()
            recording = lane.stream.recorded()

            def once() -> float:
                before = lane.stream.mark()
                recording.launch(lane.stream)
                return driver.elapsed(before, lane.stream.mark())

            return median_of(once)

    def check(self, rows: int) -> None:
        """Every matrix's product, from host memory to host memory, its first and last outputs by hand."""
        generator = np.random.default_rng(rows)
        for w, matrix in zip(self.weights, self.matrices, strict=True):
            x = generator.integers(0, P, (rows, w.shape[1]), np.uint32)
            y, some = matrix.product(x), np.r_[0:40, w.shape[0] - 40 : w.shape[0]]
            part = w[some].astype(np.int64)
            if not np.array_equal(y[:, some][:70], kernels.known_answer(part, x[:70])):
                raise SystemExit(f"wrong product: {w.shape}, {rows} rows")

    def from_host(self, rows: int) -> float:
        """Milliseconds of a token's products one after the other, from host memory to host memory."""
        generator = np.random.default_rng(0)
        x = {n: generator.integers(0, P, (rows, n), np.uint32) for n in {m.shape[1] for m in self.matrices}}
        order = self.order(head=True)
        out = {m: np.empty((rows, m), np.uint32) for m in {matrix.shape[0] for matrix in order}}

        def once() -> float:
            start = time.perf_counter()
            for matrix in order:
                matrix.product(x[matrix.shape[1]], out[matrix.shape[0]])
            return (time.perf_counter() - start) * 1e3

        return median_of(once, 5)


class Plain:
    """The same products in bfloat16 by torch."""

    def __init__(self, model: str) -> None:
        self.layers, shapes, head = MODELS[model]
        self.groups, self.head = len(shapes), head is not None
        self.weights = [
            torch.randn(shape, device="cuda", dtype=torch.bfloat16) / 64 for shape in all_shapes(model)
        ]

    def order(self, *, head: bool) -> list[torch.Tensor]:
        """The weights of one token."""
        layers = [self.weights[(k % COPIES) * self.groups :][: self.groups] for k in range(self.layers)]
        return [w for layer in layers for w in layer] + self.weights[-1:] * (self.head and head)

    def milliseconds(self, weights: Sequence[torch.Tensor], rows: int) -> float:
        """As `Ours.milliseconds`."""
        x = {
            n: torch.randn(rows, n, device="cuda", dtype=torch.bfloat16)
            for n in {w.shape[1] for w in weights}
        }
        for w in [*weights[: self.groups], weights[-1]]:
            torch.nn.functional.linear(x[w.shape[1]], w)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for w in weights:
                torch.nn.functional.linear(x[w.shape[1]], w)

        def once() -> float:
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            before.record()
            graph.replay()
            after.record()
            after.synchronize()
            return float(before.elapsed_time(after))

        return median_of(once)


def all_shapes(model: str) -> list[Shape]:
    """Of the weights that stand for a model's: COPIES layers, and the head last."""
    _, shapes, head = MODELS[model]
    return list(shapes) * COPIES + ([head] if head else [])


def random_weights(model: str, bits: int) -> Iterator[kernels.Integers]:
    """Integers as a split makes them, in the order of `all_shapes`."""
    dtype, largest = BITS[bits]
    some = np.random.default_rng(bits).integers(-largest, largest + 1, SOME, dtype)
    for shape in all_shapes(model):
        yield np.resize(some, shape)


def median_of(once: Callable[[], float], repeats: int = REPEATS) -> float:
    """Of repeats after two that do not count."""
    return statistics.median([once() for _ in range(repeats + 2)][2:])


def products(model: str) -> dict[str, Any]:
    """All of a model's ratios: each shape's, a token's, and those of many rows."""
    plain = Plain(model)
    shapes = list(dict.fromkeys(all_shapes(model)))
    found: dict[str, Any] = {"model": model, "shapes": {}, "token": {}, "host_ms": {}}
    large = [(DEALING, True), (PROMPT, False)]
    base = {rows: plain.milliseconds(plain.order(head=True), rows) for rows in DECODING}
    base |= {rows: plain.milliseconds(plain.order(head=head), rows) for rows, head in large}
    each = {
        (shape, rows): plain.milliseconds([w for w in plain.weights if w.shape == shape] * 8, rows) / 8
        for shape in shapes
        for rows in DECODING
    }
    del plain
    torch.cuda.empty_cache()
    found["bf16_ms"] = {rows: round(spent, 3) for rows, spent in base.items()}
    for bits in BITS:
        stage = 4 * max(max(shape) * (DEALING if shape == MODELS[model][2] else PROMPT) for shape in shapes)
        ours = Ours(model, bits, stage)
        for rows in (1, 3, 16, 70):
            ours.check(rows)
        token = {rows: ours.milliseconds(ours.order(head=True), rows) / base[rows] for rows in DECODING}
        token |= {rows: ours.milliseconds(ours.order(head=head), rows) / base[rows] for rows, head in large}
        found["token"][bits] = {rows: round(ratio, 3) for rows, ratio in token.items()}
        for shape in shapes:
            same = [matrix for matrix in ours.matrices if matrix.shape == shape] * 8
            ratios = {r: ours.milliseconds(same, r) / 8 / each[shape, r] for r in DECODING}
            found["shapes"][f"{shape[0]}x{shape[1]} {bits}"] = {r: round(q, 3) for r, q in ratios.items()}
        found["host_ms"][bits] = {rows: round(ours.from_host(rows), 3) for rows in (1, 16)}
        del ours
    return found


def table(found: dict[str, Any]) -> Table:
    """One model's ratios."""
    title = f"{found['model']}: time over bfloat16's"
    rows = [*DECODING, DEALING, PROMPT]
    drawn = Table("bits", "rows", *(str(r) for r in rows), title=title, title_justify="left", box=None)
    for bits, token in found["token"].items():
        drawn.add_row(str(bits), "a token", *(f"{token[r]:.2f}" for r in rows))
        for name, ratios in found["shapes"].items():
            if name.endswith(f" {bits}"):
                drawn.add_row("", name.split()[0], *(f"{ratios[r]:.2f}" for r in DECODING), "", "")
    drawn.add_row("", "bf16, ms", *(f"{found['bf16_ms'][r]:.2f}" for r in rows))
    return drawn


# --- a worker and a dealer behind a socket ---------------------------------------------------------------


def share(model: str, bits: int) -> WorkerShare:
    """A worker's share of random weights, in memory."""
    matrices = {f"g{k}": w for k, w in enumerate(random_weights(model, bits))}
    kind: Literal["I8", "I16"] = "I8" if bits == 8 else "I16"
    groups = tuple(
        WorkerGroup(name=name, rows=w.shape[0], columns=w.shape[1], dtype=kind)
        for name, w in matrices.items()
    )
    manifest = WorkerManifest(split_id=SPLIT_ID, groups=groups, files={})
    return WorkerShare(Path(), manifest, matrices, {})


def serve(model: str, bits: int, address: str, role: Any) -> None:
    """Another process's part: serve until it is ended."""
    Worker(share(model, bits), role=role, device="cuda").serve(
        address, ready=lambda _: print("ready", flush=True)
    )


@contextmanager
def server(model: str, bits: int, role: Any) -> Iterator[Link]:
    """A worker or dealer in a process of its own, and the vault's end of the link to it."""
    with tempfile.TemporaryDirectory() as folder:
        address = f"unix:{folder}/socket"
        command = [sys.executable, __file__, "--serve", address, "--role", role, "--bits", str(bits)]
        with subprocess.Popen([*command, "--only", model], stdout=subprocess.PIPE) as process:
            try:
                if process.stdout is None or not process.stdout.readline():
                    raise SystemExit("the worker did not start")
                sizes, nobody = all_shapes(model), (NullAttester(), NullVerifier())
                link = Link(address, SPLIT_ID, sizes, 60.0, lambda *_: None, *nobody, role)
                yield link
                link.close()
            finally:
                process.terminate()


def over_a_socket(model: str, bits: int) -> dict[str, Any]:
    """A token's exchanges one after the other, and masks dealt."""
    layers, shapes, _ = MODELS[model]
    order = [k % COPIES * len(shapes) + i for k in range(layers) for i in range(len(shapes))]
    order.append(COPIES * len(shapes))
    sizes, generator = all_shapes(model), np.random.default_rng(1)
    found: dict[str, Any] = {"model": model, "bits": bits, "worker_ms": {}, "kernel_ms": {}}
    with server(model, bits, "worker") as link:
        for rows in (1, 8, 16):
            x = {n: generator.integers(0, P, (rows, n), np.uint32) for n in {n for _, n in sizes}}
            spent, computing = [], []
            for _ in range(TOKENS // rows + 3):
                start, micros = time.perf_counter(), 0
                for group in order:
                    with link:
                        micros += link.exchange([(group, rows)], x[sizes[group][1]], lambda: None)[1]
                spent.append((time.perf_counter() - start) * 1e3)
                computing.append(micros / 1e3)
            found["worker_ms"][rows] = round(statistics.median(spent[2:]), 2)
            found["kernel_ms"][rows] = round(statistics.median(computing[2:]), 2)
    with server(model, bits, "dealer") as link:
        seconds = 0.0  # of one token's masks
        for group in sorted(set(order)):
            rows = min(link.max_rows(group), DEALING)
            out = np.empty((rows, sizes[group][0]), np.uint32)

            def once(group: int = group, rows: int = rows, out: Elements = out) -> float:
                start = time.perf_counter()
                link.deal(group, new_key(), 0, rows, out, None)
                return time.perf_counter() - start

            seconds += median_of(once, 3) / rows * order.count(group)
        found["tokens_dealt_a_second"] = round(1 / seconds, 1)
    return found


def main() -> None:
    """Measure and end with one JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=MODELS)
    parser.add_argument("--no-socket", action="store_true")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--role", help=argparse.SUPPRESS)
    parser.add_argument("--bits", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        serve(asked.only, asked.bits, asked.serve, asked.role)
        return
    if not driver.count():
        finish({"bench": "gpu", "skipped": "there is no NVIDIA card here"})
        return
    torch.manual_seed(0)
    results = []
    for model in [asked.only] if asked.only else MODELS:
        results.append(products(model))
        console.print(table(results[-1]))
    model = asked.only or "Llama-2-7B"
    ends = [] if asked.no_socket else [over_a_socket(model, bits) for bits in BITS]
    for end in ends:
        console.print(end)
    about = machine() | {"card": torch.cuda.get_device_name(), "versions": card(0).versions}
    finish({"bench": "gpu", "machine": about, "products": results, "socket": ends})


if __name__ == "__main__":
    main()
