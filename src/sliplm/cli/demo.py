"""`slip demo`."""

from __future__ import annotations

import re
import shlex
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Self

import typer
from rich import box
from rich.console import Console
from rich.live import Live
from rich.status import Status
from rich.table import Table
from rich.text import Text

from sliplm.cli.options import Json
from sliplm.cli.screen import (
    console,
    percent,
    print_json,
    printable,
    quiet,
    size,
    split_with_progress,
    warn_of_new_key,
)
from sliplm.engines.progress import spinner
from sliplm.examples.demo import (
    HYBRID,
    ORIGINAL,
    THIEF,
    WHO,
    Comparison,
    Round,
    Watcher,
    compare,
    prepare,
    trio,
)
from sliplm.examples.fetch import cache_dir
from sliplm.shares.keysource import find

if TYPE_CHECKING:
    from sliplm.engines.transformers.answer import Answer
    from sliplm.examples.demo import Prepared
    from sliplm.planning.counts import SplitReport

THIEF_HAS = (
    "all the worker's integers, the configuration and the tokenizer; and, which no worker gets, the true "
    "embedding (so the LM head too), norms, and the norm of every matrix row"
)
TITLES = {ORIGINAL: "the original", HYBRID: "vault + worker", THIEF: "a thief with the share"}
COLOURS = {ORIGINAL: "cyan", HYBRID: "green", THIEF: "red"}
COLUMNS_FROM = 90  # characters of a terminal below which columns are too narrow to read
LINES = 14  # of an answer; a thief's text may be all line ends
REFRESH = 0.1  # seconds


def command(
    *,
    prepare_only: Annotated[
        Path | None,
        typer.Option(
            "--prepare", metavar="DIR", help="Only fetch and split: DIR/model, DIR/vault, DIR/worker."
        ),
    ] = None,
    json: Json = False,
) -> None:  # fmt: skip
    """See a small model run three times: original, split, and stolen.

    Fetches SmolLM2-135M-Instruct once, splits it, starts a worker process, and lets the original, the split
    model and a thief who holds the worker's share answer the same prompts. Then it compares tokens, speed and
    perplexity. The first run downloads 450 MB; later ones take about two minutes.

    Example: slip demo

    Example: slip demo --prepare try && slip generate try --prompt "Hello"
    """
    quiet()
    screen = console(json=json)
    began = time.monotonic()
    if find(None, new=True).made:
        warn_of_new_key()
    # a public model's split is of no account: it must not stand in the way of one that the user makes
    prepared = prepare(prepare_only, partial(split_with_progress, i_know=True, ledger=cache_dir() / "ledger"))
    out = prepared.out
    paths = {"model": str(prepared.model), "vault": str(out / "vault"), "worker": str(out / "worker")}
    if prepare_only is not None:
        for name, path in paths.items():
            screen.print(Text(f"{name:8}{path}"), soft_wrap=True)
        _next(screen, out)
        if json:
            print_json(paths)
        return
    found = show(screen, prepared)
    seconds = time.monotonic() - began
    done = f"\nAll of it took {seconds:.0f} seconds. The split is in {out}"
    screen.print(Text(done, style="dim"), soft_wrap=True)
    _next(screen, out)
    if json:
        report = prepared.report.model_dump(mode="json", exclude={"groups"})
        print_json(
            found.as_dict() | {"split": report, "thief_has": THIEF_HAS, "paths": paths, "seconds": seconds}
        )


def _next(screen: Console, out: Path) -> None:
    screen.print("Talk to the split model:", style="bold")
    screen.print(Text(f"  slip generate {shlex.quote(str(out))}"), soft_wrap=True)
    screen.print("Split your own (leave --base out if it comes from no public model):", style="bold")
    screen.print("  slip split MY-MODEL OUT --base PUBLIC-MODEL")


def show(screen: Console, prepared: Prepared, *, columns: bool | None = None) -> Comparison:
    """Run the comparison on a screen.

    Args:
        columns: answers side by side; None: if the screen is a terminal that is wide enough.
    """
    _head(screen, prepared.report)
    with ExitStack() as stack:
        with screen.status("loading the model three times, starting a worker", spinner=spinner(screen)):
            three = stack.enter_context(trio(prepared))
        stage = stack.enter_context(_Stage(screen, columns))
        found = compare(three, stage)
    screen.print()
    screen.print(_results(prepared.report, found))
    screen.print(_verdict(found))
    return found


