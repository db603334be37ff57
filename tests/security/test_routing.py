"""Mixtures of experts: one frame for many groups, of which one lies; what sizes and folders tell of a router.

A layer's experts are asked in one message (SEVERAL).  Whatever is wrong in any part of its answer spoils all
of it, and whatever is wrong with a frame ends its connection alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from families import make
from ledger import Ledger, size
from rogues import one_mask_one_message
from sliplm.arithmetic.field import P
from sliplm.engines.transformers.convert import split
from sliplm.engines.transformers.load import load, reference
from sliplm.errors import VerificationError, WireError, WorkerFault
from sliplm.network.dialling import connect
from sliplm.network.transport import Connection
from sliplm.parties.local_products import LocalProducts
from sliplm.parties.terms import Terms
from sliplm.parties.vault import Vault
from sliplm.parties.worker import Worker
from sliplm.protocol import frames as wire
from sliplm.protocol.frames import Header, Kind
from sliplm.protocol.worker_side import Several, WorkerSide
from sliplm.shares.recipe import Recipe
from sliplm.shares.share import VaultShare, WorkerShare, open_vault, open_worker, read_vault_manifest
from test_vault import serving
from test_worker import LIMIT, greet, side_of, soon

Array = np.ndarray
EXPERTS = 6
SHAPE: dict[str, Any] = {
    "num_hidden_layers": 2,
    "decoder_sparse_step": 1,
    "num_experts": EXPERTS,
    "intermediate_size": 48,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("routing")
    split(make("qwen3_moe", folder / "model", **SHAPE), folder / "out", Recipe(rank=4))
    return folder


@pytest.fixture(scope="module")
def shares(model: Path) -> tuple[VaultShare, WorkerShare]:
    return open_vault(model / "out" / "vault"), open_worker(model / "out" / "worker")


def asked_of(vault: VaultShare, seed: int) -> list[tuple[str, Array]]:
    """Rows for some experts of a layer, as many for two of them."""
    random = np.random.default_rng(seed)
    names = [name for name in vault.groups if name.startswith("model.layers.1.mlp.experts.gate_up_proj.")]
    return [
        (name, random.standard_normal((rows, vault.groups[name].n)).astype(np.float32))
        for name, rows in zip(names, (2, 1, 3, 2), strict=False)
    ]


class Curious(Worker):
    """Honest; remembers each message, and each frame's groups and rows."""

    def __init__(self, share: WorkerShare) -> None:
        super().__init__(share, threads=1)
        self.messages: list[tuple[int, Array]] = []
        self.frames: list[tuple[tuple[int, int], ...]] = []

    def products(self, asked: Several) -> list[Array]:
        elements, first, found = np.frombuffer(asked.payload, np.uint32), 0, []
        self.frames.append(tuple(asked.parts))
        for group, rows in asked.parts:
            n = self._shapes[group][1]
            x = elements[first : first + rows * n].reshape(rows, n).copy()
            self.messages.append((group, x))
            found.append(self._matrices[group].product(x))
            first += rows * n
        return found

    def _answer_several(self, connection: Connection, side: WorkerSide, asked: Several) -> None:
        y = self.changed(self.products(asked))
        header = self.header(side.product(1))
        connection.send(header, np.concatenate([part.reshape(-1) for part in y]).data, deadline=soon())

    def changed(self, y: list[Array]) -> list[Array]:
        return y

    def header(self, data: bytes) -> bytes:
        return data


def one_more(y: list[Array], part: int) -> None:
    y[part][-1, -1] = (int(y[part][-1, -1]) + 1) % P


def not_reduced(y: list[Array], part: int) -> None:
    y[part][0, 0] = 0xFFFFFFFF  # p + 4


def zeros(y: list[Array], part: int) -> None:
    y[part][:] = 0


def others(y: list[Array], part: int) -> None:
    """Of another expert, of the same shape: as if it were the one that was asked."""
    other = (part + 1) % len(y)
    rows = min(len(y[part]), len(y[other]))
    y[part][:rows], y[other][:rows] = y[other][:rows].copy(), y[part][:rows].copy()


