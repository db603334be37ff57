"""The check of a product, measured where its error rate can be seen: the same code with a small prime.

Over the choice of challenges, a wrong product of rows whose errors span r dimensions is accepted with
probability exactly p^(-t r); r = 1, the best a worker can do, gives the p^-t of SPEC section 10.  With
p = 2^32 - 5 nobody lives to see one; with p = 31 or 251 there are thousands, and their number must be likely.
"""

from __future__ import annotations

import importlib.util
import math
import secrets
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numba
import numpy as np
import pytest

from ledger import Ledger, size
from sliplm.arithmetic import field

M, N, ROWS = 12, 9, 3
ALARM = 1e-7  # of each comparison; some fifty of them: a false alarm in 200,000 runs
SPACE = 500_000  # challenges made at once

Change = Callable[[np.ndarray, np.ndarray, np.ndarray, int], np.ndarray]


class Toy(NamedTuple):
    """field.py with another prime, a matrix, inputs and their products."""

    field: ModuleType
    p: int
    w: np.ndarray
    x: np.ndarray
    y: np.ndarray


def toy(p: int, folder: Path) -> Toy:
    """Load a copy of field.py in which P is p."""
    source = Path(field.__file__).read_text(encoding="utf-8")
    line = f"\nP = {field.P}\n"
    assert source.count(line) == 1
    copy = folder / f"field_{p}.py"
    copy.write_text(source.replace(line, f"\nP = {p}\n"), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(copy.stem, copy)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert p == module.P and int(module._FOLD) == 2**32 % p
    generator = np.random.default_rng(p)
    w = generator.integers(-2047, 2048, (M, N)).astype(np.int16)
    x = generator.integers(0, p, (ROWS, N)).astype(np.uint32)
    y = np.array([[sum(int(a) * int(b) for a, b in zip(r, v, strict=True)) % p for r in w] for v in x])
    return Toy(module, p, w, x, y.astype(np.uint32))


def uniform(p: int, *shape: int) -> np.ndarray:
    """Uniform elements from the operating system: words at or above the largest multiple of p are dropped."""
    count = math.prod(shape)
    words = np.frombuffer(secrets.token_bytes(4 * (count + count // 16 + 64)), np.uint32)
    kept = words[words < 2**32 // p * p][:count] % p
    return kept.reshape(shape).astype(np.uint32)


@numba.njit
def _count(accepts: Any, product: Any, e: np.ndarray, w: np.ndarray, x: np.ndarray, y: np.ndarray) -> int:
    """How many of the challenges e [tries, t, m] accept y as the product of x."""
    accepted = 0
    c = np.empty((e.shape[1], w.shape[1]), np.uint32)
    for k in range(e.shape[0]):
        for i in range(e.shape[1]):
            c[i] = product(e[k, i], w)
        if accepts(e[k], c, x, y):
            accepted += 1
    return accepted


def accepted(made: Toy, t: int, y: np.ndarray, tries: int) -> int:
    """Of `tries` fresh challenges, how many accept y."""
    done = 0
    for first in range(0, tries, SPACE):
        e = uniform(made.p, min(SPACE, tries - first), t, M)
        done += _count(made.field.accepts, made.field._transposed_product, e, made.w, made.x, y)
    return done


def rank(errors: np.ndarray, p: int) -> int:
    """The rank of a small matrix mod p, by Gaussian elimination on Python integers."""
    rows = [[int(v) % p for v in row] for row in errors]
    found = 0
    for column in range(len(rows[0])):
        pivot = next((r for r in range(found, len(rows)) if rows[r][column]), None)
        if pivot is None:
            continue
        rows[found], rows[pivot] = rows[pivot], rows[found]
        inverse = pow(rows[found][column], -1, p)
        for r in range(found + 1, len(rows)):
            factor = rows[r][column] * inverse % p
            rows[r] = [(a - factor * b) % p for a, b in zip(rows[r], rows[found], strict=True)]
        found += 1
    return found


def tails(k: int, n: int, p: float) -> tuple[float, float]:
    """P(X <= k) and P(X >= k) of a binomial X(n, p): p lies in the Clopper-Pearson interval of confidence
    1 - 2 a around k / n just if both are above a."""
    i = np.arange(k + 1)
    # log C(n, i), summed from its ratios
    ratios = np.log(n - i[:-1]) - np.log(i[:-1] + 1)
    logs = np.concatenate([[0.0], np.cumsum(ratios)]) + i * math.log(p) + (n - i) * math.log1p(-p)
    mass = np.exp(logs)
    below = math.fsum(mass)
    return below, max(0.0, 1 - below + float(mass[-1]))


def likely(k: int, n: int, p: float) -> bool:
    """Does the interval of confidence 1 - ALARM around k / n contain p?"""
    return min(tails(k, n, p)) > ALARM / 2


def add(value: int, row: int = 0, column: int = 0) -> Change:
    def change(y: np.ndarray, _w: np.ndarray, _x: np.ndarray, p: int) -> np.ndarray:
        y[row, column] = (int(y[row, column]) + value) % p
        return y

    return change


def low_rank(wanted: int) -> Change:
    def change(y: np.ndarray, _w: np.ndarray, _x: np.ndarray, p: int) -> np.ndarray:
        left, right = uniform(p, ROWS, wanted), uniform(p, wanted, M)
        left[:wanted, :wanted] = right[:wanted, :wanted] = np.eye(wanted)  # so that it has this rank
        return (y + left.astype(np.int64) @ right) % p

    return change


def swapped(y: np.ndarray, _w: np.ndarray, _x: np.ndarray, _p: int) -> np.ndarray:
    return y[[1, 0, *range(2, ROWS)]]


def random(y: np.ndarray, _w: np.ndarray, _x: np.ndarray, p: int) -> np.ndarray:
    y[-1] = (y[-1] + 1 + uniform(p - 1, M)) % p  # every entry of a row is wrong
    return y


def replayed(y: np.ndarray, w: np.ndarray, _x: np.ndarray, p: int) -> np.ndarray:
    y[0] = w.astype(np.int64) @ uniform(p, N) % p  # the right product of another message
    return y


WRONG: dict[str, Change] = {
    "a random row": random,
    "one entry by one": add(1),
    "last entry by minus one": add(-1, ROWS - 1, M - 1),
    "one entry by 2^31": add(2**31),
    "rank one": low_rank(1),
    "rank two": low_rank(2),
    "two rows swapped": swapped,
    "all zero": lambda y, _w, _x, _p: np.zeros_like(y),
    "another message's product": replayed,
}


def wrong(made: Toy, kind: str) -> tuple[np.ndarray, int]:
    """A wrong product, and the dimensions that its errors span."""
    while True:
        y = WRONG[kind](made.y.copy(), made.w, made.x, made.p).astype(np.uint32)
        spanned = rank(y.astype(np.int64) - made.y, made.p)
        if spanned:
            return y, spanned


@pytest.mark.parametrize(("p", "t"), [(251, 1), (31, 2), (251, 2)])
def test_wrong_products_are_accepted_at_the_stated_rate(
    p: int, t: int, tmp_path: Path, ledger: Ledger
) -> None:
    made = toy(p, tmp_path)
    tries = size(300_000 if t == 1 else 500_000, 40_000_000)
    assert accepted(made, t, made.y, 1000) == 1000, "right products always pass"
    within, above, best = 0, 0, ""
    for kind in WRONG:
        y, spanned = wrong(made, kind)
        got, rate = accepted(made, t, y, tries), float(p) ** (-t * spanned)
        within += likely(got, tries, rate)
        above += tails(got, tries, float(p) ** -t)[1] <= ALARM / 2
        best = best or f"{kind}: {got:,} of {tries:,} accepted, {tries * rate:,.1f} expected"
        assert likely(got, tries, rate), f"{kind}: {got} of {tries}, {tries * rate} expected"
    ledger.record(
        f"acceptance rate of 9 kinds of wrong product is p^-t (p = {p}, t = {t})",
        len(WRONG),
        within,
        above,
        best,
    )
    assert above == 0


def test_a_check_that_is_weaker_is_found_out(tmp_path: Path) -> None:
    """The control: one challenge where two are claimed, or challenges that are not uniform."""
    made = toy(31, tmp_path)
    y, _ = wrong(made, "one entry by one")
    tries = 200_000
    assert not likely(accepted(made, 1, y, tries), tries, 31.0**-2)
    biased = uniform(31, tries, 1, M) // 2
    got = _count(made.field.accepts, made.field._transposed_product, biased, made.w, made.x, y)
    assert not likely(got, tries, 1 / 31)


def test_a_modulus_that_is_no_prime_accepts_every_second_time() -> None:
    """Why a prime: modulo 2^32 an error of 2^31 is seen by odd challenges only."""
    tries = 200_000
    e = np.frombuffer(secrets.token_bytes(4 * tries), np.uint32)
    passed = int(np.count_nonzero(e * np.uint32(2**31) == 0))  # <e, error> mod 2^32
    assert likely(passed, tries, 0.5)


@pytest.mark.parametrize("kind", WRONG)
def test_the_real_prime_accepts_none(kind: str, ledger: Ledger) -> None:
    generator = np.random.default_rng(7)
    w = generator.integers(-2047, 2048, (M, N)).astype(np.int16)
    x = uniform(field.P, ROWS, N)
    y = np.array(
        [[int(sum(int(a) * int(b) for a, b in zip(r, v, strict=True))) % field.P for r in w] for v in x]
    )
    made = Toy(field, field.P, w, x, y.astype(np.uint32))
    tries = size(50_000, 20_000_000)
    assert accepted(made, 2, made.y, 1000) == 1000
    passed = accepted(made, 2, wrong(made, kind)[0], tries)
    ledger.record("wrong products, p = 2^32 - 5, t = 2", tries, tries - passed, passed, "9 kinds")
    assert passed == 0


def test_entries_that_are_no_elements_are_refused() -> None:
    """p and above stand for elements as well, so one product could be written in several ways."""
    e, w = uniform(field.P, 2, M), np.ones((M, N), np.int16)
    x = np.zeros((1, N), np.uint32)
    y = np.zeros((1, M), np.uint32)
    c = field.challenge_products(e, w)
    assert field.accepts(e, c, x, y)
    for value in (field.P, field.P + 4):
        y[0, M - 1] = value
        assert not field.accepts(e, c, x, y)
