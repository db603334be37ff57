"""`slip inspect`."""

from __future__ import annotations

import json as json_format
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sliplm.cli.options import Json
from sliplm.cli.screen import add_difference, console, number, percent, print_json, size, warn_of_tail
from sliplm.shares.folders import side_of
from sliplm.shares.manifest import PLAIN_MODULE, WorkerGroup, public_split_id
from sliplm.shares.sealing import read_seal
from sliplm.shares.shards import shards_of
from sliplm.shares.share import SHARE, open_worker, read_vault_manifest

if TYPE_CHECKING:
    from sliplm.planning.counts import GroupReport, SplitReport
    from sliplm.shares.manifest import VaultManifest
    from sliplm.shares.sealing import Seal
    from sliplm.shares.share import WorkerShare

T = TypeVar("T", "GroupReport", WorkerGroup)


def command(
    folder: Annotated[
        Path, typer.Argument(help="The folder that a split wrote, or its vault or worker folder.")
    ],
    *,
    all_groups: Annotated[
        bool, typer.Option("--all", help="A row for every group, equal layers too.")
    ] = False,
    json: Json = False,
) -> None:
    """Say what is where: sizes, the vault's part of the work, and the traffic of a token.

    Of a worker folder it says what its operator can see, after checking the folder's digests. Of a vault it
    reads the manifest, which is in clear and is only verified when the vault is opened: no key is needed.

    Example: slip inspect out

    Example: slip inspect out/worker --all
    """
    path = folder / "vault" if side_of(folder / "vault") == "vault" else folder
    if side_of(path) == "worker":
        _worker(console(json=json), open_worker(path), all_groups, json)
        return
    from sliplm.planning.counts import report_for

    manifest, seal = read_vault_manifest(path), read_seal(path)
    report = report_for(manifest)
    screen = console(json=json)
    if json:
        print_json(
            {"split_id": manifest.split_id, "source": manifest.source.model_dump(), "sealed": _sealed(seal)}
            | _shards(manifest)
            | report.model_dump(mode="json")
        )
        return
    _head(screen, manifest, seal)
    unit = "call" if manifest.source.config_class == PLAIN_MODULE else "token"
    screen.print(_groups(report, all_groups, unit))
    screen.print(_totals(report, unit))
    for shard in _shards(manifest).get("shards", []):
        first, last = escape(shard["groups"][0]), escape(shard["groups"][-1])
        screen.print(
            f"[bold]{shard['folder']}[/]  {size(shard['bytes'])}, {len(shard['groups'])} groups: "
            f"{first} to {last}",
            soft_wrap=True,
        )
    warn_of_tail(screen, report)


def _shards(manifest: VaultManifest) -> dict[str, Any]:
    """Which worker's folder holds which groups, where there are several."""
    if not manifest.shards:
        return {}
    names = [group.name for group in manifest.groups]
    found = [
        {
            "folder": shard.folder,
            "groups": names[shard.first : shard.first + shard.groups],
            "bytes": record.files[SHARE].bytes,
        }
        for shard, record in zip(shards_of(manifest), manifest.shards, strict=True)
    ]
    return {"shards": found}


def _sealed(seal: Seal) -> str:
    if seal.argon2id is None:
        return "with a key"
    numbers = seal.argon2id
    return (
        f"with a passphrase (Argon2id: {numbers.memory_kib} KiB, {numbers.iterations} iterations, "
        f"{numbers.lanes} lanes)"
    )


def _head(screen: Console, manifest: VaultManifest, seal: Seal) -> None:
    source = manifest.source
    screen.print(
        f"[bold]{escape(source.name)}[/] ({source.config_class}, {number(source.parameters)} parameters), "
        f"split {manifest.split_id[:8]} by sliplm {manifest.sliplm}; "
        f"the vault share is sealed {_sealed(seal)}"
    )
    if manifest.base is not None and manifest.recipe.tail == "drop":
        screen.print(
            f"The worker's share is the public {escape(manifest.base.name)} alone, rounded: it hides "
            "nothing, and nothing of yours is in it. Every split against it with these groups and bits has "
            "the same."
        )


