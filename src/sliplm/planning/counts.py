"""What a split costs, counted from shapes: bytes kept, multiply-adds and traffic per token.

Multiply-adds of the vault for one token and a group of m rows, n columns and rank k:

    low-rank      k (m + n)          A (B x) of SPEC step 5
    rotations     as the transforms count themselves, additions included
    checks        t (m + n)          <e, y~> and <c, x~>, t = 2 challenges
    fixed point   3 n + 4 m          norm and rounding of x; removing u, row scale and 1/alpha of y; losses;
                                     n more for the diagonal where no rotation takes it along
    an adapter    r (m_i + n)        for each member of m_i rows that it changes at rank r; counted apart

An expert of a mixture sees a part of the tokens, so all that it costs per token is that part of it, on
average; the experts of one layer share their exchanges.

Masks are counted apart: the vault derives them with AES, and the dealer does m n multiply-adds per token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from sliplm.arithmetic import rotation
from sliplm.shares.contents import integer_type
from sliplm.shares.manifest import (
    Attention,
    Difference,
    ExpertOf,
    GroupAdapter,
    KeptGroup,
    VaultGroup,
    VaultManifest,
)
from sliplm.shares.recipe import GroupChoice, Placement, Recipe, RotationKind, Tail
from sliplm.shares.sealing import sealed_bytes
from sliplm.shares.sketch import Likeness
from sliplm.shares.splitting import CHALLENGE_SETS, CHALLENGES
from sliplm.shares.tensorfile import ITEM_BYTES

CONTEXTS = (128, 512, 2048)
ELEMENT_BYTES = 4  # a field element on the wire
WHOLE = GroupChoice(rank=0, precision=12, rotation="none", placement="vault")


class _Count(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class VaultMacs(_Count):
    """Multiply-adds of the vault per token, by kind; `whole` is what groups placed in the vault take."""

    low_rank: int = 0
    rotations: int = 0
    checks: int = 0
    fixed_point: int = 0
    whole: int = 0

    @property
    def total(self) -> int:
        return self.low_rank + self.rotations + self.checks + self.fixed_point + self.whole


class GroupReport(_Count):
    """One group.  Bytes are of the shares on disk; traffic is payload per token, without framing.

    `error` is the relative Frobenius error of quantisation and `svd_error` that of the kept directions
    (`splitting.direction_error`); None where nothing was split.  `localisation`: the largest entry of a
    singular vector of what is hidden; None where that was not measured.  Of a full fine-tune with the
    difference D, `change` is |D| / |W_base| and `left_out` |D - A B| / |D|, Frobenius: 1 - left_out^2 of its
    energy is kept.  A plain module has no tokens: its multiply-adds and traffic are those of one call on its
    example inputs, in which the group multiplies `positions` rows.  An expert counts with `use`, the part of
    the tokens that it is expected to see; `exchange` names the exchange that it shares.  `reason` says why a
    group that the recipe would have split is whole.
    """

    name: str
    rows: int
    columns: int
    rank: int
    precision: int
    rotation: RotationKind
    placement: Placement
    error: float | None
    svd_error: float | None
    localisation: float | None = None
    change: float | None = None
    left_out: float | None = None
    vault_bytes: int
    worker_bytes: int
    plain_macs: int
    vault_macs: VaultMacs
    vault_macs_share: float
    bytes_to_worker: int
    bytes_from_worker: int
    positions: int = 1
    use: float = 1.0
    exchange: str = ""
    reason: str = ""


class AdapterReport(_Count):
    """One adapter: the groups that it changes, its bytes in the vault's share, and the multiply-adds for a
    token that takes it, beside `SplitReport.vault_macs`.
    """

    name: str
    groups: int
    bytes: int
    macs: int
    macs_share: float


class SplitReport(_Count):
    """A whole split.

    Attributes:
        vault_bytes: secrets of the split groups and all that stays whole (`kept_bytes`: embeddings, norms,
            biases, groups placed in the vault).
        vault_bytes_share: vault_bytes / (vault_bytes + worker_bytes).
        plain_macs: multiply-adds of all linear layers per token, unprotected.
        vault_macs_share: vault_macs.total / plain_macs; neither has attention, norms or activations.
        attention_macs: context length -> multiply-adds of attention (scores and values) for one token, in
            the vault beside the above; empty where the configuration does not say.
        exchanges: masked products per token; those of a layer's experts travel together.
        bytes_to_worker, bytes_from_worker: payload per token, online.
        mask_bytes: payload per token from the dealer to the vault, ahead of time.
        public: folder -> how close the model is to the public one there: only what `split` has compared.
        base: name of the public model that the split was made against, if any.
        tail: what became of what the ranks leave out of the difference to it: lost, or at the worker.
        change, left_out: as of a group, over all groups; None without a full fine-tune.
        adapters: what each adapter costs.
    """

    groups: tuple[GroupReport, ...]
    kept_bytes: int
    vault_bytes: int
    worker_bytes: int
    vault_bytes_share: float
    plain_macs: int
    vault_macs: VaultMacs
    vault_macs_share: float
    attention_macs: dict[int, int]
    exchanges: int
    bytes_to_worker: int
    bytes_from_worker: int
    mask_bytes: int
    public: dict[str, Likeness] = {}
    base: str | None = None
    tail: Tail = "drop"
    change: float | None = None
    left_out: float | None = None
    adapters: tuple[AdapterReport, ...] = ()

    def to_json(self) -> str:
        """One JSON document."""
        return self.model_dump_json()


def counts_for_shapes(
    shapes: Mapping[str, tuple[int, int]],
    recipe: Recipe,
    *,
    kept_bytes: int = 0,
    attention: Sequence[Attention] = (),
    uses: Mapping[str, float] | None = None,
    whole: Mapping[str, tuple[int, int]] | None = None,
) -> SplitReport:
    """Count a split from the groups' shapes, {name: (rows, columns)}, without any weight.

    `kept_bytes`: bytes of all that stays whole in the vault, groups that the recipe places there included.
    `uses`: of experts, named `MODULE.WEIGHT.NUMBER`, what part of the tokens they are expected to see.
    `whole`: more groups, which are in the vault whatever the recipe says: routers.
    """
    groups = []
    for name, (rows, columns) in {**shapes, **(whole or {})}.items():
        use = (uses or {}).get(name)
        labels = () if use is None else (name.rsplit(".", 2)[0],)
        choice = WHOLE if name in (whole or {}) else recipe.for_group(name, labels)
        found = count_group(name, rows, columns, choice)
        groups.append(found if use is None else used(found, use, name.rpartition(".")[0]))
    return _total(groups, kept_bytes, attention)


def report_for(manifest: VaultManifest) -> SplitReport:
    """The report of a split, recomputed from the vault's manifest alone."""
    counted: list[tuple[VaultGroup | KeptGroup, GroupReport]] = [
        (g, _repeated(_group(g), g.positions)) for g in manifest.groups
    ]
    kept = [
        (g, _repeated(count_group(g.name, g.rows, g.columns, WHOLE), g.positions, g.reason))
        for g in manifest.kept
    ]
    groups = [_of_expert(report, group.expert) for group, report in (*counted, *kept)]
    total = _total(groups, manifest.kept_bytes, manifest.attention)
    if manifest.base is None:
        return total
    change, left_out = _loss([group.difference for group in manifest.groups])
    return total.model_copy(
        update={
            "base": manifest.base.name,
            "tail": manifest.recipe.tail,
            "change": change,
            "left_out": left_out,
            "adapters": tuple(
                _adapter(name, manifest.groups, total.plain_macs) for name in manifest.adapters
            ),
        }
    )


