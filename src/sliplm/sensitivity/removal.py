"""The log-likelihood of a text when the top part of some matrices is taken away; no weight is changed.

A hook behind each linear layer takes A_k (B_k x) from its output, which is the output that W - A_k B_k would
have.  Ranks are nested, so one loaded model and one set of factors serve every variant; several variants go
through the model side by side in one batch, which is what counts where its weights come from a disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sliplm.engines.groups import Group
from sliplm.sensitivity.factors import Factors
from sliplm.sensitivity.variants import Variant


@dataclass(frozen=True)
class Loss:
    """Negative log-likelihood of a text.

    Attributes:
        mean: per predicted token, in nats; NaN never: what cannot be computed is infinite.
        tokens: that were predicted.
    """

    mean: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp of the mean."""
        return math.exp(self.mean) if self.mean < 700 else math.inf


class MixedRowsError(Exception):
    """A layer does not see the rows of a batch in order (a mixture of experts), so that several variants
    cannot share one."""


class Removal:
    """A model whose linear layers have hooks; `losses` measures variants on a text.

    Args:
        model: in evaluation mode; its weights may be anywhere.
        groups: those that `factors` has.
        device: where the factors go and the tokens start.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        groups: Sequence[Group],
        factors: Mapping[str, Factors],
        device: torch.device,
    ) -> None:
        self._model, self._device = model, device
        self._active: Sequence[Mapping[str, int]] = ()  # group -> rank, of each variant in the batch
        self._rows = self._length = 0  # of the batch: windows, and tokens in each
        self._handles = []
        modules = dict(model.named_modules())
        for group in groups:
            a, b = (x.to(device) for x in (factors[group.name].a, factors[group.name].b))
            first = 0
            for member in group.members:
                part = a[first : first + member.rows]
                first += member.rows
                hook = self._hook(group.name, part, b)
                self._handles.append(modules[member.module].register_forward_hook(hook, with_kwargs=True))

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def losses(self, batch: Sequence[Variant], windows: Tensor, rows: int) -> list[Loss]:
        """Measure variants together.

        Args:
            windows: int64 [count, length] on the device; the first token of each is not predicted.
            rows: windows that go through the model at once, all variants' together; at least one each.

        Raises:
            MixedRowsError: this model takes one variant at a time.
        """
        self._active = [dict.fromkeys(variant.groups, variant.rank) for variant in batch]
        sums = torch.zeros(len(batch), dtype=torch.float64)
        for part in torch.split(windows, max(1, rows // len(batch))):
            self._rows, self._length = len(batch) * len(part), part.shape[1]
            sums += self._pass(part, len(batch))
        self._active = ()
        tokens = windows.shape[0] * (windows.shape[1] - 1)
        means = [float(total) / tokens for total in sums]
        return [Loss(mean if math.isfinite(mean) else math.inf, tokens) for mean in means]

    def _pass(self, part: Tensor, variants: int) -> Tensor:
        """The sum of the losses of each variant: float64 [variants], on the CPU."""
        with torch.inference_mode():
            logits = self._model(input_ids=part.repeat(variants, 1), use_cache=False).logits
            sums = [  # window by window: no second copy of all the logits
                nn.functional.cross_entropy(window[:-1].float(), part[i % len(part), 1:].to(window.device),
                                            reduction="sum")
                for i, window in enumerate(logits)
            ]  # fmt: skip
            return torch.stack(sums).double().view(variants, -1).sum(1).cpu()

    def _hook(self, group: str, a: Tensor, b: Tensor) -> Callable[..., Tensor | None]:
        def hook(_module: nn.Module, args: Any, kwargs: dict[str, Any], out: Tensor) -> Tensor | None:
            if not any(ranks.get(group) for ranks in self._active):
                return None
            x: Tensor = (args[0] if args else next(iter(kwargs.values()))).to(out.device)
            if len(self._active) == 1:
                return self._without(x, out, a, b, self._active[0][group])
            if x.shape[0] not in (self._rows, self._rows * self._length):
                raise MixedRowsError
            block = x.shape[0] // len(self._active)
            for i, ranks in enumerate(self._active):
                rank, rows = ranks.get(group, 0), slice(i * block, (i + 1) * block)
                if rank:
                    out[rows] = self._without(x[rows], out[rows], a, b, rank)
            return out

        return hook

    @staticmethod
    def _without(x: Tensor, out: Tensor, a: Tensor, b: Tensor, rank: int) -> Tensor:
        """out - A_k (B_k x), for each row of x."""
        low = x.to(a.dtype) @ b[:rank].to(x.device).T
        return out - (low @ a[:, :rank].to(x.device).T).to(out.dtype)
