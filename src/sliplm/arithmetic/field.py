"""The prime field Z_p with p = 2^32 - 5: sampling, arithmetic and the product check (SPEC sections 3 and 4).

An element is a little-endian uint32 below p.  Why a prime: modulo 2^32 or 2^64 a check accepts an error of
half the modulus with
probability 1/2; in a field a non-zero error passes with probability 1/p.
"""

from __future__ import annotations

import secrets

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from sliplm.arithmetic.jit import jit
from sliplm.errors import InputError, MaskError

Elements = npt.NDArray[np.uint32]
Sums = npt.NDArray[np.uint64]

P = 4294967291
ELEMENT = np.dtype("<u4")
KEY_BYTES = 32

_BLOCK_WORDS = 4  # an AES block holds four elements
_SLACK_BLOCKS = (
    2  # spare words of a row for rejected ones: more than 8 rejections: below 2^-120 up to 2^18 columns
)
_P64 = np.uint64(P)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_FOLD = np.uint64(2**32 % P)  # 5: a function of P, so that tests can try the same code with a small prime


# --- sampling ---------------------------------------------------------------------------------------------


def new_key() -> bytes:
    """A fresh secret key of 32 bytes from the operating system."""
    return secrets.token_bytes(KEY_BYTES)


def derive_key(seed: bytes, label: str) -> bytes:
    """A 32-byte key for one use, from a 32-byte secret seed: HKDF-SHA256 with the use as its label."""
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=b"sliplm/1/" + label.encode()).derive(
        seed
    )


def keystream(key: bytes, stream: int, first_block: int, blocks: int) -> npt.NDArray[np.uint32]:
    """AES-256-CTR key stream: uint32 [4 * blocks]; the counter block is stream (64 bits) || block number
    (64 bits).
    """
    counter = ((stream << 64) | first_block).to_bytes(16, "big")
    out = np.zeros(_BLOCK_WORDS * blocks, ELEMENT)
    view = out.data.cast("B")
    Cipher(algorithms.AES256(key), modes.CTR(counter)).encryptor().update_into(view, view)
    return out


def uniform_rows(key: bytes, stream: int, first_row: int, rows: int, n: int) -> Elements:
    """Rows of uniform field elements, each row a function of (key, stream, row number) alone (SPEC step O1).

    A row owns a fixed segment of the key stream, so that any row can be made again without those before it;
    words >= p are
    dropped (rejection sampling: exactly uniform).

    Returns: uint32 [rows, n]; the rows may be strided.
    """
    return uniform_words(key, stream, first_row, rows, n)[:, :n]


