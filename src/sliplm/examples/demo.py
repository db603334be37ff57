"""The demonstration behind `slip demo`: one model three times, side by side.

The original; the hybrid of vault and worker; and what a thief makes of the worker's share alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sliplm.arithmetic.field import derive_key
from sliplm.errors import FetchError
from sliplm.examples.fetch import alone, cache_dir
from sliplm.examples.smollm2 import smollm2
from sliplm.examples.text import PROMPTS, wikipedia
from sliplm.filesystem import utf8_name
from sliplm.planning.counts import SplitReport, report_for
from sliplm.shares.keysource import Key, find
from sliplm.shares.manifest import FORMAT_VERSION
from sliplm.shares.recipe import Recipe
from sliplm.shares.share import read_vault_manifest, sliplm_version

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sliplm.engines.transformers.answer import Answer

ORIGINAL, HYBRID, THIEF = WHO = ("original", "hybrid", "thief")
RECIPE: Final = Recipe()
PROMPTS_SHOWN: Final = PROMPTS[:3]
NEW_TOKENS: Final = 48
TEXT_TOKENS: Final = 2048
WINDOW: Final = 512

Split = Callable[[Path, Path, Recipe], SplitReport]
"""Splits a checkpoint into a folder: `sliplm.split`, perhaps with a progress bar."""


@dataclass(frozen=True)
class Prepared:
    """Where the demonstration's model and its split lie."""

    model: Path
    out: Path
    report: SplitReport


