"""`slip attack` on splits whose singular triplets are those of the matrix behind its diagonals.

    python bench/svd_order.py MODEL OUT [options of slip attack]

The product takes the triplets of W itself and levels what is left (SPEC split steps 1 and 2).  Here W is
levelled first, and its diagonals are put back around the triplets: another choice of what the vault keeps,
with the same cost.  Which of the two protects more is measured by running both with the same options
(docs/red-team.md).
"""

from __future__ import annotations

import sys

from sliplm.arithmetic.equilibration import equilibrated
from sliplm.arithmetic.fixedpoint import Floats
from sliplm.cli import main
from sliplm.shares import splitting

plain_triplets = splitting.top_triplets


def levelled_triplets(weight: Floats, rank: int) -> tuple[Floats, Floats]:
    """A [m, k], B [k, n] with A B = D_out (best approximation of D_out^-1 W D_in^-1) D_in."""
    matrix, d_out, d_in = equilibrated(weight)
    a, b = plain_triplets(matrix, rank)
    return a * d_out[:, None], b * d_in


splitting.top_triplets = levelled_triplets  # also in the processes that split, which import this file

if __name__ == "__main__":
    sys.argv[1:1] = ["attack"]
    main()
