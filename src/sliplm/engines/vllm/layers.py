"""How vLLM's layers become a vault's: `quant_method: slip`, and linear layers and heads without a weight.

vLLM stacks layers that read one input (q, k and v; gate and up).  So does a split: a stacked layer is a
group, and its product is one exchange; or a part of a group, as in models whose attention and MLP read one
input, and the group's product serves all of its layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from sliplm.engines.vllm import METHOD
from sliplm.engines.vllm.products import product
from sliplm.errors import InputError, ShareError
from sliplm.shares.manifest import Member


class SlipQuantization(QuantizationConfig):  # type: ignore[misc]
    """Which layers are split.  vLLM makes and copies it before a vault is open; `SlipLoader` tells the rest.

    Attributes:
        products: the number of the vault's `Products`, or None.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products: int | None = None
        self._groups: dict[str, tuple[Member, ...]] = {}
        self._taken: set[str] = set()

    def get_name(self) -> str:
        """As the configuration of a vault has it."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Of activations; products are computed in float32 whatever it is."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Of a card, which there is none."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None beside the model's configuration."""
        return []

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> SlipQuantization:
        """From `quantization_config` of a vault's configuration, which says no more than the method."""
        return cls()

    def bind(self, groups: Mapping[str, Sequence[Member]], products: int) -> None:
        """Say which groups there are, and who multiplies."""
        self._groups = {name: tuple(members) for name, members in groups.items()}
        self.products = products
        self._taken = set()

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """vLLM's names in the place of the checkpoint's."""

        def named(member: Member) -> Member:
            [name] = hf_to_vllm_mapper.apply_list([member.module])
            return Member(module=name, rows=member.rows)

        self._groups = {name: tuple(map(named, members)) for name, members in self._groups.items()}

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How a layer multiplies; None is as ever.

        Raises:
            InputError: no vault is open.
            ShareError: the layer is of several groups.
        """
        if self.products is None:
            raise InputError(
                "a vault's folder is loaded by --load-format slip, which is chosen where --model names it"
            )
        if not isinstance(layer, LinearBase | ParallelLMHead):
            return None
        modules = self._stacked(prefix)
        found = [name for name, members in self._groups.items() if {m.module for m in members} & {*modules}]
        if not found:
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        members = self._groups[found[0]]
        if not {*modules} <= {member.module for member in members}:
            raise ShareError(
                f"{prefix} of vLLM's model is of no one group of the split ({', '.join(found)}): this model "
                "is served by slip serve"
            )
        self._taken.update(modules)
        return SlipMethod(self.products, found[0], members, modules)

    def check_taken(self) -> None:
        """Raises: ShareError where the model has no layer for a member of a group."""
        named = [member.module for members in self._groups.values() for member in members]
        if left := [name for name in named if name not in self._taken]:
            raise ShareError(
                f"vLLM's model has no layer for {', '.join(left[:3])} of the split: this model is served by "
                "slip serve"
            )

    def _stacked(self, prefix: str) -> list[str]:
        """The layers that a layer of vLLM's stands for, in its order."""
        parent, _, leaf = prefix.rpartition(".")
        names: Iterable[str] = self.packed_modules_mapping.get(leaf, [leaf])
        return [f"{parent}.{name}" if parent else name for name in names]


class SlipMethod(LinearMethodBase):  # type: ignore[misc]
    """How a layer multiplies that has no weight.

    Args:
        products: the number of who multiplies.
        group: the group in the share.
        members: of the group, in its order.
        modules: the same layers in vLLM's order.
    """

    def __init__(self, products: int, group: str, members: Sequence[Member], modules: Sequence[str]) -> None:
        self._products, self._group = products, group
        self._rows = sum(member.rows for member in members)
        starts: dict[str, slice] = {}
        end = 0
        for member in members:
            starts[member.module] = slice(end, end + member.rows)
            end += member.rows
        self._order = [starts[module] for module in modules]
        self._as_asked = [member.module for member in members] == list(modules)
        self._several = len(members) > len(modules)

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """An empty weight, for whoever asks for one.

        Raises: ShareError for another number of rows.
        """
        sizes = [part.stop - part.start for part in self._order]
        if isinstance(layer, ParallelLMHead):
            fits = sum(sizes) == layer.org_vocab_size  # vLLM pads the head, and cuts its logits
        elif len(self._order) > 1:
            fits = sizes == output_partition_sizes
        else:  # a checkpoint's own stack, as GPT-2's
            fits = sum(sizes) == sum(output_partition_sizes)
        if not fits:
            raise ShareError(f"group {self._group} has other sizes than vLLM's layer: it is of another model")
        layer.register_parameter("weight", nn.Parameter(torch.empty(0, dtype=params_dtype), False))

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`W x + bias`, see `Products.of`."""
        y: Tensor = product(x, self._products, self._group, self._rows, self._several)
        if not self._as_asked:
            y = torch.cat([y[..., part] for part in self._order], dim=-1)
        return y if bias is None else y + bias[: y.shape[-1]]

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """The head of a model with tied embeddings is split all the same."""
        return layer
