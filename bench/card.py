"""A language model end to end with cards: plain transformers in bfloat16 beside a vault on the card or on the
processor, with a worker on the card in a second process.

The model has random weights of a real one's shapes, made here.  Its split layers stand for a split of random
matrices: integers, secret bases, scales and challenges are as a split makes them, two layers' in turn stand
for all of them, and nothing is decomposed.  Every product is masked and checked.

python bench/card.py [--only MODEL] [--bits 8] [--layers N] [--tokens N] [--rows 1,8,16] [--prompt 2048]
    [--vaults card,host] [--profile]
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, Qwen3Config, Qwen3ForCausalLM

from _common import finish, machine
from sliplm.arithmetic import kernels
from sliplm.arithmetic.field import P, challenge_vectors, derive_key, new_key
from sliplm.arithmetic.kernels.cuda import driver
from sliplm.arithmetic.kernels.cuda.card import card
from sliplm.engines.idle import quietly
from sliplm.engines.modules import replace
from sliplm.parties.terms import Terms
from sliplm.parties.vault import Vault
from sliplm.parties.worker import Worker
from sliplm.shares.manifest import (
    Member,
    SourceModel,
    VaultGroup,
    VaultManifest,
    WorkerGroup,
    WorkerManifest,
)
from sliplm.shares.recipe import Recipe
from sliplm.shares.share import VaultShare, WorkerShare
from sliplm.shares.splitting import CHALLENGE_SETS, CHALLENGES, GroupSecrets

MODELS: Final[dict[str, tuple[type, PretrainedConfig]]] = {
    "Llama-2-7B": (LlamaForCausalLM, LlamaConfig(vocab_size=32000, max_position_embeddings=4096)),
    "Qwen3-4B": (
        Qwen3ForCausalLM,
        Qwen3Config(
            vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
            num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=4096,
            tie_word_embeddings=False,
        ),
    ),
}  # fmt: skip
PARTS: Final = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
COPIES: Final = 2
RANK: Final = 16
SPLIT_ID: Final = "5a" * 16
SOME: Final = 10_000_019
DTYPES: Final[dict[int, tuple[type, int, Literal["I8", "I16"]]]] = {
    8: (np.int8, 127, "I8"),
    12: (np.int16, 2047, "I16"),
}
DEVICE: Final = "cuda" if torch.cuda.is_available() else "cpu"
CONTEXT: Final = 16  # tokens before those that are timed

console = Console(stderr=True, width=100)
Widths = tuple[list[int], int]


class Model:
    """A model's shapes, and the groups that stand for its split."""

    def __init__(self, name: str, layers: int | None, bits: int) -> None:
        self.kind, config = MODELS[name]
        self.config = type(config).from_dict(config.to_dict())
        self.layers = self.config.num_hidden_layers = layers or config.num_hidden_layers
        if self.layers != config.num_hidden_layers and getattr(config, "layer_types", None):
            self.config.layer_types = config.layer_types[: self.layers]
        self.bits = bits
        with torch.device("meta"):
            empty = self.kind(self.config)
        modules = dict(empty.named_modules())
        self.widths: dict[str, Widths] = {}
        for copy in range(COPIES):
            for k, names in enumerate(PARTS):
                found: Any = [modules[f"model.layers.0.{name}"] for name in names]
                self.widths[f"g{copy * len(PARTS) + k}"] = (
                    [m.out_features for m in found],
                    found[0].in_features,
                )
        head: Any = modules["lm_head"]
        self.widths["head"] = [head.out_features], head.in_features

    def members(self) -> Iterator[tuple[str, list[str]]]:
        """Each layer's group and the modules in it."""
        for layer in range(self.layers):
            for k, names in enumerate(PARTS):
                group = f"g{layer % COPIES * len(PARTS) + k}"
                yield group, [f"model.layers.{layer}.{name}" for name in names]
        yield "head", ["lm_head"]

    def weights(self) -> Iterator[tuple[str, kernels.Integers]]:
        """Integers as a split makes them."""
        dtype, largest, _ = DTYPES[self.bits]
        some = np.random.default_rng(self.bits).integers(-largest, largest + 1, SOME, dtype)
        for number, (name, (rows, columns)) in enumerate(self.widths.items()):
            yield name, np.resize(np.roll(some, 1000 * number), (sum(rows), columns))

    def worker_share(self) -> WorkerShare:
        """A worker's share in memory."""
        matrices, dtype = dict(self.weights()), DTYPES[self.bits][2]
        groups = tuple(
            WorkerGroup(name=name, rows=w.shape[0], columns=w.shape[1], dtype=dtype)
            for name, w in matrices.items()
        )
        manifest = WorkerManifest(split_id=SPLIT_ID, groups=groups, files={})
        return WorkerShare(Path(), manifest, matrices, {})

    def vault_share(self, worker: WorkerShare) -> VaultShare:
        """The vault's, to the same integers."""
        groups, secrets = [], {}
        for name, (rows, columns) in self.widths.items():
            members = tuple(Member(f"{name}.{i}", count) for i, count in enumerate(rows))
            groups.append(
                VaultGroup(
                    name=name, rows=sum(rows), columns=columns, dtype=DTYPES[self.bits][2], members=members,
                    rank=RANK, precision=self.bits, rotation="fast", error=0, svd_error=0,
                )
            )  # fmt: skip
            secrets[name] = self._secrets(name, worker.matrices[name])
        source = SourceModel(name="random", config_class="random", parameters=0)
        manifest = VaultManifest(
            split_id=SPLIT_ID, sliplm="bench", source=source, recipe=Recipe(),
            groups=tuple(groups), kept=(), kept_tensors=(), kept_bytes=0, attention=(), files={},
            worker_files={},
        )  # fmt: skip
        members_of = {group.name: group.members for group in groups}
        return VaultShare(Path(), manifest, secrets, members_of, new_key(), {})

    def _secrets(self, name: str, w: kernels.Integers) -> GroupSecrets:
        (m, n), seed, generator = w.shape, new_key(), np.random.default_rng(0)
        e = challenge_vectors(derive_key(seed, "challenges 0"), CHALLENGES, m)
        c = np.zeros((CHALLENGES * CHALLENGE_SETS, n), np.uint32)
        c[:CHALLENGES] = _products(e, w)
        size = DTYPES[self.bits][1] / 3**0.5

        def normal(*shape: int) -> np.ndarray:
            return np.asarray(generator.standard_normal(shape) / n**0.5, np.float32)

        ones, scale = np.ones, np.full(m, 1 / size / n**0.5, np.float32)
        return GroupSecrets(
            name, m, n, self.bits, "fast", normal(m, RANK), normal(RANK, n), ones(m, np.float32),
            ones(n, np.float32), scale, 1.1 * size * n**0.5, 1.0, c, seed,
        )  # fmt: skip

    def plain(self) -> Any:
        """The model itself on the card in bfloat16."""
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device(DEVICE):
                return self.kind(self.config).eval()
        finally:
            torch.set_default_dtype(torch.float32)

    def split(self, vault: Vault, device: str) -> Any:
        """The model with its layers split."""
        with torch.device("meta"):
            model: Any = self.kind(self.config).to(torch.bfloat16).eval()
        modules = dict(model.named_modules())
        groups, names = {}, []
        for number, (group, members) in enumerate(self.members()):
            found: list[Any] = [modules[name] for name in members]
            groups[f"{number}"] = [
                Member(name, m.out_features) for name, m in zip(members, found, strict=True)
            ]
            names.append(group)
        for product, name in zip(replace(model, groups, vault), names, strict=True):
            product.name = product._on_card._name = name
        model.to_empty(device=device)
        for tensor in model.parameters():
            tensor.data.normal_(0, 0.02) if tensor.ndim > 1 else tensor.data.fill_(1)
        model.model.rotary_emb = type(model.model.rotary_emb)(self.config).to(device)
        kind = type(model)
        model.__class__ = type(kind.__name__, (kind,), {"forward": quietly(kind.forward)})
        return model.requires_grad_(False)


