"""`slip deal`."""

from __future__ import annotations

import heapq
import re
import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from sliplm.cli.inspect import pattern
from sliplm.cli.options import Json, Key, Ray
from sliplm.cli.screen import console, number, print_json, size
from sliplm.errors import InputError, PoolError
from sliplm.shares.folders import SIDES, side_of

if TYPE_CHECKING:
    from sliplm.cluster.tasks import Executor
    from sliplm.masks.maskfile import Drawn, Product
    from sliplm.masks.poolfolder import GroupStock, PoolWriter
    from sliplm.network.link import Link
    from sliplm.network.transport import Connection
    from sliplm.parties.audit import AuditLog
    from sliplm.parties.dealer import Dealing
    from sliplm.protocol.vault_side import Welcome
    from sliplm.shares.share import VaultShare, WorkerShare

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_DEALER_SECONDS = 60.0  # limit of every wait for a dealer
_SPARE = 16 << 20  # bytes of a disk that are left alone


class _Batch(NamedTuple):
    group: int
    rows: int
    bytes: int


def command(
    vault: Annotated[Path, typer.Argument(help="The vault folder that a split wrote.")],
    pool: Annotated[
        Path, typer.Argument(help="The pool folder; it is made, and may hold pools of several splits.")
    ],
    *,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Deal until the masks for so many tokens are ready: one a token and group; of a mixture's "
            "experts what they are expected to need, and a reserve.",
        ),
    ] = None,
    status: Annotated[bool, typer.Option("--status", help="Only say what is ready.")] = False,
    share: Annotated[
        Path | None,
        typer.Option(
            help="A worker folder to deal from, or that with all shards in it; by default the one beside "
            "VAULT, none with --dealer."
        ),
    ] = None,
    dealer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ADDRESS",
            help="A worker that deals, and does not collude with those that are "
            "asked later. May be given several times.",
        ),
    ] = None,
    limit: Annotated[
        str | None, typer.Option(metavar="SIZE", help="How large this pool may grow: 500M, 20G.")
    ] = None,
    key: Key = None,
    anchor: Annotated[
        str | None,
        typer.Option(
            metavar="CMD",
            help="A command that keeps the pool's token elsewhere, so that a restored machine is noticed; by "
            "default it is kept in ~/.local/state/sliplm/anchors ($SLIPLM_STATE).",
        ),
    ] = None,
    audit: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Append a line of JSON for each dealer that dealt, lied, stalled or was refused.",
        ),
    ] = None,
    hide_routing: Annotated[
        bool,
        typer.Option(
            "--hide-routing",
            help="For a vault that is loaded with hide_routing: every expert is asked for every token.",
        ),
    ] = False,
    ray: Ray = None,
    json: Json = False,
) -> None:
    """Deal masks ahead of time, into a folder on the vault's disk.

    A token takes one mask of each group; of a mixture's experts, of those that are chosen. Masks that are
    there count; Ctrl-C keeps what is whole, and the same command goes on. A vault may use the pool meanwhile.
    With --ray, all machines of the cluster must see the worker's folder under the same path.

    Example: slip deal out/vault pool --tokens 10000

    Example: slip deal out/vault pool --tokens 10000 --dealer "other.example:7400?keys=keys/vault"

    Example: slip deal out/vault pool --status
    """
    if status == (tokens is not None):
        raise InputError("say how many: --tokens 10000, or ask what is there: --status")
    if ray is not None and dealer:
        raise InputError("--ray deals on your own machines and --dealer on others: give one of them")
    most = None if limit is None else _bytes(limit)
    from sliplm.cluster.onray import executor
    from sliplm.masks.poolfolder import stock
    from sliplm.shares.shards import open_all
    from sliplm.shares.share import open_vault

    opened = open_vault(vault, key)
    shapes = [(secrets.m, secrets.n) for secrets in opened.groups.values()]
    uses = [1.0 if hide_routing else group.use for group in opened.manifest.groups]
    if side_of(pool) is not None or any(side_of(pool / side) == side for side in SIDES):
        raise InputError(f"{pool} is a split's folder, where a pool has no place: name another")
    if tokens is not None:
        here = None if share is None and dealer else open_all(opened, share)
        with executor(ray) as there, _dealing(opened, shapes, here, dealer or [], pool, audit) as dealing:
            own = dealing.products if ray is None or here is None else _Cluster(opened, here, dealing, there)
            _deal(opened, pool, shapes, uses, tokens, own, most, anchor)
    stocks = stock(pool, opened.pool_name, opened.pool_key, shapes)
    served = _tokens(uses, stocks)
    _show(console(json=json), list(opened.groups), stocks, served)
    if json:
        named = zip(opened.groups, stocks, strict=True)
        print_json(
            {
                "split_id": opened.split_id,
                "tokens": served,
                "bytes": sum(group.bytes for group in stocks),
                "groups": [{"name": name} | group._asdict() for name, group in named],
            }
        )