@dataclass(frozen=True)
class Trio:
    """The three models, the tokenizer that they share, and the account of the split."""

    report: SplitReport
    models: Mapping[str, PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Round:
    """One prompt and the three answers to it."""

    prompt: str
    answers: Mapping[str, Answer]

    @property
    def same(self) -> bool:
        """Whether the hybrid generated the original's tokens."""
        return self.answers[ORIGINAL].tokens == self.answers[HYBRID].tokens


@dataclass(frozen=True)
class Comparison:
    """What came out.

    Attributes:
        rounds: one per prompt.
        tokens_per_second: decoding, over all prompts, measured in turn; the hybrid's masks were dealt before.
        masks_per_second: tokens that the vault deals masks for in a second, ahead of time.
        perplexity: on the same `text_tokens` tokens of Wikipedia.
        uniform: perplexity of a uniform guess: the size of the vocabulary.
    """

    rounds: tuple[Round, ...]
    tokens_per_second: dict[str, float]
    masks_per_second: float
    perplexity: dict[str, float]
    text_tokens: int
    uniform: int
    counters: dict[str, float]

    @property
    def same(self) -> bool:
        """Whether the hybrid generated the original's tokens in every round."""
        return all(round_.same for round_ in self.rounds)

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        rounds = [
            {
                "prompt": r.prompt,
                "same_tokens": r.same,
                "answers": {
                    who: asdict(a) | {"tokens_per_second": a.tokens_per_second}
                    for who, a in r.answers.items()
                },
            }
            for r in self.rounds
        ]
        return {**asdict(self), "rounds": rounds, "same_tokens": self.same}


class Watcher:
    """Told what happens while models are compared; does nothing."""

    def asked(self, prompt: str) -> None:
        """A prompt goes to the three models, in turn."""

    def says(self, who: str, text: str) -> None:
        """The whole text of an answer so far."""

    def answered(self, who: str, answer: Answer) -> None:
        """An answer is complete."""

    def round_over(self, done: Round) -> None:
        """All three answered."""

    def measures(self, who: str) -> None:
        """A perplexity is being measured, which takes a while."""


def prepare(folder: Path | None, split: Split) -> Prepared:
    """Fetch SmolLM2-135M-Instruct and split it, unless that is done.

    Args:
        folder: where to put model, vault and worker; None for the cache.
        split: does the splitting.

    Raises:
        FetchError: the model cannot be fetched, or the folder cannot be written.
        CredentialError: the user's key file cannot be read or made.
        ShareError: the split cannot be written, or an earlier one is damaged.
    """
    model = smollm2()
    if folder is None:
        out = cache_dir() / f"split-{sliplm_version()}-{_digest(RECIPE, find(None, new=True))}"
    else:
        model, out = _copy(model, folder / "model"), folder
    with alone(out) if folder is None else nullcontext():  # of several processes one splits, the others wait
        if (out / "vault").exists() and (out / "worker").exists():
            return Prepared(model, out, report_for(read_vault_manifest(out / "vault")))
        return Prepared(model, out, split(model, out, RECIPE))


@contextmanager
def trio(prepared: Prepared) -> Iterator[Trio]:
    """Load the three models and start the worker's process, until the end of the block.

    Raises:
        ShareError, WorkerError: as `sliplm.open`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    import sliplm
    from sliplm.engines.transformers.answer import load_tokenizer
    from sliplm.engines.transformers.thief import thief

    with utf8_name(prepared.model) as folder:
        original = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
    stolen = thief(prepared.model, prepared.out)
    # no background dealing: masks are dealt between the measurements, and counted apart
    with sliplm.open(prepared.out, ahead=0) as hybrid:
        models = {ORIGINAL: original, HYBRID: hybrid, THIEF: stolen}
        yield Trio(prepared.report, models, load_tokenizer(prepared.model))


def compare(
    three: Trio,
    watcher: Watcher,
    *,
    prompts: Sequence[str] = PROMPTS_SHOWN,
    new_tokens: int = NEW_TOKENS,
    text: str | None = None,
    text_tokens: int = TEXT_TOKENS,
) -> Comparison:
    """Let the three models answer the prompts and read the text, one after the other.

    Args:
        text: to measure perplexity on; None for Wikipedia.
    """
    from sliplm.engines.transformers.answer import answer, encode
    from sliplm.engines.transformers.perplexity import perplexity

    vault: Any = three.models[HYBRID].slip
    tokens = _tokens(three.tokenizer, wikipedia() if text is None else text, text_tokens)
    _warm_up(three)
    dealt, dealing = vault.counters.rows_dealt, vault.counters.seconds_dealing
    rounds: list[Round] = []
    for prompt in prompts:
        watcher.asked(prompt)
        inputs = encode(three.tokenizer, prompt)
        answers = {}
        for who, model in three.models.items():
            if who == HYBRID:
                vault.deal(inputs["input_ids"].shape[1] + new_tokens)
            answers[who] = answer(
                model,
                three.tokenizer,
                inputs,
                new_tokens=new_tokens,
                show=lambda so_far, who=who: watcher.says(who, so_far),  # type: ignore[misc]
            )
            watcher.answered(who, answers[who])
        rounds.append(Round(prompt, answers))
        watcher.round_over(rounds[-1])
    dealt, dealing = vault.counters.rows_dealt - dealt, vault.counters.seconds_dealing - dealing
    perplexities = {}
    for who, model in three.models.items():
        watcher.measures(who)
        perplexities[who] = perplexity(model, tokens, WINDOW)
    return Comparison(
        rounds=tuple(rounds),
        tokens_per_second={who: _speed([r.answers[who] for r in rounds]) for who in three.models},
        masks_per_second=dealt / three.report.exchanges / dealing,
        perplexity=perplexities,
        text_tokens=len(tokens),
        uniform=int(three.models[ORIGINAL].config.vocab_size),
        counters=vault.counters.as_dict(),
    )


def _warm_up(three: Trio) -> None:
    """A few tokens from each, so that no measurement meets compilers and cold files."""
    from sliplm.engines.transformers.answer import answer, encode

    inputs = encode(three.tokenizer, "Hello")
    for model in three.models.values():
        answer(model, three.tokenizer, inputs, new_tokens=4)


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, count: int) -> Tensor:
    """The first tokens [count] of a text, without special ones."""
    import torch

    found = tokenizer(text[: 16 * count], add_special_tokens=False)["input_ids"][:count]
    return torch.tensor(found, dtype=torch.int64)


def _speed(answers: Sequence[Answer]) -> float:
    seconds = sum(a.decode_seconds for a in answers)
    return sum(len(a.tokens) - 1 for a in answers) / seconds if seconds else 0.0


def _digest(recipe: Recipe, key: Key) -> str:
    """Names a split in the cache; one that another key sealed is another one."""
    return derive_key(key.secret, f"demo {FORMAT_VERSION} {recipe.model_dump_json()}").hex()[:8]


def _copy(model: Path, target: Path) -> Path:
    """A checkpoint of the user's own: what is done to it must not reach the cache."""
    if target.exists():
        return target
    unfinished = target.with_name(f".{target.name}")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(model, unfinished)
        unfinished.rename(target)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise FetchError(
            f"the model cannot be copied to {target} ({error.strerror or error}); "
            "choose another folder or make room"
        ) from error
    return target