def row_blocks(n: int) -> int:
    """Blocks of the key stream that a row of n elements owns."""
    return -(-n // _BLOCK_WORDS) + _SLACK_BLOCKS


def uniform_words(key: bytes, stream: int, first_row: int, rows: int, n: int) -> Elements:
    """`uniform_rows`, each with what is left of its segment: uint32 [rows, n or more], contiguous."""
    blocks = row_blocks(n)
    words = keystream(key, stream, first_row * blocks, rows * blocks).reshape(rows, blocks * _BLOCK_WORDS)
    if not _drop_rejected(words, n):
        raise MaskError(
            "a key stream segment held too few elements below p: the key is not random; make a new one"
        )
    return words


@jit
def _drop_rejected(words: Elements, n: int) -> bool:
    for i in range(words.shape[0]):
        row = words[i]
        largest = np.uint32(0)
        for j in range(n):
            largest = max(largest, row[j])
        if largest >= P:
            kept = 0
            for j in range(row.size):
                if kept < n and row[j] < P:
                    row[kept] = row[j]
                    kept += 1
            if kept < n:
                return False
    return True


# --- arithmetic -------------------------------------------------------------------------------------------


def centre(y: Elements) -> npt.NDArray[np.int64]:
    """The signed integers in [-(p-1)/2, (p-1)/2] that the elements y stand for: int64, same shape."""
    wide = y.astype(np.int64)
    centred: npt.NDArray[np.int64] = np.where(wide > P // 2, wide - P, wide)
    return centred


def residues(z: npt.NDArray[np.integer]) -> Elements:
    """The field elements of signed integers: uint32, same shape."""
    return np.mod(z.astype(np.int64), P).astype(ELEMENT)


@jit
def add_mod(a: np.uint64, b: np.uint64) -> np.uint64:
    """a + b mod p of two elements given as uint64."""
    total = a + b
    return total - _P64 if total >= _P64 else total


@jit
def sub_centred(y: np.uint32, u: np.uint32) -> np.int64:
    """The signed integer that y - u mod p stands for: int64 in [-(p-1)/2, (p-1)/2]."""
    difference = np.int64(y) - np.int64(u)
    if difference > np.int64(P // 2):
        difference -= np.int64(P)
    elif difference < -np.int64(P // 2):
        difference += np.int64(P)
    return difference


@jit
def dot(a: Elements, b: Elements) -> np.uint64:
    """<a, b> mod p of two vectors of elements, as uint64."""
    low = np.uint64(0)
    high = np.uint64(0)
    for j in range(
        a.size
    ):  # the two halves of each product are summed apart: no sum can overflow below 2^32 terms
        product = np.uint64(a[j]) * np.uint64(b[j])
        low += product & _LOW
        high += product >> _SHIFT
    return (low % _P64 + (high % _P64) * _FOLD) % _P64


# --- the check of a product (Freivalds) -------------------------------------------------------------------


def challenge_vectors(key: bytes, t: int, m: int) -> Elements:
    """The t secret challenge vectors e of a group with m outputs: uint32 [t, m], uniform in Z_p^m."""
    return np.ascontiguousarray(uniform_rows(key, 0, 0, t, m))


def challenge_products(e: Elements, w: npt.NDArray[np.integer]) -> Elements:
    """c = e^T w mod p (SPEC split step 4): uint32 [t, n] for e [t, m], w int8 or int16 [m, n]."""
    if e.shape[1] != w.shape[0]:
        raise InputError(f"challenges for {e.shape[1]} outputs do not fit a matrix of {w.shape[0]} rows")
    return np.stack([_transposed_product(row, w) for row in e]).astype(ELEMENT)


@jit
def _transposed_product(e: Elements, w: npt.NDArray[np.integer]) -> Elements:
    m, n = w.shape
    sums = np.zeros(n, np.int64)
    for i in range(m):
        factor = np.int64(e[i])
        for j in range(n):
            sums[j] += factor * np.int64(w[i, j])  # below 2^32 * 2^15 a term
        if i & 0x7FFF == 0x7FFF:  # 2^15 terms stay below 2^62
            for j in range(n):
                sums[j] %= P
    out = np.empty(n, np.uint32)
    for j in range(n):
        out[j] = np.uint32(sums[j] % P)
    return out


@jit
def accepts(e: Elements, c: Elements, x: Elements, y: Elements) -> bool:
    """SPEC step 4 and O3: is <e, y> = <c, x> mod p for every challenge and every row, and every y an element?

    Args:
        e: [t, m] challenge vectors; c: [t, n] their products with the share.
        x: [rows, n] what was multiplied; y: [rows, m] the claimed products.

    A wrong product is accepted with probability at most p^-t over the choice of e.
    """
    expected = np.empty((x.shape[0], c.shape[0]), np.uint64)
    expect(c, x, expected, 0, x.shape[0])
    return bool(holds(e, y, expected, 0, y.shape[0]))


@jit
def expect(c: Elements, x: Elements, expected: Sums, first: int, last: int) -> None:
    """Half of the check, before there is an answer: <c, x> of rows `first` to `last` into `expected`, uint64
    [rows, t].
    """
    for i in range(first, last):
        for t in range(c.shape[0]):
            expected[i, t] = dot(c[t], x[i])


@jit
def holds(e: Elements, y: Elements, expected: Sums, first: int, last: int) -> bool:
    """The other half: is <e, y> as expected for every challenge and each of these rows, and every y an
    element?
    """
    for i in range(first, last):
        largest = np.uint32(0)
        for j in range(y.shape[1]):
            largest = max(largest, y[i, j])
        if largest >= P:
            return False
        for t in range(e.shape[0]):
            if dot(e[t], y[i]) != expected[i, t]:
                return False
    return True
