"""The stage: the victim, its splits as real artefacts, the text, and what an attacker gets of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sliplm.attacks.case import Case, Part, Placement, ShareView
from sliplm.attacks.device import autocast
from sliplm.attacks.folder import AGAIN, key_of
from sliplm.attacks.relatives import Relative, perturbed, read_model
from sliplm.attacks.text import Text
from sliplm.errors import CheckpointError
from sliplm.shares.manifest import VaultGroup
from sliplm.shares.recipe import Recipe
from sliplm.shares.share import open_vault, open_worker
from sliplm.shares.splitting import GroupSecrets


class Oracle:
    """The victim behind its interface: logits on the windows that are asked for, counted once each.

    The last hidden states of the training windows are kept in the host's memory (bfloat16 if the victim is on
    a GPU, which a large budget's would fill), so that asking again in a later epoch, or by the next attack,
    costs one product with the head.

    Raises:
        CheckpointError: the model's logits are not what its head makes of its last hidden states.
    """

    def __init__(self, victim: PreTrainedModel, text: Text) -> None:
        self._victim, self._text = victim, text
        self._states: dict[int, Tensor] = {}  # hidden layer (-1: the last) -> [windows, length, width]
        self._known: dict[int, Tensor] = {}
        self._seen = torch.zeros(len(text.train), dtype=torch.bool)
        self._cap: float | None = getattr(
            victim.config.get_text_config(), "final_logit_softcapping", None
        )  # Gemma's
        self._check()

    @property
    def asked(self) -> int:
        """Tokens asked since `forget`, each window once."""
        return int(self._seen.sum()) * self._text.train.shape[1]

    def forget(self) -> None:
        """Begin to count anew."""
        self._seen.zero_()

    def questions(self, count: int) -> Tensor:
        """The first windows of the training text."""
        return self._text.train[:count].to(self._victim.device)

    def answers(self, indices: Tensor) -> Tensor:
        """The logits on training windows: float32 [len(indices), length, vocabulary]."""
        return self.head(self.hidden(indices, -1))

    def head(self, states: Tensor) -> Tensor:
        """Logits from last hidden states, in float32 whatever the states were kept in."""
        with torch.no_grad():
            logits: Tensor = self._victim.get_output_embeddings()(states.float())
        return logits if self._cap is None else self._cap * torch.tanh(logits / self._cap)

    def hidden(self, indices: Tensor, layer: int) -> Tensor:
        """Hidden states that enter a block of the victim (-1: the head) on training windows."""
        self._seen[indices] = True
        if layer not in self._states:
            kind = torch.bfloat16 if self._victim.device.type == "cuda" else torch.float32
            shape = (*self._text.train.shape, self._run(self._text.train[:1], layer).shape[-1])
            self._states[layer] = torch.empty(shape, dtype=kind)
            self._known[layer] = torch.zeros(len(self._text.train), dtype=torch.bool)
        missing = indices[~self._known[layer][indices]]
        for part in torch.split(missing, 32) if len(missing) else ():
            states = self._run(self._text.train[part], layer)
            self._states[layer][part] = states.to("cpu", self._states[layer].dtype)
        self._known[layer][missing] = True
        return self._states[layer][indices].to(self._victim.device)

    def _run(self, tokens: Tensor, layer: int) -> Tensor:
        with torch.no_grad(), autocast(self._victim.device):
            states = self._victim.base_model(
                input_ids=tokens.to(self._victim.device), use_cache=False, output_hidden_states=layer >= 0
            )
        found: Tensor = states.last_hidden_state if layer < 0 else states.hidden_states[layer]
        return found

    def _check(self) -> None:
        """Some families scale their logits behind the head, where the loop above would not see it."""
        tokens = self._text.train[:1].to(self._victim.device)
        with torch.no_grad():
            wanted = self._victim(input_ids=tokens, use_cache=False).logits.float()
            base = self._victim.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        if not torch.allclose(self.head(base), wanted, rtol=1e-2, atol=1e-2 * float(wanted.abs().max())):
            raise CheckpointError(
                f"{type(self._victim).__name__} changes its logits behind the head in a way that is not "
                "known here: it can be split, but not attacked with logits"
            )


class Scene:
    """The victim with its splits; `case` hands out what an attacker holds.

    Args:
        model_dir: the checkpoint.
        work: the folder that `prepare` put the splits into.
        recipes: name -> recipe of the splits to attack; "NAME-again" is a second split of the same weights.
        relatives: name -> public relative.
    """

    def __init__(
        self,
        model_dir: Path,
        work: Path,
        text: Text,
        recipes: Mapping[str, Recipe],
        device: torch.device,
        relatives: Mapping[str, Relative] | None = None,
    ) -> None:
        self.text, self.device = text, device
        self._work, self._recipes = work, dict(recipes)
        self._relatives = dict(relatives or {})
        self._views: dict[str, dict[str, ShareView]] = {}
        self._kin: dict[str, dict[str, Tensor]] = {}
        self.victim = read_model(model_dir).to(device).requires_grad_(False)
        self.oracle = Oracle(self.victim, text)

    @property
    def parameters(self) -> int:
        """Of the victim, tied ones once: what budgets are percentages of."""
        return sum(p.numel() for p in self.victim.parameters())

    def case(self, recipe: str, placement: Placement, relative: str = "") -> Case:
        """What an attacker on this split holds; `recipe` "none": he has no share."""
        # without a share the same groups are protected; any split names them
        views = self._view(recipe if recipe != "none" else next(iter(self._recipes)))
        protected = {name: view for name, view in views.items() if placement.protects(name)}
        members = {name: view.members for name, view in protected.items()}
        known = {}
        if placement.patterns is not None:
            every = dict(self.victim.named_parameters(remove_duplicate=False))  # tied ones by all their names
            hidden = {id(every[part.parameter]) for view in protected.values() for part in view.members}
            known = {name: p.detach() for name, p in every.items() if id(p) not in hidden}
        second = None
        if recipe + AGAIN in self._recipes:
            again = self._view(recipe + AGAIN)
            second = {name: again[name] for name in protected}
        kin = self._relative(relative) if relative else None
        shares = {} if recipe == "none" else protected
        return Case(recipe, placement, self.victim.config, members, shares, known, kin, second)

    def _view(self, name: str) -> dict[str, ShareView]:
        """The worker's share of a split, with the granted scales: group -> view."""
        if name not in self._views:
            out, key = self._work / name, key_of(self._work)
            worker, vault = open_worker(out / "worker"), open_vault(out / "vault", key)
            self._views[name] = {
                group.name: ShareView(
                    group.name,
                    self._members(group),
                    _dequantised(worker.matrices[group.name], vault.groups[group.name], self.device),
                    group.rank,
                    group.rotation != "none",
                )
                for group in vault.manifest.groups
            }
        return self._views[name]

    def _members(self, group: VaultGroup) -> tuple[Part, ...]:
        """The layers of a group; that he knows which expert a secret number stands for is granted."""
        if (expert := group.expert) is not None:
            transposed = bool(self.victim.get_submodule(expert.module).is_transposed)
            return (Part(f"{expert.module}.{expert.weight}", group.rows, transposed, expert.number),)
        modules = [(self.victim.get_submodule(m.module), m) for m in group.members]
        return tuple(Part(m.module, m.rows, isinstance(module, Conv1D)) for module, m in modules)

    def _relative(self, name: str) -> dict[str, Tensor]:
        """Parameter -> value of a public relative."""
        if name not in self._kin:
            made = self._relatives[name]
            if isinstance(made, Path):
                state = dict(read_model(made).to(self.device).requires_grad_(False).named_parameters())
            else:
                state = perturbed(self.victim, made)
            first = {id(p): name for name, p in self.victim.named_parameters()}
            every = self.victim.named_parameters(remove_duplicate=False)
            self._kin[name] = {alias: state[first[id(p)]] for alias, p in every}
        return self._kin[name]


def _dequantised(integers: object, secrets: GroupSecrets, device: torch.device) -> Tensor:
    """W_R with the granted scales, and the mean size of its diagonals: what they take from single rows and
    columns is secret, how large all of W_D is shall be known.
    """
    size = np.sqrt(np.square(secrets.d_out).mean() * np.square(secrets.d_in).mean())
    scale = torch.tensor(secrets.scale * size, device=device)
    return torch.tensor(integers, device=device).float() * scale[:, None]