def turned(y: list[Array], part: int) -> None:
    """The rows of one expert in another order, or its only row moved on by one."""
    y[part][:] = y[part][::-1].copy() if len(y[part]) > 1 else np.roll(y[part], 1)


LIES: tuple[Callable[[list[Array], int], None], ...] = (one_more, not_reduced, zeros, others, turned)


class Liar(Curious):
    """Answers one frame honestly, the next with a lie in one part."""

    def __init__(self, share: WorkerShare, lie: Callable[[list[Array], int], None], part: int) -> None:
        super().__init__(share)
        self.lie, self.part = lie, part

    def changed(self, y: list[Array]) -> list[Array]:
        if len(self.frames) > 1:
            self.lie(y, self.part)
        return y


class Replaying(Curious):
    """Answers the second frame with what it answered to the first, of the same experts and rows."""

    def changed(self, y: list[Array]) -> list[Array]:
        self.first = getattr(self, "first", y)
        return self.first


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
@pytest.mark.parametrize("part", range(4))
def test_a_lie_about_one_expert_spoils_the_frame(
    shares: tuple[VaultShare, WorkerShare],
    lie: Callable[[list[Array], int], None],
    part: int,
    tmp_path: Path,
    ledger: Ledger,
) -> None:
    """Another worker is sent the same bytes (M8); alone, the request fails, and nothing is used (M13)."""
    caught, wrong, twice = spoilt(shares, lambda: Liar(shares[1], lie, part), tmp_path)
    ledger.record("experts: a lie in one group of a frame", 2, caught, wrong + twice)
    assert (caught, wrong, twice) == (2, 0, 0)


def test_an_answer_to_another_frame_is_refused(
    shares: tuple[VaultShare, WorkerShare], tmp_path: Path, ledger: Ledger
) -> None:
    caught, wrong, twice = spoilt(shares, lambda: Replaying(shares[1]), tmp_path)
    ledger.record("experts: an earlier frame's answer again", 2, caught, wrong + twice)
    assert (caught, wrong, twice) == (2, 0, 0)


def spoilt(
    shares: tuple[VaultShare, WorkerShare], rogue: Callable[[], Curious], tmp_path: Path
) -> tuple[int, int, int]:
    """With another worker, and alone: how often it was caught; wrong products; masks used twice."""
    local, caught, wrong = LocalProducts(*shares), 0, 0
    liar, honest = rogue(), Curious(shares[1])
    first, second = asked_of(shares[0], 1), asked_of(shares[0], 2)
    with (
        serving(liar, tmp_path / "a") as bad,
        serving(honest, tmp_path / "b") as good,
        Vault(shares[0], Terms([bad, good], shares[1], ahead=0)) as vault,
    ):
        for request in (first, second):
            for y, (name, x) in zip(vault.products(request), request, strict=True):
                wrong += int(not np.array_equal(y, local.product(name, x)))
        caught += int(list(vault.quarantined) == [bad])
    sent = [x.tobytes() for _, x in liar.messages]
    assert [x.tobytes() for _, x in honest.messages] == sent[len(sent) // 2 :], "the same message (M8)"
    logs = [liar.messages, honest.messages]
    alone = rogue()
    with (
        serving(alone, tmp_path / "c") as bad,
        Vault(shares[0], Terms([bad], shares[1], ahead=0)) as vault,
    ):
        vault.products(first)
        with pytest.raises(VerificationError, match="wrong"):
            vault.products(second)
        caught += int(list(vault.quarantined) == [bad])
    return caught, wrong, one_mask_one_message([*logs, alone.messages])


HEADERS: dict[str, Callable[[Header], Header]] = {
    "groups": lambda h: h._replace(group=h.group - 1),
    "one group": lambda h: h._replace(group=0),
    "rows": lambda h: h._replace(rows=h.rows + 1),
    "length": lambda h: h._replace(length=h.length - 4),
    "sequence": lambda h: h._replace(sequence=h.sequence - 1),
    "kind": lambda h: h._replace(kind=Kind.SEVERAL),
}


class Misstating(Curious):
    """Its answers are right, and their headers are not."""

    def __init__(self, share: WorkerShare, change: Callable[[Header], Header]) -> None:
        super().__init__(share)
        self.change = change

    def header(self, data: bytes) -> bytes:
        return wire.pack_header(self.change(wire.parse_header(data)))


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS)
def test_an_answer_whose_header_is_of_another_frame_is_refused(
    shares: tuple[VaultShare, WorkerShare],
    change: Callable[[Header], Header],
    tmp_path: Path,
    ledger: Ledger,
) -> None:
    """M25, for frames of several groups."""
    worker = Misstating(shares[1], change)
    with (
        serving(worker, tmp_path / "w") as address,
        Vault(shares[0], Terms([address], shares[1], ahead=0)) as vault,
    ):
        with pytest.raises(WireError):
            vault.products(asked_of(shares[0], 1))
        caught = int(list(vault.quarantined) == [address])
    ledger.record("experts: a frame's answer under another header", 1, caught, 0)
    assert caught


