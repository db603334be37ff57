"""Statistics on what a worker sees.  Each gives p-values: the chance of such a result if masks are what they
should be.  They are exact, bounds from above, or of a chi-square with thousands of counts in every class.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numba
import numpy as np
import torch

from sliplm.arithmetic.field import P, centre

NEAR = 2**16
"""Two messages under one mask differ by that of their inputs, which is below this almost everywhere."""

PValues = dict[str, float]
Rows = Sequence[np.ndarray]


def of_elements(messages: Rows) -> PValues:
    """Are these elements uniform and unrelated to their neighbours?"""
    counts = {f"byte {i}": np.zeros(256, np.int64) for i in range(4)}
    moduli = (3, 5, 7, 11, 13, 251)
    counts |= {f"mod {q}": np.zeros(q, np.int64) for q in moduli}
    bits, signs, total = np.zeros(32, np.int64), 0, 0
    for message in messages:
        flat = np.ascontiguousarray(message).reshape(-1)
        for i, column in enumerate(flat.view(np.uint8).reshape(-1, 4).T):
            counts[f"byte {i}"] += np.bincount(column, minlength=256)
        for q in moduli:
            counts[f"mod {q}"] += np.bincount(flat % q, minlength=q)
        for i in range(32):
            bits[i] += np.count_nonzero(flat & np.uint32(1 << i))
        signs += int(np.count_nonzero(flat > P // 2))
        total += flat.size
    found = {name: chi_square(count, total, expected(name, len(count))) for name, count in counts.items()}
    found |= {f"bit {i}": binomial(int(bits[i]), total, ones(i) / P) for i in range(32)}
    found["sign"] = binomial(signs, total, (P - 1) // 2 / P)
    found["neighbours in a row"] = correlation((m[:, :-1], m[:, 1:]) for m in messages)
    return found


def of_pairs(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> PValues:
    """Do the first messages tell anything of the second, element by element?"""
    held = list(pairs)
    equal = sum(int(np.count_nonzero(a == b)) for a, b in held)
    near = sum(int(np.count_nonzero(np.abs(centred_difference(a, b)) <= NEAR)) for a, b in held)
    total = sum(a.size for a, _ in held)
    return {
        "correlation": correlation(held),
        "equal elements": at_least(equal, total, 1 / P),
        "near elements": at_least(near, total, (2 * NEAR + 1) / P),
    }


def centred_difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a - b mod p, nearest to zero."""
    difference = (a.astype(np.int64) - b.astype(np.int64)) % P
    return np.where(difference > P // 2, difference - P, difference)


def expected(name: str, classes: int) -> np.ndarray:
    """The chances of the classes of a byte position or modulus, of x uniform below p = 2^32 - 5."""
    values = np.arange(classes)
    if name.startswith("mod"):
        return np.array([(P - 1 - int(v)) // classes + 1 for v in values]) / P
    place = int(name.removeprefix("byte "))
    missing = np.zeros(256)
    for value in range(P, 2**32):
        missing[value >> (8 * place) & 255] += 1
    return (2**24 - missing) / P


def ones(bit: int) -> int:
    """How many elements have this bit."""
    return 2**31 - sum(value >> bit & 1 for value in range(P, 2**32))


def chi_square(counts: np.ndarray, total: int, chances: np.ndarray) -> float:
    """Pearson's test; all classes have thousands of counts here, so its distribution is that of the limit."""
    statistic = float(((counts - total * chances) ** 2 / (total * chances)).sum())
    half = torch.tensor([(len(counts) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def binomial(count: int, total: int, chance: float) -> float:
    """Hoeffding's bound for a count of independent events, both sides."""
    return min(1.0, 2 * math.exp(-2 * (count - total * chance) ** 2 / total))


def at_least(count: int, total: int, chance: float) -> float:
    """Chernoff's bound for as many rare events or more: exp(-mean) (e mean / count)^count."""
    mean = total * chance
    if count <= mean:
        return 1.0
    return math.exp(-mean + count * (1 + math.log(mean / count)))


def correlation(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
    """Are centred elements a, independent and uniform, uncorrelated with b, whatever b is?

    A uniform number is strictly sub-Gaussian: a sum of a_i b_i is beyond t with a chance of at most
    2 exp(-t^2 / (2 var(a) sum b_i^2)).  var(a) is taken from the elements.

    Args:
        pairs: elements a and numbers b (elements are centred), of one shape.
    """
    total = left_squares = right_squares = count = 0.0
    for a, b in pairs:
        left = (centre(a) / (P / 2)).ravel()
        right = (centre(b) / (P / 2) if b.dtype == np.uint32 else b.astype(np.float64)).ravel()
        total += float(left @ right)
        left_squares += float(left @ left)
        right_squares += float(right @ right)
        count += left.size
    if not right_squares:
        return 1.0
    return min(1.0, 2 * math.exp(-count * total**2 / (2 * left_squares * right_squares)))


def repeated(rows: Iterable[bytes]) -> int:
    """How many rows were there before."""
    seen: set[bytes] = set()
    count = 0
    for row in rows:
        count += row in seen
        seen.add(row)
    return count


@numba.njit
def _inverse(value: np.uint64) -> np.uint64:
    p, power, result = np.uint64(P), P - 2, np.uint64(1)
    while power:
        if power & 1:
            result = result * value % p
        value = value * value % p
        power >>= 1
    return result


@numba.njit
def rank(rows: np.ndarray) -> int:
    """The rank mod p of uint32 [rows, n]."""
    a = rows.astype(np.uint64)
    p = np.uint64(P)
    found = 0
    for column in range(a.shape[1]):
        pivot = found
        while pivot < a.shape[0] and a[pivot, column] == 0:
            pivot += 1
        if pivot == a.shape[0]:
            continue
        for j in range(column, a.shape[1]):
            a[found, j], a[pivot, j] = a[pivot, j], a[found, j]
        inverse = _inverse(a[found, column])
        for i in range(found + 1, a.shape[0]):
            factor = p - a[i, column] * inverse % p
            if factor != p:
                for j in range(column, a.shape[1]):
                    a[i, j] = (a[i, j] + factor * a[found, j] % p) % p
        found += 1
        if found == a.shape[0]:
            break
    return found
