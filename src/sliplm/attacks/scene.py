"""The stage: the victim, its splits as real artefacts, the text, and what an attacker gets of them."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from sliplm.attacks.case import Case, Placement, ShareView
from sliplm.engines.transformers.convert import split
from sliplm.errors import InputError
from sliplm.recipe import Recipe
from sliplm.share import open_vault, open_worker

AGAIN = " again"  # the second split of the same weights, of another rank


@dataclass(frozen=True)
class Text:
    """Windows of tokens, int64 [windows, length], that have no window in common.

    Attributes:
        train: what the attacker asks and trains on.  valid: for his searches.  test: for the tables.
    """

    train: Tensor
    valid: Tensor
    test: Tensor

    @classmethod
    def of(cls, tokens: Tensor, window: int, held_out: int) -> Text:
        """Cut tokens [count] into windows; the last `held_out` are the test's, as many before them the
        validation's.

        Raises:
            InputError: the text is too short to train on.
        """
        windows = tokens[: len(tokens) // window * window].reshape(-1, window)
        if len(windows) < 4 * held_out:
            raise InputError(
                f"the text has {len(tokens)} tokens; an attack wants {4 * held_out * window} at least: "
                "give a longer text"
            )
        return cls(windows[: -2 * held_out], windows[-2 * held_out : -held_out], windows[-held_out:])


class Oracle:
    """The victim behind its interface: logits on the windows that are asked for, counted once each.

    The last hidden states of the training windows are kept (bfloat16 on a GPU), so that asking again in a
    later epoch, or by the next attack, costs one product with the head.
    """

    def __init__(self, victim: PreTrainedModel, text: Text) -> None:
        self._victim, self._text = victim, text
        self._states: dict[int, Tensor] = {}  # hidden layer (-1: the last) -> [windows, length, width]
        self._known: dict[int, Tensor] = {}
        self._seen = torch.zeros(len(text.train), dtype=torch.bool)

    @property
    def asked(self) -> int:
        """Tokens asked since `forget`, each window once."""
        return int(self._seen.sum()) * self._text.train.shape[1]

    def forget(self) -> None:
        """Begin to count anew."""
        self._seen.zero_()

    def answers(self, indices: Tensor) -> Tensor:
        """The logits on training windows: float32 [len(indices), length, vocabulary]."""
        self._seen[indices] = True
        head = self._victim.get_output_embeddings()
        with torch.no_grad(), autocast(self._victim.device):
            logits: Tensor = head(self.hidden(indices, -1))
        return logits.float()

    def hidden(self, indices: Tensor, layer: int) -> Tensor:
        """Hidden states that enter a block of the victim (-1: the head) on training windows."""
        if layer not in self._states:
            width = self._victim.config.get_text_config().hidden_size
            kind = torch.bfloat16 if self._victim.device.type == "cuda" else torch.float32
            shape = (*self._text.train.shape, width)
            self._states[layer] = torch.empty(shape, dtype=kind, device=self._victim.device)
            self._known[layer] = torch.zeros(len(self._text.train), dtype=torch.bool)
        missing = indices[~self._known[layer][indices]]
        for part in torch.split(missing, 32) if len(missing) else ():
            tokens = self._text.train[part].to(self._victim.device)
            with torch.no_grad(), autocast(self._victim.device):
                base = self._victim.base_model
                states = base(input_ids=tokens, use_cache=False, output_hidden_states=layer >= 0)
            found = states.last_hidden_state if layer < 0 else states.hidden_states[layer]
            self._states[layer][part] = found.to(self._states[layer].dtype)
        self._known[layer][missing] = True
        return self._states[layer][indices]


class Scene:
    """The victim with its splits; `case` hands out what an attacker holds.

    Args:
        model_dir: the checkpoint.
        work: a folder for the splits; whatever is there already is used again.
        recipes: name -> recipe of the splits to attack.
    """

    def __init__(
        self, model_dir: Path, work: Path, text: Text, recipes: Mapping[str, Recipe], device: torch.device
    ) -> None:
        self.text, self.device = text, device
        self._model_dir, self._work, self._recipes = model_dir, work, dict(recipes)
        self._relatives: dict[str, dict[str, Tensor]] = {}
        self._views: dict[str, dict[str, ShareView]] = {}
        victim = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, local_files_only=True)
        self.victim: PreTrainedModel = victim.to(device).requires_grad_(False).eval()
        self.oracle = Oracle(self.victim, text)

    @property
    def parameters(self) -> int:
        """Of the victim, tied ones once: what budgets are percentages of."""
        return sum(p.numel() for p in self.victim.parameters())

    def prepare(self, names: tuple[str, ...]) -> None:
        """Make the splits that are not there yet."""
        for name in names:
            self.views(name)

    def add_relative(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Publish a relative of the victim: parameter -> value."""
        self._relatives[name] = dict(state)

    def case(self, recipe: str, placement: Placement, relative: str = "") -> Case:
        """What an attacker on this split holds; `recipe` "none": he has no share."""
        protected = {n: v for n, v in self.views(self._any(recipe)).items() if placement.protects(n)}
        hidden = {name for view in protected.values() for name in view.parts()}
        known = {}
        if placement.patterns is not None:
            known = {n: p.detach() for n, p in self.victim.named_parameters() if n not in hidden}
        second = (
            {n: v for n, v in self.views(recipe + AGAIN).items() if n in protected}
            if (recipe + AGAIN in self._recipes)
            else None
        )
        shares = {} if recipe == "none" else protected
        kin = self._relatives[relative] if relative else None
        return Case(recipe, placement, self.victim.config, shares, known, kin, second)

    def views(self, name: str) -> dict[str, ShareView]:
        """The worker's share of a split, with the granted scales: group -> view."""
        if name not in self._views:
            out, key = self._work / name.replace(" ", "-"), self._work / "key"
            if not key.exists():
                self._work.mkdir(parents=True, exist_ok=True)
                key.touch(mode=0o600)
                key.write_text(secrets.token_hex(32))
            if not (out / "vault").exists():
                split(self._model_dir, out, self._recipes[name], key=f"file:{key}")
            worker, vault = open_worker(out / "worker"), open_vault(out / "vault", f"file:{key}")
            self._views[name] = {
                group.name: ShareView(
                    group.name,
                    tuple((member.module, member.rows) for member in group.members),
                    _dequantised(worker.matrices[group.name], vault.groups[group.name].scale, self.device),
                    group.rank,
                )
                for group in vault.manifest.groups
            }
        return self._views[name]

    def _any(self, recipe: str) -> str:
        return recipe if recipe != "none" else next(iter(self._recipes))


def _dequantised(integers: object, scale: object, device: torch.device) -> Tensor:
    return torch.tensor(integers, device=device).float() * torch.tensor(scale, device=device)[:, None]


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU; nothing on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
