"""A whole plan: look at the checkpoint, check the budget, measure, recommend, and write the files."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sliplm import durable
from sliplm.planning.planner import DEFAULT_RANK, Budget, Recommendation
from sliplm.report import need
from sliplm.report.figures import save_png
from sliplm.report.page import write_page
from sliplm.sensitivity import pages
from sliplm.sensitivity.results import Results
from sliplm.sensitivity.study import Progress, make_planner, run_study
from sliplm.sensitivity.subject import open_subject
from sliplm.sensitivity.text import windows_of
from sliplm.sensitivity.variants import Grid
from sliplm.shares.share import sliplm_version
from sliplm.shares.tensorfile import write_error

WINDOW = 512


@dataclass(frozen=True)
class Wish:
    """What to measure, and the budget to recommend for; `offload` as `opening.open_model`."""

    budget: Budget
    tokens: int
    grid: Grid
    device: torch.device
    offload: bool | None = None


@dataclass(frozen=True)
class Made:
    """What came out, and the files that were written."""

    results: Results
    advice: Recommendation
    document: dict[str, Any]
    files: tuple[Path, ...]


def plan(model_dir: Path, out: Path, text: str, wish: Wish, progress: Progress | None = None) -> Made:
    """Study a checkpoint on a text, and write `out/plan.html`, its pictures, `plan.json` and `recipe.json`.

    Raises:
        CheckpointError: the checkpoint is damaged or of no kind that can be split, or has no tokenizer.
        RecipeError: no recipe meets the budget: that is found out before anything is measured.
        InputError: the text is too short.
        MismatchError, ShareError: `out` is about another checkpoint, in use, or cannot be written.
        ReportError: a library that the report needs is missing.
    """
    need()
    began = time.monotonic()
    subject = open_subject(model_dir)
    make_planner(subject, None, wish.grid).check(wish.budget)
    windows = windows_of(model_dir, text, wish.tokens, _window(subject.stored.layout.config, wish.tokens))
    results = run_study(subject, out, windows, wish.grid, wish.device, wish.offload, progress)
    advice = make_planner(subject, results, wish.grid).recommend(wish.budget)
    document = _document(results, advice, wish.budget, time.monotonic() - began)
    return Made(results, advice, document, _write(out, results, advice, wish.budget, document))


def in_words(budget: Budget, advice: Recommendation) -> str:
    """The budget for a reader."""
    macs = budget.macs or f"{advice.limit_macs:,.0f} (no limit was given: what rank {DEFAULT_RANK} takes)"
    words = [f"multiply-adds a token at most {macs}"]
    if budget.bytes is not None:
        words.append(f"bytes of the vault at most {budget.bytes}")
    if budget.exchanges is not None:
        words.append(f"exchanges a token at most {budget.exchanges}")
    return ", ".join(words)


def _window(config: Any, tokens: int) -> int:
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(WINDOW, tokens, longest if isinstance(longest, int) and longest > 1 else WINDOW)


def _document(results: Results, advice: Recommendation, budget: Budget, seconds: float) -> dict[str, Any]:
    report = json.loads(advice.report.model_dump_json(exclude={"groups"}))
    return {
        "sliplm": sliplm_version(),
        "seconds": round(seconds, 3),
        "budget": in_words(budget, advice),
        "recipe": json.loads(pages.recipe_text(advice.recipe)),
        "worth": advice.worth,
        "choices": [vars(choice) for choice in advice.choices],
        "report": report,
        "results": json.loads(results.model_dump_json()),
    }


def _write(
    out: Path, results: Results, advice: Recommendation, budget: Budget, document: dict[str, Any]
) -> tuple[Path, ...]:
    sections = pages.sections(results, advice, in_words(budget, advice))
    page = out / "plan.html"
    write_page(page, f"Plan for {results.model}", pages.lead(results), sections)
    texts = {
        "recipe.json": pages.recipe_text(advice.recipe),
        "plan.json": json.dumps(document, indent=1) + "\n",
    }
    for name, content in texts.items():
        try:
            durable.replace(out / name, content.encode(), lasting=False)
        except OSError as error:
            raise write_error(out / name, len(content), error) from error
    pictures = [save_png(picture, out) for section in sections for picture in section.pictures]
    return (page, *(out / name for name in texts), *pictures)