def _products(e: np.ndarray, w: kernels.Integers) -> Any:
    """e^T w mod p, in halves of 16 bits: sums below 2^53."""
    there = torch.from_numpy(np.ascontiguousarray(w)).to(DEVICE).to(torch.float64)

    def times(part: np.ndarray) -> np.ndarray:
        found = torch.from_numpy(part.astype(np.float64)).to(DEVICE) @ there
        return found.cpu().numpy().astype(np.int64)

    low, high = times(e & 0xFFFF), times(e >> 16)
    return ((high % P * 65536 + low) % P).astype(np.uint32)


def serve(model: Model, address: str, device: str) -> None:
    """The worker's process."""
    Worker(model.worker_share(), device=device).serve(address, ready=lambda _: print("ready", flush=True))


@contextmanager
def worker(asked: argparse.Namespace, name: str) -> Iterator[str]:
    """A worker on the card in a process of its own: its address."""
    with tempfile.TemporaryDirectory() as folder:
        address = f"shm:{folder}/door"
        command = [sys.executable, __file__, "--serve", address, "--only", name, "--bits", str(asked.bits)]
        with subprocess.Popen([*command, "--worker-on", asked.worker_on], stdout=subprocess.PIPE) as process:
            try:
                if process.stdout is None or not process.stdout.readline():
                    raise SystemExit("the worker did not start")
                yield address
            finally:
                process.terminate()