def count_group(
    name: str,
    rows: int,
    columns: int,
    choice: GroupChoice,
    error: float | None = None,
    svd_error: float | None = None,
) -> GroupReport:
    """Count one group of [rows, columns]; one placed in the vault has no bytes here (see `kept_bytes`)."""
    split = choice.placement == "split"
    plain = rows * columns
    macs = _vault_macs(rows, columns, choice) if split else VaultMacs(whole=plain)
    return GroupReport(
        name=name,
        rows=rows,
        columns=columns,
        rank=choice.rank,
        precision=choice.precision,
        rotation=choice.rotation,
        placement=choice.placement,
        error=error,
        svd_error=svd_error,
        vault_bytes=_secret_bytes(rows, columns, choice.rank) if split else 0,
        worker_bytes=plain * ITEM_BYTES[integer_type(choice.precision)] if split else 0,
        plain_macs=plain,
        vault_macs=macs,
        vault_macs_share=macs.total / plain,
        bytes_to_worker=ELEMENT_BYTES * columns if split else 0,
        bytes_from_worker=ELEMENT_BYTES * rows if split else 0,
    )


def _repeated(group: GroupReport, positions: int, reason: str = "") -> GroupReport:
    """What a group costs that multiplies `positions` rows per input; its share of work is the same."""
    macs = group.vault_macs
    return group.model_copy(
        update={
            "plain_macs": group.plain_macs * positions,
            "vault_macs": VaultMacs(**{kind: n * positions for kind, n in macs.model_dump().items()}),
            "bytes_to_worker": group.bytes_to_worker * positions,
            "bytes_from_worker": group.bytes_from_worker * positions,
            "positions": positions,
            "reason": reason,
        }
    )