def test_a_worker_refuses_frames_that_do_not_agree(
    shares: tuple[VaultShare, WorkerShare], tmp_path: Path, ledger: Ledger
) -> None:
    """Wrong numbers, rows, order, doubles, lengths, and a frame sent again: each ends its own connection,
    before anything is computed; the next vault is served.
    """
    share = shares[1]
    a, b = [share.names.index(name) for name, _ in asked_of(shares[0], 1)][:2]
    width = share.matrices[share.names[a]].shape[1]
    body = 4 * width * 3
    count = len(share.names)
    cases: list[tuple[list[tuple[int, int]], int, int, int]] = [  # parts, rows and groups said, bytes
        ([(b, 2), (a, 1)], 3, 2, body),  # not ascending
        ([(a, 2), (a, 1)], 3, 2, body),  # twice
        ([(a, 2), (count, 1)], 3, 2, body),  # no such group
        ([(a, 2), (2**32 - 1, 1)], 3, 2, body),
        ([(a, 3), (b, 0)], 3, 2, body),  # none of one
        ([(a, 2), (b, 2)], 3, 2, body),  # more rows than were said
        ([(a, 2), (b, 1)], 4, 2, body),
        ([(a, 2), (b, 1)], 3, 2, body - 4),
        ([(a, 2), (b, 1)], 3, 2, body + 4),
        ([(a, 2), (b, 1)], 3, 3, body),  # one group more than there is
        ([(a, 3)], 3, 1, body),  # one is no SEVERAL
        ([(a, 2**31), (b, 2**31)], 2**32 - 1, 2, body),
        ([(a, 2), (b, 1)], 3, count + 1, body),
    ]
    worker, refused = Curious(share), 0
    with serving(worker, tmp_path / "w") as address:
        for parts, rows, groups, length in cases:
            payload = wire.pack_parts(parts) + bytes(length)
            side = side_of(share)
            with connect(address, LIMIT) as bad:
                greet(bad, side)
                side.several([(a, 2), (b, 1)])  # what it would have asked
                header = wire.pack_header(Header(Kind.SEVERAL, 1, groups, rows, 0, len(payload)))
                bad.send(header + payload, deadline=soon())
                with pytest.raises(WorkerFault, match="protocol"):
                    bad.receive(side, deadline=soon())
                refused += 1
        assert not worker.frames, "nothing was computed"
        side = side_of(share)
        with connect(address, LIMIT) as good:
            greet(good, side)
            frame = side.several([(a, 2), (b, 1)]) + bytes(body)
            good.send(frame, deadline=soon())
            good.receive(side, deadline=soon())
            side.several([(a, 2), (b, 1)])
            good.send(frame, deadline=soon())  # the same bytes again: a sequence number that has passed
            with pytest.raises(WorkerFault, match="sequence"):
                good.receive(side, deadline=soon())
            refused += 1
    ledger.record("experts: frames whose parts do not agree", len(cases) + 1, refused, len(worker.frames) - 1)
    assert len(worker.frames) == 1


