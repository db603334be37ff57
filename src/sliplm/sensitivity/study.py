"""The study of a model: spectra, the loss without the top of its matrices, and what the vault would cost.

Whatever is finished is kept in `out/.work`, and not done again.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from sliplm.engines.transformers.plan import kept_tensors
from sliplm.planning.planner import Planner, account
from sliplm.sensitivity.factors import Factors, Library
from sliplm.sensitivity.opening import free_memory, open_model
from sliplm.sensitivity.removal import Loss, MixedRowsError, Removal
from sliplm.sensitivity.results import Cost, Measurement, Results, Spectrum
from sliplm.sensitivity.subject import Part, Subject
from sliplm.sensitivity.variants import Grid, Variant, variants
from sliplm.sensitivity.work import Work
from sliplm.shares.recipe import Recipe, Rule
from sliplm.shares.rules import Piece, blank
from sliplm.shares.sealing import sealed_bytes
from sliplm.shares.share import sliplm_version

Progress = Callable[[str, int, int, str], None]
"""Called with the stage, what is done, what is to do in all, and what comes next."""

SPECTRUM_POINTS = 64  # singular values of a group that the results list


def digest(windows: Tensor) -> str:
    """What tells one text from another: of int64 windows [count, length]."""
    head = f"{list(windows.shape)}|".encode()
    return hashlib.sha256(head + windows.cpu().contiguous().numpy().tobytes()).hexdigest()


def run_study(
    subject: Subject,
    out: Path,
    windows: Tensor,
    grid: Grid,
    device: torch.device,
    offload: bool | None = None,
    progress: Progress | None = None,
) -> Results:
    """Measure all variants of a grid.

    Args:
        windows: int64 [count, length], the text; the first token of each window is not predicted.
        offload: as `open_model`.

    Raises:
        CheckpointError: a weight cannot be read, or the model not loaded.
        MismatchError: `out` is about another checkpoint.  ShareError: it cannot be written, or is in use.
    """
    tell = progress or (lambda stage, done, total, name: None)
    checkpoint = [subject.stored.checkpoint.fingerprint(), sliplm_version()]
    with Work(out, checkpoint, digest(windows)) as work:
        library = Library(work.folder, subject, grid.top)
        factors = library.complete(device, lambda *step: tell("spectra", *step))
        todo = [v for v in variants(subject, grid) if v.key not in work.losses]
        if todo:
            tell("model", 0, 1, subject.stored.checkpoint.path.name)
            _measure(subject, work, windows, todo, factors, device, offload, tell)
        losses = {v: work.losses[v.key] for v in variants(subject, grid)}
    return _results(subject, windows, grid, factors, losses, device)


def _measure(
    subject: Subject,
    work: Work,
    windows: Tensor,
    todo: Sequence[Variant],
    factors: dict[str, Factors],
    device: torch.device,
    offload: bool | None,
    tell: Progress,
) -> None:
    converted = work.folder / "offload"
    stored = subject.stored
    model = open_model(stored.checkpoint.path, stored.layout, device, offload, converted)
    rows = _rows(subject, windows.shape[1], device, offloaded=hasattr(model, "hf_device_map"))
    side_by_side = max(1, rows // len(windows))
    done = 0
    with closing(Removal(model, subject.parts, factors, device)) as removal:
        while done < len(todo):
            batch = todo[done : done + side_by_side]
            tell("losses", done, len(todo), str(batch[0]))
            try:
                losses = removal.losses(batch, windows.to(device), rows)
            except MixedRowsError:
                side_by_side = 1
                continue
            except torch.cuda.OutOfMemoryError:
                if rows == 1:
                    raise
                torch.cuda.empty_cache()
                rows //= 2
                side_by_side = max(1, rows // len(windows))
                continue
            for variant, loss in zip(batch, losses, strict=True):
                work.add(variant, loss)
            done += len(batch)
    tell("losses", done, len(todo), "")
    shutil.rmtree(converted, ignore_errors=True)


def _rows(subject: Subject, length: int, device: torch.device, *, offloaded: bool) -> int:
    """Windows that go through the model at once, all variants' together.

    Many keep a GPU busy, and are worth it where every pass reads the weights from the disk; on a CPU a few
    are as fast as many, and show that the work goes on.  An eighth of the free memory is the bound.
    """
    widest = max(part.group.columns for part in subject.parts)
    token = 4 * (int(subject.stored.layout.config.get_text_config().vocab_size) + 8 * widest)
    usual = 65536 if device.type == "cuda" else 16384 if offloaded else 2048
    return max(1, min(usual, free_memory(device) // 8 // token) // length)


# --- results -----------------------------------------------------------------------------------------------


def _results(
    subject: Subject,
    windows: Tensor,
    grid: Grid,
    factors: dict[str, Factors],
    losses: dict[Variant, Loss],
    device: torch.device,
) -> Results:
    source, config = subject.stored.source, subject.stored.layout.config
    parts, kept = pieces(subject), kept_bytes(subject, all_weights(subject))
    return Results(
        model=source.name,
        config_class=source.config_class,
        parameters=source.parameters,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        tokens=windows.numel(),
        window=windows.shape[1],
        vocabulary=config.get_text_config().vocab_size,
        kinds=subject.kinds,
        layers=len(subject.layers),
        whole=subject.whole,
        cumulative_rank=grid.middle,
        measurements=tuple(
            Measurement(table=v.table, of=v.of, rank=v.rank, loss=loss.mean, perplexity=loss.perplexity)
            for v, loss in losses.items()
        ),
        spectra=tuple(_spectrum(part, factors[part.name], grid) for part in subject.parts),
        costs=tuple(_cost(parts, kept, rank, subject.beside) for rank in sorted({0, *grid.ranks})),
    )


def _spectrum(part: Part, factors: Factors, grid: Grid) -> Spectrum:
    count = len(factors.values)
    places = sorted({round(count ** (i / (SPECTRUM_POINTS - 1))) for i in range(SPECTRUM_POINTS)})
    return Spectrum(
        group=part.name,
        kind=part.kind,
        layer=part.layer,
        rows=part.group.rows,
        columns=part.group.columns,
        energy=factors.energy,
        places=tuple(places),
        values=tuple(float(factors.values[place - 1]) for place in places),
        shares={rank: factors.share(rank) for rank in sorted({*grid.ranks, *grid.layer_ranks})},
        localisation=factors.localisation,
    )


# --- costs and worth ---------------------------------------------------------------------------------------


def kept_bytes(subject: Subject, consumed: set[str]) -> int:
    """Bytes that stay whole in the vault when these weights are split."""
    kept, _ = kept_tensors(subject.stored, consumed)
    return sum(sealed_bytes(subject.stored.checkpoint.entries[key].nbytes) for key in kept.values())


def all_weights(subject: Subject) -> set[str]:
    """Of all groups that can be split."""
    return {name for part in subject.parts for name in part.parameters}


def pieces(subject: Subject, results: Results | None = None) -> tuple[Piece, ...]:
    """The groups as the planner takes them; with results, the most sensitive layers are told."""
    weights, stored = all_weights(subject), subject.stored
    least = kept_bytes(subject, weights)
    tied = {*stored.layout.tied, *stored.layout.tied.values()}
    by_layer = results.layer_losses() if results else {}
    found = []
    for part in subject.parts:
        mine = part.parameters
        if mine & tied or part.experts:
            whole = kept_bytes(subject, weights - mine) - least
        else:
            entries = [stored.checkpoint.entries[stored.sources.keys[weight]] for weight in mine]
            whole = sum(sealed_bytes(entry.nbytes) for entry in entries)
        found.append(
            Piece(
                name=part.name,
                modules=part.group.labels,
                kind=part.kind,
                pattern=blank(part.name) + (".*" if part.experts else ""),
                rows=part.group.rows,
                columns=part.group.columns,
                whole_bytes=whole,
                sensitivity=by_layer.get(part.layer, 0.0) if part.layer is not None else 0.0,
                experts=len(part.groups) if part.experts else 0,
                use=1.0 if part.group.expert is None else part.group.expert.use,
            )
        )
    return tuple(found)


def make_planner(subject: Subject, results: Results | None, grid: Grid) -> Planner:
    """A planner; without results every rank is worth the same, which is enough to check a budget."""
    if results is None:
        worth = {kind: dict.fromkeys(grid.ranks, 0.0) for kind in subject.kinds}
    else:
        worth = results.worth()
    least = kept_bytes(subject, all_weights(subject))
    return Planner(pieces(subject, results), worth, least, subject.whole, subject.beside)


def _cost(parts: Sequence[Piece], kept: int, rank: int, beside: Mapping[str, tuple[int, int]]) -> Cost:
    """The vault's cost with one rank everywhere, or all of it where a matrix has less."""
    small = [p for p in parts if min(p.rows, p.columns) < rank]
    rules = tuple(Rule(pattern=p.own_pattern, rank=min(p.rows, p.columns)) for p in small)
    report = account(parts, Recipe(rank=rank, rules=rules), kept, beside)
    macs: dict[str, tuple[int, int]] = {}
    kinds = [part.kind for part in parts for _ in part.groups]
    for kind, group in zip(kinds, report.groups, strict=False):  # what is beside comes last
        mine, plain = macs.get(kind, (0, 0))
        macs[kind] = (mine + group.vault_macs.total, plain + group.plain_macs)
    return Cost(
        rank=rank,
        macs=report.vault_macs.total,
        macs_share=report.vault_macs_share,
        low_rank=report.vault_macs.low_rank,
        rotations=report.vault_macs.rotations,
        checks=report.vault_macs.checks + report.vault_macs.fixed_point,
        secret_bytes=report.vault_bytes - report.kept_bytes,
        bytes=report.vault_bytes,
        bytes_share=report.vault_bytes_share,
        kinds={kind: mine / plain for kind, (mine, plain) in macs.items()},
    )
