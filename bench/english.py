"""Seventy megabytes of English for attackers with large budgets: `python bench/english.py english.txt`.

A text that is seen ten times is worth less to a thief than one that is ten times as long.  This is the prose
of some tasks of BIG-bench, then the Wikipedia of `sliplm.examples.text`, whose end is what `slip attack`
holds out.  Measure with it; do not train on it, as BIG-bench asks, nor put it into a repository.
"""

from __future__ import annotations

import json
import re
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from sliplm.examples.fetch import fetch_package
from sliplm.examples.text import PACKAGE, SHA256, VERSION, wikipedia

_FOLDER = f"bigbench-{VERSION}/bigbench/benchmark_tasks/"
_TASKS = (
    "coqa_conversational_question_answering",
    "gem",
    "movie_dialog_same_or_different",
    "multiemo",
    "natural_instructions",
    "real_or_fake_text",
    "squad_shifts",
    "topical_chat",
    "vitaminc_fact_verification",
    "which_wiki_edit",
)
_COMMON = re.compile(r"\b(the|of|and|to|in|is|a|was|that|it|you|for)\b", re.IGNORECASE)
_LENGTHS = range(200, 20_000)


def prose() -> Iterator[str]:
    """Paragraphs of English, each once; those that differ only in what follows their beginning are one."""
    seen: set[str] = set()
    with tarfile.open(fetch_package(PACKAGE, VERSION, SHA256, kind="sdist")) as archive:
        for member in archive:
            if not (member.name.startswith(_FOLDER) and member.name.endswith(".json")):
                continue
            if member.name.removeprefix(_FOLDER).split("/")[0] not in _TASKS:
                continue
            file = archive.extractfile(member)
            for text in _strings(json.loads(file.read())) if file else ():
                for line in text.split("\n"):
                    paragraph = " ".join(line.split())
                    start = paragraph[20:100]
                    if len(paragraph) in _LENGTHS and start not in seen and _is_english(paragraph):
                        seen.add(start)
                        yield paragraph


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)


def _is_english(paragraph: str) -> bool:
    foreign = sum(ord(letter) > 126 for letter in paragraph)
    return foreign <= 0.02 * len(paragraph) and len(_COMMON.findall(paragraph)) >= 0.15 * len(
        paragraph.split()
    )


if __name__ == "__main__":
    with Path(sys.argv[1]).open("w", encoding="utf-8", newline="\n") as out:
        for each in prose():
            out.write(each + "\n")
        out.write(wikipedia())
