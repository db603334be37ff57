"""Nothing that a worker or a dealer does changes a product: each misbehaviour of `rogues`, with another
worker there, alone, and alone with the owner's leave to compute here; and who is named for it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sliplm
from families import make
from ledger import Ledger
from rogues import ROGUES, Honest, Means, Rogue, one_mask_one_message, serving
from sliplm.errors import DealerError, SlipError
from sliplm.network import authority
from sliplm.network.keys import now
from sliplm.parties.audit import Record
from sliplm.parties.local_products import LocalProducts
from sliplm.parties.terms import Terms
from sliplm.parties.vault import Vault
from sliplm.shares.share import VaultShare, open_vault, open_worker

Array = np.ndarray
ASKED, TWIN = 0, 4  # places in `Scene.groups` of the group that is asked for, and of one of the same shape


@dataclass
class Scene:
    """A split, what is right, and what a rogue has at hand."""

    vault: VaultShare
    local: LocalProducts
    means: Means

    @property
    def groups(self) -> list[str]:
        """Names of the groups."""
        return list(self.vault.groups)

    def requests(self, rogue: Rogue) -> tuple[list[tuple[str, Array]], list[tuple[str, Array]]]:
        """(while it is honest, then), each a list of groups and inputs."""
        group, twin = self.groups[ASKED], self.groups[TWIN]
        before = [(twin if i % 2 == 0 else group, self.inputs(3, i)) for i in range(rogue.after)]
        after = [(group, self.inputs(rows, 100 + i)) for i, rows in enumerate(rogue.asks)]
        if rogue.same_input:
            after[0] = before[-1]
        return before, after

    def inputs(self, rows: int, seed: int) -> Array:
        """float32 [rows, n]."""
        n = self.vault.groups[self.groups[ASKED]].n
        return np.random.default_rng(seed).standard_normal((rows, n)).astype(np.float32)

    def wrong(self, vault: Vault, request: tuple[str, Array]) -> int:
        """Ask; 1 if the product is not the undisturbed one, bit for bit."""
        return int(not np.array_equal(vault.product(*request), self.local.product(*request)))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("malicious")
    make("llama", folder / "model")
    for out in ("out", "other"):
        sliplm.split(folder / "model", folder / out, i_know=True)
    for keys in ("keys", "dealing", "strangers"):
        authority.init(folder / keys)
    for keys, role in (("keys", "worker"), ("dealing", "dealer")):
        for party in ("rogue", "honest"):
            authority.issue(folder / keys, authority.role_of(role), party)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sliplm.network.authority.now", lambda: now() - timedelta(days=30))
            authority.issue(folder / keys, authority.role_of(role), "expired", days=20)
    return folder


@pytest.fixture
def scene(base: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Scene:
    """With keys of its own: some rogues lose theirs.  Where it says dealer, the rogue's are a dealer's."""
    keys = Path(
        shutil.copytree(
            base / ("dealing" if "dealer" in request.node.name.split("[")[0] else "keys"), tmp_path / "keys"
        )
    )
    means = Means(
        open_worker(base / "out" / "worker"), open_worker(base / "other" / "worker"), keys, base / "strangers"
    )
    vault = open_vault(base / "out" / "vault")
    return Scene(vault, LocalProducts(vault, means.share), means)


@pytest.fixture(autouse=True)
def slow_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody comes back by himself while a test looks."""
    monkeypatch.setattr("sliplm.parties.standing._PAUSES", (60.0, 60.0))
    monkeypatch.setattr("sliplm.parties.standing._SUSPENSIONS", (60.0, 60.0))
    monkeypatch.setattr("sliplm.parties.standing._ALONE", (120.0, 120.0))


