"""Memory of a card between a vault and its worker on one host, so that long questions never leave the card.

lend     the vault: makes memory for each worker that shares this host's memory already
borrow   the worker: takes what a vault lends, if its cards can reach it
answer   the worker: step 3, from there to there
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from typing import Final

from sliplm.arithmetic.kernels import Matrix
from sliplm.arithmetic.kernels.cuda.card import Card
from sliplm.arithmetic.kernels.cuda.lent import Borrowed, Lent
from sliplm.arithmetic.kernels.cuda.matrix import CudaMatrix
from sliplm.errors import CardError, WireError, WorkerError
from sliplm.network.link import Link
from sliplm.network.memory import MemoryConnection
from sliplm.network.transport import Connection

SIZE: Final = 192 << 20
"""Bytes of a card that each worker is lent each way: 2,048 rows of 24,576."""

_HANDED_LIMIT: Final = 10.0  # seconds for a descriptor to come through the door

logger = logging.getLogger(__name__)


def lend(links: Sequence[Link], card: Card) -> None:
    """What is asked of those that cannot use the memory, or are elsewhere, goes by the host as before."""
    for link in links:
        try:
            link.lend(lambda: Lent(card, SIZE))
        except CardError as error:
            logger.warning("no memory of the card is lent to %s: %s", link.address, error)
        except WorkerError:  # whoever asks it next learns why
            continue


def borrow(connection: Connection, size: int, matrices: Sequence[Matrix]) -> Borrowed | None:
    """The memory that a vault lends; None unless all matrices lie on cards that can reach it.

    Raises WireError where no memory can be lent; WorkerTimeout if it does not come.
    """
    if not isinstance(connection, MemoryConnection):
        raise WireError("memory is lent over `shm:` only")
    handle = connection.handed_over(time.monotonic() + _HANDED_LIMIT)
    try:
        cards = {matrix.card for matrix in matrices if isinstance(matrix, CudaMatrix)}
        everywhere = all(isinstance(matrix, CudaMatrix) for matrix in matrices)
        return Borrowed(handle, size, list(cards)) if everywhere else None
    except CardError as error:
        logger.warning("the memory that %s lends cannot be used: %s", connection.peer, error)
        return None
    finally:
        os.close(handle)


def answer(matrix: Matrix, borrowed: Borrowed | None, rows: int) -> None:
    """y~ = w x~ mod p.  Raises CardError; WireError if nothing was borrowed."""
    if borrowed is None or not isinstance(matrix, CudaMatrix):
        raise WireError("a question in memory that was not lent")
    matrix.across(borrowed.questions, borrowed.answers, rows)