def settled(model: Any) -> None:
    """Wait for the card."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()


@torch.inference_mode()
def decoding(model: Any, rows: int, tokens: int, vault: Vault | None = None) -> float:
    """Milliseconds of a step of greedy decoding, the median."""
    ids = torch.randint(0, 1000, (rows, CONTEXT), device=model.device)
    out = model(ids, use_cache=True, logits_to_keep=1)
    spent = []
    before = vault.counters.as_dict() if vault else {}
    for _ in range(tokens + 2):
        following = out.logits[:, -1].argmax(-1, keepdim=True)
        settled(model)
        start = time.perf_counter()
        out = model(following, past_key_values=out.past_key_values, use_cache=True)
        if vault:
            vault.settle()
        settled(model)
        spent.append((time.perf_counter() - start) * 1e3)
    if vault:
        console.print(where(before, vault, tokens + 2))
    return statistics.median(spent[2:])


@torch.inference_mode()
def reading(model: Any, tokens: int, vault: Vault | None = None, repeats: int = 3) -> float:
    """Milliseconds of reading a prompt, the median."""
    ids = torch.randint(0, 1000, (1, tokens), device=model.device)
    spent = []
    for _ in range(repeats + 1):
        settled(model)
        before = vault.counters.as_dict() if vault else {}
        start = time.perf_counter()
        model(ids, use_cache=True, logits_to_keep=1)
        if vault:
            vault.settle()
        settled(model)
        spent.append((time.perf_counter() - start) * 1e3)
        if vault:
            console.print(where(before, vault, 1))
    return statistics.median(spent[1:])


def where(before: dict[str, float], vault: Vault, steps: int) -> str:
    """Milliseconds of a step by what they went into."""
    now = vault.counters.as_dict()
    names = ["burn", "vault", "check", "worker", "link", "dealing_late"]
    parts = [
        f"{name} {(now[f'seconds_{name}'] - before[f'seconds_{name}']) / steps * 1e3:.2f}" for name in names
    ]
    return f"{(now['exchanges'] - before['exchanges']) / steps:.0f} exchanges: " + ", ".join(parts)


def deal(model: Model, vault: Vault, rows: int, *, head: int | None = None) -> float:
    """Deal for so many rows of each layer; seconds."""
    start = time.perf_counter()
    for group in model.widths:
        left = (head or rows) if group == "head" else rows * -(-model.layers // COPIES)
        while left > 0:
            vault.deal(min(left, 1024), [group])
            left -= 1024
    return time.perf_counter() - start


def end_to_end(asked: argparse.Namespace, name: str) -> dict[str, Any]:
    """One model's figures."""
    model = Model(name, asked.layers, asked.bits)
    found: dict[str, Any] = {"model": name, "layers": model.layers, "bits": asked.bits}
    rows = [int(each) for each in asked.rows.split(",")]
    plain = model.plain()
    found["plain_ms"] = {r: round(decoding(plain, r, asked.tokens), 2) for r in rows}
    if asked.prompt:
        found["plain_prompt_ms"] = round(reading(plain, asked.prompt), 2)
    del plain
    torch.cuda.empty_cache()
    console.print(found)
    share = model.worker_share()
    ours = model.vault_share(share)
    with worker(asked, name) as address:
        for place in asked.vaults.split(","):
            terms = Terms([address], share, ahead=0, timeout=120, deal_on="cuda")
            with Vault(ours, terms) as vault:
                one = model.split(vault, "cuda" if place == "card" else "cpu")
                for r in rows:
                    dealt = deal(model, vault, r * (CONTEXT + asked.tokens + 3))
                    found[f"{place}_{r}_ms"] = round(decoding(one, r, asked.tokens, vault), 2)
                    found[f"{place}_{r}_dealing_s"] = round(dealt, 2)
                    console.print(found)
                if asked.profile:
                    deal(model, vault, CONTEXT + asked.tokens + 3)
                    with cProfile.Profile() as profile:
                        decoding(one, 1, asked.tokens, vault)
                    pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(45)
                if asked.prompt:
                    dealt = deal(model, vault, 2 * asked.prompt, head=8)
                    found[f"{place}_prompt_ms"] = round(reading(one, asked.prompt, vault, 1), 2)
                    found[f"{place}_prompt_dealing_s"] = round(dealt, 2)
                del one
            console.print(found)
    return found


def main() -> None:
    """Measure and end with one JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=MODELS, default="Llama-2-7B")
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--rows", default="1,8,16")
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--vaults", default="card,host")
    parser.add_argument("--worker-on", default="cuda")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        serve(Model(asked.only, 1, asked.bits), asked.serve, asked.worker_on)
        return
    if not driver.count():
        finish({"bench": "card", "skipped": "there is no NVIDIA card here"})
        return
    torch.manual_seed(0)
    results = end_to_end(asked, asked.only)
    about = machine() | {"card": torch.cuda.get_device_name(), "versions": card(0).versions}
    finish({"bench": "card", "machine": about, "results": results})


if __name__ == "__main__":
    main()