@pytest.fixture(autouse=True)
def another_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has a copy of one authority: what one of them revoked, the others have not."""
    monkeypatch.setattr("sliplm.network.trust._revoked", {})


@contextmanager
def vault_of(scene: Scene, rogue: Rogue, workers: list[str], **options: Any) -> Iterator[Vault]:
    settings = {"dealing_share": scene.means.share, "ahead": 0, "timeout": rogue.timeout} | options
    with Vault(scene.vault, Terms(workers, **settings)) as vault:
        yield vault


def states(vault: Vault) -> list[str]:
    return [status.state for status in (*vault.workers, *vault.dealers)]


def about(vault: Vault, address: str) -> list[Record]:
    """What the audit says of somebody; that a certificate was revoked, if nothing came of it yet."""
    found = [r for r in vault.audit.records if r.address == address and r.event != "masks renewed"]
    return found[1:] if [r.event for r in found[:1]] == ["revoked"] and len(found) > 1 else found


def named(record: Record, rogue: Rogue, role: str, group: str, over_tls: bool) -> bool:
    """Does this record say who did what, and nothing that a terminal would obey?"""
    of_revocation = "revoked" in record.reason and record.group is None
    return (
        record.event in (("revoked", rogue.ends) if of_revocation else (rogue.ends,))
        and record.role == role
        and (record.group == group or of_revocation)
        and len(record.reason) > 10
        and record.reason.isprintable()
        and (record.peer or "").startswith("rogue, serial ") == over_tls
    )


def advises(error: SlipError) -> bool:
    """Does it say what happened, and then something more, in printable letters?"""
    text = str(error)
    return text.isprintable() and any(mark in text for mark in (": ", "; "))


@pytest.mark.parametrize("name", ROGUES)
def test_another_worker_takes_over(name: str, scene: Scene, ledger: Ledger) -> None:
    """Over TLS."""
    rogue, honest = ROGUES[name](scene.means), Honest(scene.means.share)
    before, after = scene.requests(rogue)
    with ExitStack() as stack:
        bad = stack.enter_context(serving(rogue, scene.means.keys, "rogue"))
        good = stack.enter_context(serving(honest, scene.means.keys, "honest"))
        bystander = None
        if rogue.bystander:
            bystander = stack.enter_context(vault_of(scene, rogue, [bad]))
        vault = stack.enter_context(vault_of(scene, rogue, [bad, good]))
        wrong = sum(scene.wrong(vault, request) for request in before)
        assert (states(vault), honest.messages) == (["up", "up"], []), "honest so far"
        wrong += sum(scene.wrong(vault, request) for request in after)
        records = about(vault, bad)
        asked = len(rogue.messages)
        wrong += scene.wrong(vault, after[-1])
        harmless = rogue.ends == "up"
        detected = (
            records == []
            if harmless
            else len(records) == 1 and named(records[0], rogue, "worker", after[-1][0], over_tls=True)
        )
        ledger.record(f"worker: {name}", 1, detected and states(vault)[0] == rogue.ends, wrong)
        assert wrong == 0
        assert detected, records
        assert states(vault) == [rogue.ends, "up"]
        assert about(vault, good) == []
        if not harmless:
            assert len(rogue.messages) == asked, "it is not asked again"
            assert len(honest.messages) == 2
        if bystander is not None:
            assert scene.wrong(bystander, after[0]) == 0
            assert states(bystander) == ["up"]
    check_logs(rogue, honest, len(before) + len(after))


def check_logs(rogue: Rogue, honest: Honest, requests: int) -> None:
    """Whatever both were asked was one message under one mask."""
    assert one_mask_one_message([rogue.messages, honest.messages]) == 0
    different = list({(group, x.tobytes()): None for group, x in rogue.messages})
    assert len(different) <= requests + 2 * rogue.bystander + (rogue.ends == "up")
    if honest.messages and len(different) == requests and not rogue.bystander:
        group, x = honest.messages[0]
        assert different[-1] == (group, x.tobytes()), "the same message"


@pytest.mark.parametrize("name", ROGUES)
def test_alone_it_stops_the_request_and_nothing_else(
    name: str, scene: Scene, tmp_path: Path, ledger: Ledger
) -> None:
    """Over a Unix socket where the misbehaviour allows it."""
    rogue = ROGUES[name](scene.means)
    before, after = scene.requests(rogue)
    where, party = (scene.means.keys, "rogue") if rogue.tls else (tmp_path / "w.sock", None)
    with ExitStack() as stack:
        bad = stack.enter_context(serving(rogue, where, party))
        if rogue.bystander:
            stack.enter_context(vault_of(scene, rogue, [bad]))
        vault = stack.enter_context(vault_of(scene, rogue, [bad]))
        wrong = sum(scene.wrong(vault, request) for request in [*before, *after[:-1]])
        counted = vault.counters.rows
        if rogue.ends == "up":
            wrong += scene.wrong(vault, after[-1])
            counters = vault.counters
            assert 0 <= counters.seconds_worker <= 10 and counters.seconds_link >= 0
            detected = states(vault) == ["up"]
        else:
            with pytest.raises(rogue.error) as caught:
                wrong += 1 - scene.wrong(vault, after[-1])
            detected = advises(caught.value)
            assert detected, f"{type(caught.value).__name__}: {caught.value}"
            assert vault.counters.rows == counted, "nothing of it was used"
            assert states(vault) == [rogue.ends]
            rogue.heal()
            vault.rejoin(bad)
        wrong += scene.wrong(vault, after[-1])
        assert states(vault) == ["up"], "the vault lives on"
        ledger.record(f"worker: {name}", 1, detected, wrong)
        assert wrong == 0
    assert one_mask_one_message([rogue.messages]) == 0


@pytest.mark.parametrize("name", ROGUES)
def test_alone_where_the_owner_lets_the_vault_compute(name: str, scene: Scene, ledger: Ledger) -> None:
    rogue = ROGUES[name](scene.means)
    before, after = scene.requests(rogue)
    with ExitStack() as stack:
        bad = stack.enter_context(serving(rogue, scene.means.keys, "rogue"))
        if rogue.bystander:
            stack.enter_context(vault_of(scene, rogue, [bad]))
        vault = stack.enter_context(vault_of(scene, rogue, [bad], fallback="here"))
        wrong = sum(scene.wrong(vault, request) for request in [*before, *after[:-1]])
        assert vault.counters.rows_here == 0
        wrong += scene.wrong(vault, after[-1])
        wrong += scene.wrong(vault, after[-1])
        said = [record.event for record in vault.audit.records].count("computed here")
        expected = 0 if rogue.ends == "up" else 2 * len(after[-1][1])
        ledger.record(f"worker: {name}", 1, vault.counters.rows_here == expected, wrong)
        assert wrong == 0
        assert (vault.counters.rows_here, said) == (expected, int(expected > 0))
    assert one_mask_one_message([rogue.messages]) == 0


@pytest.mark.parametrize(
    "name",
    [
        "another authority's certificate",
        "a vault's certificate",
        "an expired certificate",
        "a revoked certificate",
        "no TLS",
        "TLS 1.2",
        "WELCOME of another split",
        "random bytes for WELCOME",
        "hangs up on whoever connects",
    ],
)
def test_bad_from_the_first_connection_on(name: str, scene: Scene) -> None:
    """The vault starts with whoever else is there, or not at all."""
    rogue, honest = ROGUES[name](scene.means, after=0), Honest(scene.means.share)
    if name == "a revoked certificate":
        authority.revoke(scene.means.keys, "rogue")
    with (
        serving(rogue, scene.means.keys, "worker") as bad,  # our listener would refuse keys that were revoked
        serving(honest, scene.means.keys, "honest") as good,
    ):
        with pytest.raises(rogue.error):
            Vault(scene.vault, Terms([bad], scene.means.share, ahead=0, timeout=rogue.timeout))
        with vault_of(scene, rogue, [bad, good]) as vault:
            assert scene.wrong(vault, (scene.groups[ASKED], scene.inputs(3, 0))) == 0
            assert states(vault) == [rogue.ends, "up"]
            assert [record.event for record in about(vault, bad)] == [rogue.ends]
    assert rogue.messages == [], "it saw nothing"


# --- dealers -------------------------------------------------------------------------------------------

DEALERS = (
    "one entry by one",
    "the last entry of the last row",
    "all zero",
    "all 2^32 - 1",
    "a low-rank error",
    "replayed from another group",
    "replayed from another token",
    "the product of another split's share",
    "random bytes",
    "an announced length of 4 GiB",
    "FAULT with terminal escapes",
    "a second frame in the packet",
    "bytes without end",
    "stalls for ever",
    "one byte at a time",
    "half an answer, then hangs up",
    "hangs up on every question",
    "hangs up after every answer",
    "HELLO echoed",
    "WELCOME of another split",
    "another authority's certificate",
    "revoked while it is asked",
)


@pytest.mark.parametrize("name", DEALERS)
def test_another_dealer_takes_over(name: str, scene: Scene, ledger: Ledger) -> None:
    rogue, dealer, worker = ROGUES[name](scene.means), Honest(scene.means.share), Honest(scene.means.share)
    before, after = scene.requests(rogue)
    keys = scene.means.keys
    with (
        serving(rogue, keys, "rogue") as bad,
        serving(dealer, keys, "honest") as good,
        serving(worker, keys, "worker") as address,
        vault_of(scene, rogue, [address], dealing_share=None, dealers=[bad, good]) as vault,
    ):
        wrong = sum(scene.wrong(vault, request) for request in before)
        assert dealer.deals == 0
        wrong += sum(scene.wrong(vault, request) for request in after)
        records = about(vault, bad)
        detected = len(records) == 1 and named(records[0], rogue, "dealer", after[-1][0], over_tls=True)
        ledger.record(f"dealer: {name}", 1, detected, wrong)
        assert wrong == 0
        assert detected, records
        assert states(vault) == ["up", rogue.ends, "up"]
        assert about(vault, address) == about(vault, good) == []
        assert len(worker.messages) == len(before) + len(after), "the worker is not asked twice"
    assert one_mask_one_message([worker.messages]) == 0
    assert rogue.messages == dealer.messages == [], "a dealer sees no message"


@pytest.mark.parametrize("name", DEALERS)
def test_a_dealer_alone_stops_the_request_and_nothing_else(
    name: str, scene: Scene, tmp_path: Path, ledger: Ledger
) -> None:
    """Until another that was named comes up."""
    rogue, dealer, worker = ROGUES[name](scene.means), Honest(scene.means.share), Honest(scene.means.share)
    before, after = scene.requests(rogue)
    later = tmp_path / "later.sock"
    with (
        serving(rogue, scene.means.keys, "rogue") as bad,
        serving(worker, tmp_path / "w.sock") as address,
        vault_of(scene, rogue, [address], dealing_share=None, dealers=[bad, f"shm:{later}"]) as vault,
    ):
        wrong = sum(scene.wrong(vault, request) for request in before)
        with pytest.raises(DealerError) as caught:
            wrong += sum(scene.wrong(vault, request) for request in after)
        ledger.record(f"dealer: {name}", 1, advises(caught.value), wrong)
        assert advises(caught.value), caught.value
        served = vault.counters.exchanges
        assert len(worker.messages) == served, "nothing is sent under a mask that nobody vouches for"
        assert states(vault) == ["up", rogue.ends, "lost"]
        dealer._wanted = "dealer"
        with serving(dealer, later):
            assert scene.wrong(vault, after[-1]) == 0
            assert states(vault) == ["up", rogue.ends, "up"]
    assert wrong == 0


@pytest.mark.parametrize("name", DEALERS)
def test_a_dealer_alone_where_the_vault_has_the_share(name: str, scene: Scene, ledger: Ledger) -> None:
    rogue, worker = ROGUES[name](scene.means), Honest(scene.means.share)
    before, after = scene.requests(rogue)
    with (
        serving(rogue, scene.means.keys, "rogue") as bad,
        serving(worker, scene.means.keys, "worker") as address,
        vault_of(scene, rogue, [address], dealers=[bad]) as vault,
    ):
        wrong = sum(scene.wrong(vault, request) for request in [*before, *after, after[-1]])
        # who hangs up on each question is asked again at once, for want of another, but not for ever
        detected = states(vault) in (["up", rogue.ends], ["up", "suspended"])
        ledger.record(f"dealer: {name}", 1, detected, wrong)
        assert wrong == 0
        assert detected, states(vault)
        assert vault.counters.rows_here == 0, "online, the worker is asked as ever"
    assert one_mask_one_message([worker.messages]) == 0


# --- the rogues themselves -----------------------------------------------------------------------------


def test_there_are_enough() -> None:
    assert len(ROGUES) >= 30


@pytest.mark.parametrize("kind", [Rogue, Honest])
def test_the_servers_are_honest_without_their_lie(kind: Callable[[Any], Honest], scene: Scene) -> None:
    """The control: what the rogues have in common is not what is detected."""
    worker = kind(scene.means if kind is Rogue else scene.means.share)
    with serving(worker, scene.means.keys, "rogue") as address:
        with Vault(scene.vault, Terms([address], scene.means.share, ahead=0)) as vault:
            for seed in range(20):
                assert scene.wrong(vault, (scene.groups[ASKED], scene.inputs(3, seed))) == 0
            assert (vault.audit.records, states(vault)) == ((), ["up"])


def test_two_messages_under_one_mask_would_be_noticed() -> None:
    """The control of `one_mask_one_message`."""
    generator = np.random.default_rng(1)
    mask = generator.integers(0, 2**32 - 5, (1, 64), dtype=np.uint32)
    other = ((mask.astype(np.int64) + generator.integers(-(2**18), 2**18, mask.shape)) % (2**32 - 5)).astype(
        np.uint32
    )
    assert one_mask_one_message([[(0, mask)], [(0, other)]]) == 1
    assert one_mask_one_message([[(0, mask)], [(0, mask)]]) == 0
    assert one_mask_one_message([[(0, mask)], [(1, other)]]) == 0
