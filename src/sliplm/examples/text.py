"""Real English text to measure models on, and prompts to compare them by."""

from __future__ import annotations

import json
import re
from pathlib import Path

from sliplm.examples.fetch import build_once, fetch_package, take_member, working

PACKAGE, VERSION = "bigbench", "1.0.0"
SHA256 = "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2"
_MEMBER = "bigbench-1.0.0/bigbench/benchmark_tasks/paragraph_segmentation/task.json"
# The task holds a thousand articles in each of nine languages; these are the English ones.
_ENGLISH = slice(1000, 2000)

# Markup, formulas, and the holes that dropped templates left ("an area of .", '""').
_BROKEN = re.compile(r'formula_\d|[\[\]{}|<>\\=]|""|"\s"| [.,;:]|\(as of \)')
_EMPTY = re.compile(r" ?\([\s,;]*\)")
_RAGGED = re.compile(r"\([\s,;]+")

PROMPTS: tuple[str, ...] = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about the sea.",
    "List three uses for an old newspaper.",
    "What is 17 plus 25?",
    "Tell me a story about a fox and a crow.",
    "How do I boil an egg?",
    "Summarize the plot of Romeo and Juliet.",
    "Who was Isaac Newton?",
    "Write a Python function that reverses a string.",
    "Give me some advice for a job interview.",
    "What is the difference between a lake and a river?",
    "Translate 'good morning' into Spanish.",
    "Why do leaves change color in autumn?",
    "Name five animals that live in the ocean.",
    "Write a polite email asking for a day off.",
    "What does a computer's memory do?",
    "Describe a busy market in the morning.",
    "How does a vaccine protect the body?",
    "Rewrite this sentence in the past tense: She walks to school every day.",
)
"""Twenty short prompts for an instruct model."""


def wikipedia() -> str:
    """Return about 6 MB of English Wikipedia: one paragraph a line, an article's paragraphs together.

    It is the English part of BIG-bench's paragraph_segmentation task with damaged paragraphs left out.
    Measure with it; do not train on it, as BIG-bench asks, nor put it into a repository.  The first call
    downloads 358 MB, which it deletes again.

    Raises:
        FetchError: the package cannot be fetched, its text is not as expected, or the cache cannot be
            written.
    """
    return build_once("wikipedia-en-v1.txt", _make).read_text(encoding="utf-8")


def _make(target: Path) -> None:
    sdist = fetch_package(PACKAGE, VERSION, SHA256, kind="sdist")
    raw = target.with_name("task.json")
    with working("Taking the text out ..."):
        take_member(sdist, _MEMBER, raw)
        articles = json.loads(raw.read_bytes())["examples"][_ENGLISH]
        lines = [line for article in articles for line in _paragraphs(article["input"], article["target"])]
        target.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    # 358 MB of which nothing else is needed.
    sdist.unlink(missing_ok=True)


def _paragraphs(sentences: str, ends: str) -> list[str]:
    """The sound paragraphs of an article, given a sentence a line and a 1 for each that ends a paragraph."""
    found = [""]
    for sentence, end in zip(sentences.rstrip("\n").split("\n"), ends.split(), strict=True):
        found[-1] += f" {sentence}" if found[-1] else sentence
        if end == "1":
            found.append("")
    tidy = (_RAGGED.sub("(", _EMPTY.sub("", " ".join(paragraph.split()))) for paragraph in found)
    return [line for line in tidy if len(line) >= 100 and line[-1] in '.!?"' and not _BROKEN.search(line)]
