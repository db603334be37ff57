"""What a worker sees of a real model: uniform numbers, and nothing of the prompts but their length.

A tap between the vault and a worker process keeps every message of a dozen runs; the test knows the inputs.
All false alarms together have a chance below 10^-6: at most 100 p-values, each below ALARM once in 10^8.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sliplm
import uniformity
from families import make
from ledger import Ledger, size
from recorder import Transcript, tapped, worker_process
from sliplm.arithmetic.field import P, centre
from sliplm.engines.transformers.load import reference
from sliplm.examples import PROMPTS, demo
from sliplm.parties.codec import GroupCodec
from sliplm.protocol.frames import Kind
from sliplm.shares.share import open_vault
from uniformity import PValues

ALARM = 1e-8
PROMPT_TOKENS = 8
NEW_TOKENS = size(9, 65)
RUNS = size(8, 15)  # the first two have the same prompt

Message = tuple[int, np.ndarray]


@dataclass
class Seen:
    """All runs of one session.

    Attributes:
        runs: the messages of each run.
        frames: (kind, group, rows, bytes) of each run.
        inputs: x_int of each message of each run, int64 [rows, n].
    """

    runs: list[list[Message]] = field(default_factory=list)
    frames: list[list[tuple[Kind, int, int, int]]] = field(default_factory=list)
    inputs: list[list[np.ndarray]] = field(default_factory=list)

    def messages(self) -> list[np.ndarray]:
        """All messages."""
        return [message for run in self.runs for _, message in run]

    def by_group(self) -> dict[int, np.ndarray]:
        """The matrix of all rows of each group."""
        groups: dict[int, list[np.ndarray]] = {}
        for run in self.runs:
            for group, message in run:
                groups.setdefault(group, []).append(message)
        return {group: np.concatenate(rows) for group, rows in groups.items()}

    def paired(self, first: int, second: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """The messages of two runs at the same places."""
        return [(a, b) for (_, a), (_, b) in zip(self.runs[first], self.runs[second], strict=True)]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """SmolLM2, split, answers prompts of one length, and one that is longer."""
    import torch
    from transformers import AutoTokenizer

    made = demo.prepare(None, lambda model, out, recipe: sliplm.split(model, out, recipe))
    codecs = {name: GroupCodec(group) for name, group in open_vault(made.out / "vault").groups.items()}
    tokenizer = AutoTokenizer.from_pretrained(made.model)
    prompts = [
        tokens for tokens in (tokenizer(text).input_ids for text in PROMPTS) if len(tokens) >= PROMPT_TOKENS
    ]
    prompts = [prompts[0][:PROMPT_TOKENS], *(tokens[:PROMPT_TOKENS] for tokens in prompts[: RUNS - 1])]
    prompts.append(prompts[-1] + prompts[0])
    base, transcript, found = tmp_path_factory.mktemp("tap"), Transcript(), Seen()
    with (
        worker_process(made.out / "worker", base / "worker") as worker,
        tapped(worker, base / "tap", transcript) as address,
        watched(made.out / "vault", address) as (model, given),
    ):
        for tokens in prompts:
            frames, messages = len(transcript.frames), len(transcript.messages)
            given.clear()
            ids = torch.tensor([tokens])
            model.generate(ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
            found.frames.append([frame for frame in transcript.frames[frames:] if frame[0] is not Kind.HELLO])
            found.runs.append(transcript.messages[messages:])
            found.inputs.append([in_field(codecs[group], x) for group, x in given])
    return found


def in_field(codec: GroupCodec, x: np.ndarray, inputs: int = 1) -> np.ndarray:
    """x_int of an input (SPEC step 1), or of it and its remainder."""
    return centre(codec.unmasked(x, np.empty((len(x), codec.m), np.float32), inputs).hidden)


@contextmanager
def watched(vault: Path, address: str, **options: Any) -> Iterator[tuple[Any, list[tuple[str, np.ndarray]]]]:
    """The model, with a list of the inputs of its products as they come."""
    model = sliplm.load(vault, [address], **options)
    given: list[tuple[str, np.ndarray]] = []
    product = model.slip.product

    def noted(group: str, x: np.ndarray) -> np.ndarray:
        given.append((group, x.copy()))
        return product(group, x)

    model.slip.product = noted
    try:
        yield model, given
    finally:
        model.slip.close()


def alarms(found: PValues) -> dict[str, float]:
    """Those that would be seen less than once in 10^8."""
    return {name: value for name, value in found.items() if value < ALARM}


def masked(x: np.ndarray, r: np.ndarray) -> np.ndarray:
    """A message: x_int + r mod p."""
    return ((x + r.astype(np.int64)) % P).astype(np.uint32)


def test_messages_are_uniform(seen: Seen, ledger: Ledger) -> None:
    messages = seen.messages()
    elements = sum(message.size for message in messages)
    assert elements >= size(10**7, 10**8)
    found = uniformity.of_elements(messages)
    found["rows of a group"] = uniformity.correlation((m[:-1], m[1:]) for m in seen.by_group().values())
    note = f"{elements:,} elements of SmolLM2's traffic; smallest p-value {min(found.values()):.2g}"
    ledger.record(
        "statistics of messages: bytes, bits, residues, neighbours",
        len(found),
        len(found) - len(alarms(found)),
        len(alarms(found)),
        note,
    )
    assert alarms(found) == {}


def test_messages_tell_nothing_of_other_messages_or_of_their_inputs(seen: Seen, ledger: Ledger) -> None:
    found: PValues = {}
    for other in range(1, len(seen.runs) - 1):
        what = "the same prompt" if other == 1 else f"prompt {other}"
        for name, value in uniformity.of_pairs(seen.paired(0, other)).items():
            found[f"{what}: {name}"] = value
    inputs = [x for run in seen.inputs for x in run]
    found["the input: correlation"] = uniformity.correlation(zip(seen.messages(), inputs, strict=True))
    as_elements = [(m, (x % P).astype(np.uint32)) for m, x in zip(seen.messages(), inputs, strict=True)]
    found["the input: near"] = uniformity.of_pairs(as_elements)["near elements"]
    note = f"smallest p-value {min(found.values()):.2g}"
    ledger.record(
        "messages against each other and against their inputs",
        len(found),
        len(found) - len(alarms(found)),
        len(alarms(found)),
        note,
    )
    assert alarms(found) == {}


def test_no_row_repeats_and_every_group_has_full_rank(seen: Seen, ledger: Ledger) -> None:
    groups = seen.by_group()
    again = sum(uniformity.repeated(row.tobytes() for row in rows) for rows in groups.values())
    count = sum(len(rows) for rows in groups.values())
    ledger.record("a row of a group's messages comes again", count, count - again, again)
    short = 0
    for rows in groups.values():
        least = min(rows.shape)
        short += uniformity.rank(rows[:least]) < least
    ledger.record(
        "the messages of a group depend on each other linearly", len(groups), len(groups) - short, short
    )
    assert (again, short) == (0, 0)


def test_prompts_of_one_length_look_alike_from_outside(seen: Seen, ledger: Ledger) -> None:
    *same, longer = seen.frames
    different = sum(frames != same[0] for frames in same)
    ledger.record(
        "frames of prompts of one length differ",
        len(same),
        len(same) - different,
        different,
        "kinds, groups, rows, bytes",
    )
    assert different == 0
    assert longer != same[0], "the number of tokens does show"


@pytest.mark.parametrize("pad_to", [1, 8])
def test_padding_hides_the_number_of_rows(pad_to: int, tmp_path: Path, ledger: Ledger) -> None:
    """Prompts of 3 to 8 tokens, padded to 8 rows; without padding (the control) sizes differ."""
    import torch

    sliplm.split(make("llama", tmp_path / "model"), tmp_path / "out")
    transcript, seen, lengths = Transcript(), [], range(3, 9)
    with (
        worker_process(tmp_path / "out" / "worker", tmp_path / "w") as worker,
        tapped(worker, tmp_path / "tap", transcript) as address,
        watched(tmp_path / "out" / "vault", address, pad_to=pad_to) as (model, _),
    ):
        for length in lengths:
            before = len(transcript.frames)
            ids = torch.arange(3, 3 + length)[None]
            model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
            seen.append([frame for frame in transcript.frames[before:] if frame[0] is not Kind.HELLO])
    different = sum(frames != seen[0] for frames in seen)
    if pad_to == 1:
        assert different == len(lengths) - 1
        return
    tries = len(lengths)
    ledger.record("frames of padded prompts of 3 to 8 tokens differ", tries, tries - different, different)
    assert different == 0


def test_an_input_and_its_remainder_look_like_two_inputs(tmp_path: Path, ledger: Ledger) -> None:
    """inputs=2: both rows are uniform, tell nothing of each other, and each has a mask of its own."""
    import torch
    from transformers import AutoTokenizer

    made = demo.prepare(None, lambda model, out, recipe: sliplm.split(model, out, recipe))
    codecs = {name: GroupCodec(group) for name, group in open_vault(made.out / "vault").groups.items()}
    ids = torch.tensor([AutoTokenizer.from_pretrained(made.model)(PROMPTS[0]).input_ids[:PROMPT_TOKENS]])
    transcript, options = Transcript(), {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with (
        worker_process(made.out / "worker", tmp_path / "worker") as worker,
        tapped(worker, tmp_path / "tap", transcript) as address,
        watched(made.out / "vault", address, inputs=2) as (model, given),
    ):
        texts = [model.generate(ids, **options) for _ in range(2)]  # the same prompt
        logits = model(ids).logits
        rows = model.slip.counters.rows
    whole = reference(made.out, inputs=2)
    assert torch.equal(logits, whole(ids).logits)
    assert all(torch.equal(text, whole.generate(ids, **options)) for text in texts)

    messages = [message for _, message in transcript.messages]
    inputs = [in_field(codecs[group], x, 2) for group, x in given]
    assert [len(message) for message in messages] == [2 * len(x) for _, x in given]
    assert sum(map(len, messages)) == rows
    found = uniformity.of_pairs([(m[: len(m) // 2], m[len(m) // 2 :]) for m in messages])
    found |= {
        f"the input's {name}": p
        for name, p in uniformity.of_pairs(zip(messages, inputs, strict=True)).items()
    }
    elements = uniformity.of_elements(messages)
    found |= {name: elements[name] for name in ("byte 1", "byte 3", "sign", "neighbours in a row")}
    note = f"{sum(m.size for m in messages):,} elements; smallest p-value {min(found.values()):.2g}"
    good = len(found) - len(alarms(found))
    ledger.record("an input that travels as two rows", len(found), good, len(alarms(found)), note)
    assert alarms(found) == {}
    masks = [row.tobytes() for m, x in zip(messages, inputs, strict=True) for row in masked(-x, m)]
    assert uniformity.repeated(iter(masks)) == 0
    bare = [(x % P).astype(np.uint32) for x in inputs]  # the control
    assert "byte 3" in alarms(uniformity.of_elements(bare))


def test_the_statistics_see_what_they_look_for(seen: Seen) -> None:
    """The controls: messages without a mask, with the masks of another run, and with slightly poor masks."""
    groups = [group for group, _ in seen.runs[0]]
    bare = [(x % P).astype(np.uint32) for x in seen.inputs[0]]
    assert {"byte 2", "byte 3", "mod 251"} <= set(alarms(uniformity.of_elements(bare)))
    assert uniformity.correlation(zip(bare, seen.inputs[0], strict=True)) < ALARM
    rows = np.concatenate([m for g, m in zip(groups, bare, strict=True) if g == groups[0]])
    assert uniformity.rank(np.concatenate([rows, rows])) < 2 * len(rows)

    masks = [masked(-x, m) for (_, m), x in zip(seen.runs[0], seen.inputs[0], strict=True)]
    for other in (1, 2):  # the same prompt, another one
        again = [masked(x, r) for x, r in zip(seen.inputs[other], masks, strict=True)]
        pairs = list(zip((m for _, m in seen.runs[0]), again, strict=True))
        assert {"correlation", "near elements"} <= set(alarms(uniformity.of_pairs(pairs)))
        if other == 1:
            assert uniformity.repeated(row.tobytes() for pair in pairs for m in pair for row in m) >= len(
                masks
            )

    generator = np.random.default_rng(1)
    size_ = (100, 100_000)
    poor = generator.integers(
        0, 2**32 - 2**24, size_, dtype=np.uint32
    )  # one value of the top byte is missing
    assert "byte 3" in alarms(uniformity.of_elements([poor]))
    even = generator.integers(0, P, size_, dtype=np.uint32) & ~np.uint32(1)
    assert "bit 0" in alarms(uniformity.of_elements([even]))
    smooth = generator.integers(0, P, size_, dtype=np.uint32)
    smooth[:, 1::100] = smooth[:, 0::100]
    assert "neighbours in a row" in alarms(uniformity.of_elements([smooth]))