@contextmanager
def _dealing(
    vault: VaultShare, shapes: Sequence[tuple[int, int]], share: WorkerShare | None, dealers: list[str],
    pool: Path, audit: Path | None,
) -> Iterator[Dealing]:  # fmt: skip
    """Who makes the products, and checks them: dealers, the worker share, or both; who it was is recorded."""
    from sliplm.parties.audit import AuditLog
    from sliplm.parties.codec import GroupCodec
    from sliplm.parties.dealer import Dealing, ShareDealer
    from sliplm.parties.quarantine import Quarantine
    from sliplm.parties.workforce import Workforce
    from sliplm.shares.shards import shards_of

    here = None if share is None else ShareDealer(share)
    codecs = [GroupCodec(secrets) for secrets in vault.groups.values()]
    log, own = AuditLog(audit), Quarantine.own()
    others: Workforce | None = None

    def known(link: Link, connection: Connection, welcome: Welcome) -> None:
        if others is not None:
            others.known_liar(link)

    with ExitStack() as held:
        if dealers:
            others = Workforce.of(
                dealers,
                "dealer",
                vault.split_id,
                shapes,
                _DEALER_SECONDS,
                log,
                known,
                quarantine=own,
                shards=shards_of(vault.manifest),
            )
            held.callback(others.close)
            others.open_one()
        dealing = Dealing(codecs, here, others)
        held.callback(_record, log, dealing, pool / vault.pool_name)
        yield dealing


def _record(log: AuditLog, dealing: Dealing, pool: Path) -> None:
    for (address, peer), rows in dealing.tally.items():
        if address is None:
            log.write("dealt", f"{rows} rows into {pool}, from the worker share on this machine")
        else:
            log.write("dealt", f"{rows} rows into {pool}", role="dealer", address=address, peer=peer)


def _tokens(uses: Sequence[float], stocks: Sequence[GroupStock]) -> int:
    """For about how many tokens the masks on disk are enough."""
    from sliplm.masks.expected import planned, tokens_for

    expected = planned(uses, [group.burnt for group in stocks])
    return min(tokens_for(group.ready, use) for group, use in zip(stocks, expected, strict=True))


def _deal(
    vault: VaultShare, pool: Path, shapes: Sequence[tuple[int, int]], uses: Sequence[float], tokens: int,
    dealt: Product | _Cluster, limit: int | None, anchor: str | None,
) -> None:  # fmt: skip
    from sliplm.masks.anchor import CommandAnchor, file_anchor
    from sliplm.masks.expected import planned, rows_for
    from sliplm.masks.poolfolder import PoolWriter, stock

    place = file_anchor() if anchor is None else CommandAnchor(anchor)
    with PoolWriter(pool, vault.pool_name, vault.pool_key, shapes, place) as writer:
        there = stock(pool, vault.pool_name, vault.pool_key, shapes)
        ready = [group.ready for group in there]
        expected = planned(uses, [group.burnt for group in there])
        wanted = [rows_for(tokens, use) for use in expected]
        needed = _missing_bytes(shapes, ready, wanted)
        _check_room(pool, shapes, expected, there, needed, limit, tokens, _tokens(uses, there))
        batches = _plan(shapes, ready, wanted)
        if batches:
            added = _added(writer, batches, dealt)
            _with_progress(added, sum(batch.bytes for batch in batches), sum(expected))


def _added(writer: PoolWriter, batches: Sequence[_Batch], dealt: Product | _Cluster) -> Iterator[_Batch]:
    """The batches, each when it is there for good."""
    if isinstance(dealt, _Cluster):
        yield from dealt.added(writer, batches)
        return
    for batch in batches:
        writer.add(batch.group, batch.rows, dealt)
        yield batch


class _Cluster:
    """Deals on many machines; here keys are drawn, products checked, numbers given and files written."""

    def __init__(self, vault: VaultShare, share: WorkerShare, dealing: Dealing, executor: Executor) -> None:
        from sliplm.shares.shards import shards_of

        self._share, self._shards = share.path.resolve(), shards_of(vault.manifest)
        self._inputs = [secrets.n for secrets in vault.groups.values()]
        self._dealing, self._executor = dealing, executor

    def added(self, writer: PoolWriter, batches: Sequence[_Batch]) -> Iterator[_Batch]:
        """As `_added`."""
        from sliplm.cluster.tasks import in_order
        from sliplm.parties.dealer import DealTask, carry_out, open_dealer

        begun: deque[tuple[_Batch, Drawn]] = deque()

        def tasks() -> Iterator[DealTask]:
            for batch in batches:
                drawn = writer.draw()
                begun.append((batch, drawn))
                yield DealTask(batch.group, batch.rows, self._inputs[batch.group], drawn.r_key)

        with self._executor.pool(partial(open_dealer, self._share, self._shards, "cpu"), carry_out) as pool:
            for u in in_order(pool, tasks()):
                batch, drawn = begun.popleft()
                r = drawn.r(batch.group, batch.rows, self._inputs[batch.group])
                dealt = self._dealing.accepted(batch.group, r, u, "a machine of the cluster")
                writer.put(batch.group, batch.rows, drawn, dealt)
                yield batch


