"""Spectra and top triplets of the groups, as the split takes them (SPEC split step 1), kept in a folder.

Factors are the secret part of a matrix, in clear: the folder is for whoever may hold the checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from sliplm.arithmetic.equilibration import equilibrated, localisation
from sliplm.durable import replace
from sliplm.engines.source import stack
from sliplm.filesystem import utf8_name
from sliplm.sensitivity.subject import Part, Subject
from sliplm.shares.recipe import Recipe
from sliplm.shares.splitting import EXACT_SVD
from sliplm.shares.tensorfile import write_error

Progress = Callable[[int, int, str], None]
"""Called with what is done, what is to do in all, and what comes next."""

_OVERSAMPLING, _POWER_STEPS = 16, 4


@dataclass(frozen=True)
class Factors:
    """Of one group's stacked matrix W [m, n]; or of a layer's experts, all of one shape.

    Attributes:
        values: float64, singular values, descending: all, or the first ones of a very large matrix.  Of
            experts the root mean square of each place.
        energy: |W|^2, the sum of the squares of all of them; of experts the mean.
        a, b: float32 [m, k] and [k, n], A B the best approximation of each rank up to k by its prefixes.  Of
            experts [experts, m, k] and [experts, k, n].
        localisation: of what a split at the default rank hides, see `equilibration.localisation`; None where
            the decomposition is not exact.
    """

    values: Tensor
    energy: float
    a: Tensor = field(repr=False)
    b: Tensor = field(repr=False)
    localisation: float | None = None

    @classmethod
    def of_experts(cls, each: Sequence[Factors]) -> Factors:
        """Those of several matrices of one shape together."""
        found = [one.localisation for one in each if one.localisation is not None]
        return cls(
            torch.stack([one.values for one in each]).square().mean(0).sqrt(),
            sum(one.energy for one in each) / len(each),
            torch.stack([one.a for one in each]),
            torch.stack([one.b for one in each]),
            max(found, default=None),
        )

    def share(self, rank: int) -> float:
        """The part of the energy that the top `rank` triplets hold."""
        return min(1.0, float(self.values[:rank].square().sum()) / self.energy) if self.energy else 0.0


def factor(weight: Tensor, rank: int) -> Factors:
    """Decompose W, float32 [m, n], on its device: exact up to EXACT_SVD on the smaller side, above by a
    randomised range finder with power steps.  The factors have min(rank, m, n) triplets.
    """
    m, n = weight.shape
    rank = min(rank, m, n)
    energy = float(_energy(weight))
    if min(m, n) <= EXACT_SVD:
        values, right = _exact(weight, rank)
    else:
        values, right = _randomised(weight, rank)
    a = weight @ right
    return Factors(
        values.cpu(),
        energy,
        a.contiguous().cpu(),
        right.T.contiguous().cpu(),
        _localisation(weight, a, right),
    )


def _localisation(weight: Tensor, a: Tensor, right: Tensor) -> float | None:
    if min(weight.shape) > EXACT_SVD:
        return None
    rank = min(Recipe().rank, right.shape[1])
    rest = (weight - a[:, :rank] @ right[:, :rank].T).cpu().numpy()
    return localisation(equilibrated(rest).matrix, rank)


def _exact(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """All singular values, and the top right vectors [n, rank]."""
    wide = weight.shape[1] > weight.shape[0]
    squares, vectors = torch.linalg.eigh(_gram(weight.T if wide else weight))
    values = squares.flip(0).clamp_min(0).sqrt()
    top = vectors.flip(1)[:, :rank]
    if wide:
        top = torch.linalg.qr((weight.T @ top.float()).double())[0]
    return values, top.float()


def _randomised(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The top singular values, and their right vectors [n, rank]."""
    random = torch.Generator(weight.device).manual_seed(0)
    width = min(rank + _OVERSAMPLING, *weight.shape)
    start = torch.randn(weight.shape[1], width, generator=random, device=weight.device)
    basis = torch.linalg.qr(start)[0]
    for _ in range(_POWER_STEPS):
        basis = torch.linalg.qr(weight.T @ (weight @ basis))[0]
    _, values, right = torch.linalg.svd(weight @ basis, full_matrices=False)
    return values[:rank].double(), basis @ right[:rank].T


def _gram(x: Tensor) -> Tensor:
    """x^T x in float64, in slices: no float64 copy of a large matrix."""
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for part in torch.split(x, 4096):
        wide = part.double()
        total += wide.T @ wide
    return total


def _energy(x: Tensor) -> Tensor:
    return sum((part.double().square().sum() for part in torch.split(x, 4096)), torch.zeros(()))


class Library:
    """The factors of all groups, one file for each in a folder; made where they are missing.

    Args:
        rank: triplets that are wanted; a file with fewer is made anew.
    """

    def __init__(self, folder: Path, subject: Subject, rank: int) -> None:
        self._folder, self._subject, self._rank = folder, subject, rank

    def complete(self, device: torch.device, progress: Progress) -> dict[str, Factors]:
        """Make what is missing, one matrix in memory at a time, and return all.

        Raises:
            CheckpointError: a weight cannot be read.  ShareError: the folder cannot be written.
        """
        parts = self._subject.parts
        total = sum(len(part.groups) * part.group.rows * part.group.columns for part in parts)
        done, found = 0, {}
        for i, part in enumerate(parts):
            progress(done, total, part.name)
            path = self._folder / f"{i:05d}.safetensors"
            factors = self._read(path, part)
            if factors is None:
                each = []
                for j, group in enumerate(part.groups):
                    if j:
                        progress(done + j * group.rows * group.columns, total, group.name)
                    weight = stack(self._subject.stored.read, group)
                    each.append(factor(torch.from_numpy(weight).to(device), self._rank))
                factors = Factors.of_experts(each) if part.experts else each[0]
                _write(path, part.name, factors)
            done += len(part.groups) * part.group.rows * part.group.columns
            found[part.name] = factors
        progress(total, total, "")
        return found

    def _read(self, path: Path, part: Part) -> Factors | None:
        """A file's factors, cut to the rank; None where it is missing, damaged or of too small a rank."""
        rank = min(self._rank, part.group.rows, part.group.columns)
        try:
            with utf8_name(path.parent) as named, safe_open(named / path.name, framework="pt") as file:
                head = json.loads(file.metadata()["sliplm"])
                if head["group"] != part.name or file.get_slice("b").get_shape()[-2] < rank:
                    return None
                a, b = file.get_slice("a")[..., :rank], file.get_slice("b")[..., :rank, :]
                return Factors(file.get_tensor("values"), float(head["energy"]), a, b, head["localisation"])
        except (OSError, SafetensorError, KeyError, ValueError, TypeError):
            return None


def _write(path: Path, name: str, factors: Factors) -> None:
    head = json.dumps({"group": name, "energy": factors.energy, "localisation": factors.localisation})
    tensors = {"values": factors.values, "a": factors.a, "b": factors.b}
    data = to_bytes(tensors, metadata={"sliplm": head})
    try:
        replace(path, data, lasting=False)
    except OSError as error:
        raise write_error(path, len(data), error) from error