def used(group: GroupReport, use: float, exchange: str) -> GroupReport:
    """What an expert costs per token that sees a part of them; its share of work is the same."""
    macs = group.vault_macs
    return group.model_copy(
        update={
            "plain_macs": round(group.plain_macs * use),
            "vault_macs": VaultMacs(**{kind: round(n * use) for kind, n in macs.model_dump().items()}),
            "bytes_to_worker": round(group.bytes_to_worker * use),
            "bytes_from_worker": round(group.bytes_from_worker * use),
            "use": use,
            "exchange": exchange,
        }
    )


def _of_expert(group: GroupReport, expert: ExpertOf | None) -> GroupReport:
    return group if expert is None else used(group, expert.use, f"{expert.module}.{expert.weight}")


def attention_macs(attention: Iterable[Attention], context: int) -> int:
    """Multiply-adds of attention for one token that sees `context` tokens: q.k and the sum of values."""
    return sum(2 * a.heads * a.head_dim * min(context, a.window or context) for a in attention)


def _vault_macs(m: int, n: int, choice: GroupChoice) -> VaultMacs:
    return VaultMacs(
        low_rank=choice.rank * (m + n),
        rotations=rotation.macs(choice.rotation, n) + rotation.macs(choice.rotation, m),
        checks=CHALLENGES * (m + n),
        fixed_point=3 * n + 4 * m + (n if choice.rotation == "none" else 0),
    )


def _secret_bytes(m: int, n: int, rank: int) -> int:
    """As `contents.secret_specs` lists them, sealed."""
    plain = (4 * m * rank, 4 * rank * n, 4 * m, 4 * m, 4 * n, 4 * CHALLENGE_SETS * CHALLENGES * n, 8, 8, 32)
    return sum(sealed_bytes(count) for count in plain)


def _group(group: VaultGroup) -> GroupReport:
    choice = GroupChoice(group.rank, group.precision, group.rotation, "split")
    found = count_group(group.name, group.rows, group.columns, choice, group.error, group.svd_error)
    change, left_out = _loss([group.difference])
    extra = sum(_adapter_bytes(group, adapter) for adapter in group.adapters)
    return found.model_copy(
        update={
            "vault_bytes": found.vault_bytes + extra,
            "localisation": group.localisation or None,
            "change": change,
            "left_out": left_out,
        }
    )


def _loss(differences: Sequence[Difference | None]) -> tuple[float | None, float | None]:
    """How large the differences are beside the base, and what part of them is left out; None without any."""
    there = [difference for difference in differences if difference is not None]
    if not there:
        return None, None
    norm, base, tail = (math.hypot(*(getattr(d, kind) for d in there)) for kind in ("norm", "base", "tail"))
    return (norm / base if base else 0.0), (tail / norm if norm else 0.0)


def _adapter(name: str, groups: Sequence[VaultGroup], plain_macs: int) -> AdapterReport:
    parts = [(group, part) for group in groups for part in group.adapters if part.name == name]
    macs = sum(
        rank * (member.rows + group.columns)
        for group, part in parts
        for member, rank in zip(group.members, part.ranks, strict=True)
    )
    return AdapterReport(
        name=name,
        groups=len(parts),
        bytes=sum(_adapter_bytes(group, part) for group, part in parts),
        macs=macs,
        macs_share=macs / max(1, plain_macs),
    )


def _adapter_bytes(group: VaultGroup, adapter: GroupAdapter) -> int:
    return sum(
        sealed_bytes(4 * rank * member.rows) + sealed_bytes(4 * rank * group.columns)
        for member, rank in zip(group.members, adapter.ranks, strict=True)
        if rank
    )


def _total(groups: Sequence[GroupReport], kept_bytes: int, attention: Sequence[Attention]) -> SplitReport:
    vault = kept_bytes + sum(g.vault_bytes for g in groups)
    worker = sum(g.worker_bytes for g in groups)
    plain = sum(g.plain_macs for g in groups)
    kinds = VaultMacs.model_fields
    macs = VaultMacs(**{kind: sum(getattr(g.vault_macs, kind) for g in groups) for kind in kinds})
    down = sum(g.bytes_from_worker for g in groups)
    return SplitReport(
        groups=tuple(groups),
        kept_bytes=kept_bytes,
        vault_bytes=vault,
        worker_bytes=worker,
        vault_bytes_share=vault / max(1, vault + worker),
        plain_macs=plain,
        vault_macs=macs,
        vault_macs_share=macs.total / max(1, plain),
        attention_macs={context: attention_macs(attention, context) for context in CONTEXTS if attention},
        exchanges=len({g.exchange or g.name for g in groups if g.placement == "split"}),
        bytes_to_worker=sum(g.bytes_to_worker for g in groups),
        bytes_from_worker=down,
        mask_bytes=down,
    )