def _missing_bytes(shapes: Sequence[tuple[int, int]], ready: Sequence[int], wanted: Sequence[int]) -> int:
    """What `_plan` would write, without planning it: a number may be mistyped."""
    from sliplm.masks.maskfile import batch_rows, file_bytes

    total = 0
    for (m, n), have, rows in zip(shapes, ready, wanted, strict=True):
        whole, rest = divmod(max(0, rows - have), batch_rows(m, n))
        total += whole * file_bytes(m, batch_rows(m, n)) + (file_bytes(m, rest) if rest else 0)
    return total


def _plan(shapes: Sequence[tuple[int, int]], ready: Sequence[int], wanted: Sequence[int]) -> list[_Batch]:
    """The batches that are missing; the group that has the smallest part of its rows comes first."""
    from sliplm.masks.maskfile import batch_rows, file_bytes

    have, batches = list(ready), []
    waiting = [(have[g] / wanted[g], g) for g in range(len(have)) if have[g] < wanted[g]]
    heapq.heapify(waiting)
    while waiting:
        _, group = heapq.heappop(waiting)
        m, n = shapes[group]
        rows = min(batch_rows(m, n), wanted[group] - have[group])
        batches.append(_Batch(group, rows, file_bytes(m, rows)))
        have[group] += rows
        if have[group] < wanted[group]:
            heapq.heappush(waiting, (have[group] / wanted[group], group))
    return batches


def _check_room(
    pool: Path, shapes: Sequence[tuple[int, int]], uses: Sequence[float], there: Sequence[GroupStock],
    needed: int, limit: int | None, tokens: int, ready: int,
) -> None:  # fmt: skip
    """Refuse what does not fit before any of it is dealt."""
    from sliplm.masks.maskfile import row_bytes

    room, why = shutil.disk_usage(pool).free - _SPARE, "the disk has room for"
    if limit is not None and limit - sum(group.bytes for group in there) < room:
        room, why = limit - sum(group.bytes for group in there), "the limit leaves room for"
    if needed > room:
        a_token = sum(use * row_bytes(m) for (m, _), use in zip(shapes, uses, strict=True))
        more = int(max(0, room) * 99 // (100 * a_token))  # headers, and groups that are ahead
        raise PoolError(
            f"masks for {tokens} tokens take {size(needed)} more, and {why} {size(max(0, room))}: about "
            f"{number(ready + more)} tokens fit; nothing was dealt"
        )


def _with_progress(added: Iterable[_Batch], total: int, a_token: float) -> None:
    screen = Console(stderr=True, highlight=False)
    bar = Progress(
        TextColumn("dealing"), BarColumn(bar_width=None), TaskProgressColumn(),
        TextColumn("{task.fields[counts]}"), TimeRemainingColumn(compact=True),
        console=screen, disable=not screen.is_terminal, transient=True, expand=True,
    )  # fmt: skip
    done, rows, start = 0, 0, time.monotonic()
    task = bar.add_task("", total=total, counts="")
    with bar:
        for batch in added:
            done, rows = done + batch.bytes, rows + batch.rows
            speed = rows / a_token / max(1e-9, time.monotonic() - start)
            counts = f"{size(done)} of {size(total)}, {number(speed)} tokens/s"
            bar.update(task, completed=done, counts=counts)


def _show(screen: Console, names: Sequence[str], stocks: Sequence[GroupStock], served: int) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("group", overflow="fold")
    for title in ("ready", "burnt", "bytes"):
        table.add_column(title, justify="right")
    for same, group in _folded(names, stocks):
        count = f" x{len(same)}" if len(same) > 1 else ""
        table.add_row(Text(pattern(same) + count), str(group.ready), str(group.burnt), size(group.bytes))
    screen.print(table)
    total = sum(group.bytes for group in stocks)
    screen.print(f"masks for {served} tokens are ready; {size(total)} on disk", soft_wrap=True)


def _folded(names: Sequence[str], stocks: Sequence[GroupStock]) -> list[tuple[list[str], GroupStock]]:
    """Groups whose names differ in numbers only, and that have the same, together."""
    found: dict[tuple[str, GroupStock], list[str]] = {}
    for name, group in zip(names, stocks, strict=True):
        found.setdefault((re.sub(r"\b\d+\b", "#", name), group), []).append(name)
    return [(same, group) for (_, group), same in found.items()]


def _bytes(text: str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMGT]?)B?\s*", text)
    if match is None:
        raise InputError(f"--limit {text}: give a size such as 500M or 20G")
    return int(float(match[1]) * _UNITS[match[2]])