def test_a_workers_folder_tells_nothing_of_the_experts_order(
    model: Path, tmp_path: Path, ledger: Ledger
) -> None:
    """Names, sizes, their order and the layout of the file are a function of the shapes alone: the same
    for every split, whatever the secret order; and layers have orders of their own.
    """
    tries, orders, seen = size(4, 30), [], set()
    for i in range(tries):
        out = model / "out" if i == 0 else tmp_path / str(i)
        if i:
            split(model / "model", out, Recipe(rank=4), i_know=True)
        manifest = json.loads((out / "worker" / "manifest.json").read_text())
        data = (out / "worker" / "share.safetensors").read_bytes()
        header = data[: 8 + int.from_bytes(data[:8], "little")]
        record = manifest["files"]["share.safetensors"]
        assert sorted(manifest) == ["files", "format", "groups", "split_id", "version"]
        names = sorted(file.name for file in (out / "worker").iterdir())
        seen.add((json.dumps(manifest["groups"]), header, record["bytes"], *names))
        for layer in range(2):
            for weight in ("gate_up_proj", "down_proj"):
                mine = [
                    group
                    for group in read_vault_manifest(out / "vault").groups
                    if group.expert is not None
                    and (group.expert.module, group.expert.weight)
                    == (f"model.layers.{layer}.mlp.experts", weight)
                ]
                assert [g.name.rpartition(".")[2] for g in mine] == [str(i) for i in range(EXPERTS)]
                numbers = [g.expert.number for g in mine if g.expert is not None]
                assert sorted(numbers) == list(range(EXPERTS))
                orders.append((i, layer, tuple(numbers)))
    leaked = len(seen) - 1
    one_a_layer = {(i, layer): order for i, layer, order in orders}
    assert all(one_a_layer[i, layer] == order for i, layer, order in orders), (
        "one for both weights of a layer"
    )
    # of 720 orders 8 are drawn: that half of them are alike has a chance below 10^-7
    assert len(set(one_a_layer.values())) > tries
    ledger.record("experts: order told by the worker's folder", tries, tries, leaked)
    assert not leaked


def test_hidden_routing_shows_in_no_frame(model: Path, tmp_path: Path, ledger: Ledger) -> None:
    """Groups, rows and lengths depend on the number of tokens alone, whatever is asked; rows that no expert
    needs are masked like all others.  (Without the option they differ: the test can see it.)
    """
    random = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, 299, (1, 5), generator=random) for _ in range(size(6, 40))]
    share, frames, wrong = open_worker(model / "out" / "worker"), {}, 0
    for hidden in (False, True):
        worker = Curious(share)
        with serving(worker, tmp_path / f"w{hidden}") as address, torch.no_grad():
            vault: Any = load(model / "out" / "vault", [address], ahead=0, hide_routing=hidden)
            near = reference(model / "out")
            try:
                for prompt in prompts:
                    wrong += int(not torch.equal(vault(prompt).logits, near(prompt).logits))
            finally:
                vault.slip.close()
        each = len(worker.frames) // len(prompts)
        frames[hidden] = {tuple(worker.frames[i : i + each]) for i in range(0, len(worker.frames), each)}
    assert len(frames[False]) > 1
    rows = [dict(frame) for frame in next(iter(frames[True]))]
    assert all(len(frame) == EXPERTS and set(frame.values()) == {5} for frame in rows)
    every = np.concatenate([x.reshape(-1) for _, x in worker.messages]).astype(np.float64) / P
    assert abs(every.mean() - 0.5) < 6 / np.sqrt(12 * every.size), "rows of zeros would be near 0 or p"
    assert (every < 1e-3).mean() < 2e-3
    twice = one_mask_one_message([worker.messages])
    leaked = len(frames[True]) - 1 + twice + wrong
    ledger.record("experts: routing seen behind hide_routing", len(prompts), len(prompts), leaked)
    assert not leaked