class _Stage(Watcher):
    """Shows the answers as they come: columns that grow on a terminal, else one under the other."""

    def __init__(self, screen: Console, columns: bool | None) -> None:
        self._screen = screen
        self._moving = screen.is_terminal and not screen.is_dumb_terminal
        self._columns = self._moving and screen.width >= COLUMNS_FROM if columns is None else columns
        self._status: Status | None = None
        self._live: Live | None = None
        self._prompt, self._texts, self._drawn = "", dict[str, str](), 0.0

    def __enter__(self) -> Self:
        self._working("a few tokens from each, to warm up")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._working(None)
        self._still()

    def asked(self, prompt: str) -> None:
        self._working(None)
        self._prompt, self._texts = prompt, {}
        if not self._columns:
            self._screen.print(f"\n[bold]> {prompt}[/]")
        elif self._moving:
            self._live = Live(console=self._screen, auto_refresh=False, transient=True)
            self._live.start()

    def says(self, who: str, text: str) -> None:
        self._texts[who] = text
        if self._live is not None and time.monotonic() - self._drawn > REFRESH:
            self._live.update(_side_by_side(self._prompt, self._texts), refresh=True)
            self._drawn = time.monotonic()

    def answered(self, who: str, answer: Answer) -> None:
        self._texts[who] = answer.text
        if not self._columns:
            self._screen.print(_line(who, answer.text))

    def round_over(self, done: Round) -> None:
        self._still()
        if self._columns:
            self._screen.print()
            self._screen.print(_side_by_side(self._prompt, self._texts))

    def measures(self, who: str) -> None:
        self._working(f"reading Wikipedia with {TITLES[who]}, for its perplexity")

    def _working(self, what: str | None) -> None:
        if self._status is not None:
            self._status.stop()
        self._status = None if what is None else self._screen.status(what, spinner=spinner(self._screen))
        if self._status is not None:
            self._status.start()

    def _still(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


# --- what is drawn ---------------------------------------------------------------------------------------


def _head(screen: Console, report: SplitReport) -> None:
    screen.print(
        "[bold]SmolLM2-135M-Instruct[/], a 4-bit file dequantised to float32, is "
        f"split into {report.exchanges} groups of linear layers. "
        f"The vault, this process, keeps {size(report.vault_bytes)}; the worker, a process that is not "
        f"trusted, holds {size(report.worker_bytes)} of integers and computes on masked numbers."
    )


def _side_by_side(prompt: str, texts: dict[str, str]) -> Table:
    table = Table(title=f"> {prompt}", title_justify="left", title_style="bold", box=box.ROUNDED, expand=True)
    for who in WHO:
        table.add_column(TITLES[who], header_style=COLOURS[who], ratio=1, overflow="fold")
    table.add_row(*(_text(texts.get(who, "")) for who in WHO))
    return table


def _line(who: str, text: str) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style=COLOURS[who], width=max(len(title) for title in TITLES.values()))
    table.add_column(overflow="fold")
    table.add_row(TITLES[who], _text(text))
    return table


def _text(text: str) -> Text:
    """An answer, as many lines as there is room for; a thief's text must not drive the terminal either."""
    lines = re.sub(r"\s*\n\s*", "\n", text.strip()).split("\n")
    return Text("\n".join(printable(line) for line in lines[:LINES]))


def _results(report: SplitReport, found: Comparison) -> Table:
    table = Table(box=box.ROUNDED, expand=False, padding=(0, 1))
    table.add_column("")
    for who, title in zip(WHO, ("original", "vault + worker", "thief"), strict=True):
        table.add_column(title, header_style=COLOURS[who], justify="right")
    rounds = found.rounds
    same = {who: sum(r.answers[who].tokens == r.answers[ORIGINAL].tokens for r in rounds) for who in WHO}
    table.add_row(
        "answers with the original's tokens",
        "",
        *(f"{same[who]} of {len(rounds)}" for who in (HYBRID, THIEF)),
    )
    table.add_row(f"perplexity, {found.text_tokens} tokens of Wikipedia",
                  *(_perplexity(found.perplexity[who]) for who in WHO))  # fmt: skip
    table.add_row("tokens a second, decoding", *(f"{found.tokens_per_second[who]:.1f}" for who in WHO))
    table.add_row(
        "masks dealt ahead, tokens a second",
        "",
        f"{found.masks_per_second:.1f}",
        end_section=True,
    )
    back, out = report.bytes_from_worker, report.bytes_to_worker
    table.add_row("exchanges a token", "", f"{report.exchanges}")
    table.add_row("bytes a token, to the worker and back", "", f"{size(out)} + {size(back)}")
    table.add_row("vault's share of bytes", "", percent(report.vault_bytes_share))
    table.add_row("vault's share of multiply-adds", "", percent(report.vault_macs_share))
    return table


def _verdict(found: Comparison) -> Text:
    stolen = found.perplexity[THIEF]
    level = "no better than" if stolen >= found.uniform else "better than"
    return Text(
        f"The thief has {THIEF_HAS}. He lacks the hidden basis and the removed part. His model is {level} a "
        f"uniform guess, whose perplexity is {found.uniform:,}.",
        style="dim",
    )


def _perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"
