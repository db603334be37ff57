"""The log-likelihood of a text when the top part of some matrices is taken away; no weight is changed.

A hook behind each linear layer takes A_k (B_k x) from its output, which is the output that W - A_k B_k would
have; fused experts are run here, where each row loses what its expert's matrix would.  Ranks are nested, so
one loaded model and one set of factors serve every variant; several variants go through the model side by
side in one batch, which is what counts where its weights come from a disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from sliplm.engines.experts import run_experts
from sliplm.sensitivity.factors import Factors
from sliplm.sensitivity.subject import Part
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
        parts: those that `factors` has.
        device: where the factors go and the tokens start.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        parts: Sequence[Part],
        factors: Mapping[str, Factors],
        device: torch.device,
    ) -> None:
        self._model, self._device = model, device
        self._active: Sequence[Mapping[str, int]] = ()  # group -> rank, of each variant in the batch
        self._rows = self._length = 0  # of the batch: windows, and tokens in each
        self._handles = []
        self._experts: dict[tuple[nn.Module, str], tuple[str, Tensor, Tensor]] = {}
        self._before: list[tuple[Any, str | None]] = []
        modules = dict(model.named_modules())
        for each in parts:
            a, b = (x.to(device) for x in (factors[each.name].a, factors[each.name].b))
            if (expert := each.group.expert) is not None:
                self._experts[modules[expert.module], expert.weight] = (each.name, a, b)
                continue
            first = 0
            for member in each.group.members:
                part = a[first : first + member.rows]
                first += member.rows
                hook = self._hook(each.name, part, b)
                self._handles.append(modules[member.module].register_forward_hook(hook, with_kwargs=True))
        for module, _ in self._experts:
            config: Any = module.config
            self._before.append((config, config._experts_implementation))
            config._experts_implementation = self._mine
        if self._experts:
            ALL_EXPERTS_FUNCTIONS[self._mine] = self._run_experts

    @property
    def _mine(self) -> str:
        """What transformers calls this one's way of running experts."""
        return f"sliplm-removal-{id(self)}"

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        for config, before in reversed(self._before):
            config._experts_implementation = before
        self._before.clear()
        if self._mine in ALL_EXPERTS_FUNCTIONS:
            del ALL_EXPERTS_FUNCTIONS[self._mine]

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

    def _run_experts(self, module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """A layer's experts, each row without what its variant takes away."""
        if len(self._active) > 1 and hidden.shape[0] != self._rows * self._length:
            raise MixedRowsError
        block = max(1, hidden.shape[0] // max(1, len(self._active)))

        def product(weight: str, x: Tensor, chosen: Tensor, token: Tensor) -> Tensor:
            matrices, first, parts = module.get_parameter(weight), 0, []
            numbers, counts = torch.unique_consecutive(chosen, return_counts=True)
            for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
                rows = slice(first, first + count)
                first += count
                matrix = matrices[number] if module.is_transposed else matrices[number].T
                y = x[rows] @ matrix
                if (known := self._experts.get((module, weight))) is not None:
                    name, a, b = known
                    for i, ranks in enumerate(self._active):
                        if rank := ranks.get(name, 0):
                            mine = token[rows] // block == i
                            y[mine] = self._without(x[rows][mine], y[mine], a[number], b[number], rank)
                parts.append(y)
            return torch.cat(parts)

        return run_experts(module, type(module), product, hidden, index, weights)

    @staticmethod
    def _without(x: Tensor, out: Tensor, a: Tensor, b: Tensor, rank: int) -> Tensor:
        """out - A_k (B_k x), for each row of x."""
        low = x.to(a.dtype) @ b[:rank].to(x.device).T
        return out - (low @ a[:, :rank].to(x.device).T).to(out.dtype)
