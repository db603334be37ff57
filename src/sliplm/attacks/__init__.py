"""The red team: numbered attacks on worker shares, one file each (docs/red-team.md).

May import `report` and what is below it, never `sensitivity`.  Begin with `case`, then `a01_as_is`.
"""

from sliplm.attacks.a01_as_is import AsIs
from sliplm.attacks.a02_lora import Lora
from sliplm.attacks.a03_full import Full
from sliplm.attacks.a04_core import Core
from sliplm.attacks.a05_align import Align
from sliplm.attacks.a06_match import Match
from sliplm.attacks.a07_two_shares import TwoShares
from sliplm.attacks.a08_blocks import Blocks
from sliplm.attacks.a09_distil import Distil
from sliplm.attacks.a10_head import Head
from sliplm.attacks.case import Attack

ATTACKS: tuple[Attack, ...] = (
    AsIs(),
    Lora(),
    Full(),
    Core(),
    Align(),
    Match(),
    TwoShares(),
    Blocks(),
    Distil(),
    Head(),
)
"""In the order of their numbers."""