def _groups(report: SplitReport, all_groups: bool, unit: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("group", overflow="fold", min_width=16)
    table.add_column("matrix", max_width=24)
    for title in ("in worker\nand vault", "vault's\nwork", f"out, back\na {unit}", "error,\nmax |v|"):
        table.add_column(title, justify="right", min_width=max(map(len, title.split("\n"))))
    for same in fold(report.groups, _look, all_groups):
        group = same[0]
        if group.placement == "vault":
            table.add_row(
                _name(same), f"{_size(group)}\n[dim]{_why(group)}[/]", "", "100 %" if group.plain_macs else ""
            )
            continue
        ranks = sorted({g.rank for g in same})
        how = [f"rank {ranks[0]}" if len(ranks) == 1 else f"rank {ranks[0]} to {ranks[-1]}"]
        how += [f"{group.precision} bits", group.rotation]
        if report.base is not None:  # the head of the page says in what basis the base is, and what is kept
            how = how[0 if ranks[-1] else 1 : 2]
        table.add_row(
            _name(same),
            f"{_size(group)}\n[dim]{', '.join(how)}[/]",
            f"{size(group.worker_bytes)}\n{size(max(g.vault_bytes for g in same))}",
            percent(max(g.vault_macs_share for g in same)),
            f"{size(group.bytes_to_worker)}\n{size(group.bytes_from_worker)}",
            _quality(same),
        )
    return table


def _quality(same: Sequence[GroupReport]) -> str:
    """The largest error, and the largest entry of a singular vector of what is hidden."""
    errors = [g.error for g in same if g.error is not None]
    entries = [g.localisation for g in same if g.localisation is not None]
    lines = [f"{max(errors):.1e}"] if errors else []
    return "\n".join([*lines, f"[dim]{max(entries):.2f}[/]"] if entries else lines)


def _size(group: GroupReport) -> str:
    times = f", {number(group.positions)} times" if group.positions > 1 else ""
    if group.exchange:
        times = f", for {percent(group.use)} of the tokens"
    return f"{group.rows} x {group.columns}{times}"


def _why(group: GroupReport) -> str:
    return escape(f"whole: {group.reason}" if group.reason else "whole, in the vault")


def _totals(report: SplitReport, unit: str) -> Table:
    macs = report.vault_macs
    kinds = {"low rank": macs.low_rank, "rotations": macs.rotations, "checks": macs.checks,
             "fixed point": macs.fixed_point, "whole layers": macs.whole}  # fmt: skip
    work = ", ".join(f"{name} {percent(n / max(1, report.plain_macs))}" for name, n in kinds.items() if n)
    attention = ", ".join(
        f"{percent(n / max(1, report.plain_macs))} at {context} tokens"
        for context, n in report.attention_macs.items()
    )
    secret = report.vault_bytes - report.kept_bytes
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column()
    table.add_row("vault's bytes", percent(report.vault_bytes_share),
                  f"{size(report.vault_bytes)}: {size(report.kept_bytes)} kept whole, "
                  f"{size(secret)} secrets of split matrices")  # fmt: skip
    table.add_row("worker's bytes", percent(1 - report.vault_bytes_share), size(report.worker_bytes))
    table.add_row("vault's work", percent(report.vault_macs_share),
                  f"of the {number(report.plain_macs)} multiply-adds in linear layers: {work}")  # fmt: skip
    if attention:
        table.add_row("", "", f"and attention, in the vault beside it: {attention}")
    table.add_row("link", size(report.bytes_to_worker + report.bytes_from_worker),
                  f"a {unit} in {report.exchanges} exchanges: {size(report.bytes_to_worker)} out, "
                  f"{size(report.bytes_from_worker)} back")  # fmt: skip
    table.add_row("masks", size(report.mask_bytes), f"of memory for each {unit} dealt ahead")
    entries = [group.localisation for group in report.groups if group.localisation is not None]
    if entries:
        table.add_row("max |v|", f"{max(entries):.2f}",
                      "largest entry of a singular vector of what is hidden; at 1 it would show a column "
                      "of the secret basis")  # fmt: skip
    add_difference(table, report)
    return table


# --- a worker's folder alone -----------------------------------------------------------------------------


def _worker(screen: Console, share: WorkerShare, all_groups: bool, json: bool) -> None:
    groups = share.manifest.groups
    total = sum(share.matrices[group.name].nbytes for group in groups)
    place = share.manifest.shard
    # of a public base all shards together show that they are one
    public = place is None and share.split_id == public_split_id(groups, share.manifest.files[SHARE])
    if json:
        document = json_format.loads(share.manifest.model_dump_json())
        fields = {key: document[key] for key in ("split_id", "groups", "files")}
        told = {"public_base": public} if place is None else {"shard": place.model_dump()}
        print_json(fields | {"worker_bytes": total} | told)
        return
    screen.print(
        f"[bold]What the operator of this worker sees[/], split {share.split_id[:8]}"
        + ("" if place is None else f", shard {place.number} of {place.shards}")
        + "; digests are right\n"
    )
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("group", overflow="fold")
    table.add_column("matrix", max_width=24)
    table.add_column("integers")
    table.add_column("bytes", justify="right")
    for same in fold(groups, lambda g: (g.rows, g.columns, g.dtype), all_groups):
        group = same[0]
        kind = {"I8": "8 bits", "I16": "16 bits"}[group.dtype]
        table.add_row(
            _name(same), f"{group.rows} x {group.columns}", kind, size(share.matrices[group.name].nbytes)
        )
    screen.print(table)
    screen.print(
        f"{len(groups)} integer matrices, {size(total)}; and, while it serves, uniform field elements: how "
        "many, and when. No scale, basis, removed part, embedding, norm or bias; no token; no tokenizer."
    )
    if not public and any(group.name.rpartition(".")[2].isdigit() for group in groups):
        screen.print(
            "Of a mixture it sees which experts are chosen, by secret numbers, unless the vault is loaded "
            "with hide_routing."
        )
    if public:
        screen.print(
            "\nBy its split id these matrices are a public model's, in clear: they hide nothing. To see that "
            "they are nothing else, split that model yourself (slip split BASE OUT --base BASE) and compare "
            "the files."
        )


# --- folding ---------------------------------------------------------------------------------------------


def fold(groups: Sequence[T], look: Callable[[T], Hashable], all_groups: bool) -> list[list[T]]:
    """Put groups together whose names differ in numbers only and that look the same, in order."""
    found: dict[Hashable, list[T]] = {}
    for i, group in enumerate(groups):
        numberless = tuple("#" if part.isdigit() else part for part in group.name.split("."))
        found.setdefault(i if all_groups else (numberless, look(group)), []).append(group)
    return list(found.values())


def pattern(names: Sequence[str]) -> str:
    """One name for names that differ in numbers only: model.layers.{0..29}.mlp.down_proj."""
    return ".".join(_pieces(names))


def _pieces(names: Sequence[str]) -> list[str]:
    return [_range(column) for column in zip(*(name.split(".") for name in names), strict=True)]


def _range(parts: Sequence[str]) -> str:
    if len(set(parts)) == 1:
        return parts[0]
    numbers = sorted({int(part) for part in parts})
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return "{" + ",".join(f"{a}..{b}" if b > a else f"{a}" for a, b in runs) + "}"


# what differs between groups that look the same
_OWN = {"name", "error", "svd_error", "localisation", "vault_macs", "change", "left_out", "exchange"}
_RANKED = {"rank", "vault_bytes", "vault_macs_share"}  # and where the ranks follow from an energy


def _look(group: GroupReport) -> Hashable:
    return tuple(group.model_dump(exclude=_OWN if group.left_out is None else _OWN | _RANKED).values())


def _name(same: Sequence[Any]) -> Text:
    """The name on two lines, broken after the last number that is not its end."""
    pieces = _pieces([group.name for group in same])
    numbers = [i for i, piece in enumerate(pieces[:-1], 1) if piece[-1:].isdigit() or piece[-1:] == "}"]
    first, rest = pieces[: numbers[-1] if numbers else 0], pieces[numbers[-1] if numbers else 0 :]
    count = (f" x{len(same)}" if len(same) > 1 else "") + ("\n" if first else "")
    head = Text("".join(f"{piece}." for piece in first), style="dim")
    return head.append(count).append(".".join(rest), style="not dim bold")
