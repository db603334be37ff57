"""`slip generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sliplm.cli import options
from sliplm.cli.options import Json, Key
from sliplm.cli.prompt import messages, read_prompt
from sliplm.cli.screen import Waiting, console, print_json, printable, quiet, showing_warnings, size
from sliplm.cli.vaults import checked, opened, tokenizer_of, vault_of
from sliplm.errors import InputError
from sliplm.shares.keysource import find


def command(
    out: Annotated[Path, typer.Argument(help="A split's folder; or its vault folder, with --worker.")],
    *,
    prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="What to say to the model; - reads standard input, as a pipe does "
        "without it. On a terminal without it: a conversation."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Send a chat message, or continue the prompt as plain text. "
        "By default a chat message if the model has a chat template. --chat without a prompt holds a "
        "conversation, a line a message."),
    ] = None,
    worker: options.Workers = None,
    share: options.Share = None,
    dealer: options.Dealers = None,
    pool: options.Pool = None,
    anchor: options.Anchor = None,
    fallback: options.Fallback = "fail",
    audit: options.Audit = None,
    pad_to: options.PadTo = 1,
    inputs: options.Inputs = 1,
    adapter: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The adapter to answer with; by default the base without any."),
    ] = None,
    tokenizer: options.Tokenizer = None,
    key: Key = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Generate text with a split model: the vault runs here, the products come from a worker.

    On another machine than the one that split, bring the vault folder and the key that sealed it.

    Example: slip generate out --prompt "Why is the sky blue?"

    Example: slip generate out

    Example: slip generate out < question.txt

    Example: slip generate out/vault --worker "gpu.example:7400?keys=keys/vault" --prompt "Hello"

    Example: slip generate out/vault --worker A --worker B --dealer C --audit audit.jsonl --prompt Hi
    """
    text = read_prompt(prompt, chat)
    if text is None and json:
        raise InputError("--json is for one answer: give a --prompt, or a text on standard input")
    vault = vault_of(out)
    chosen: dict[str, Any] = {
        "share": share, "dealers": dealer or [], "pool": pool, "anchor": anchor, "fallback": fallback,
        "audit": audit, "pad_to": pad_to, "inputs": inputs, "key": key, "adapter": adapter,
    }  # fmt: skip
    with Waiting() as waiting, showing_warnings(waiting.say):
        waiting.on("loading torch and transformers")
        quiet()
        made = checked(vault, tokenizer)
        if key is not None:
            waiting.over()  # a passphrase may be asked for
            chosen["key"] = find(key)
        begun = "opening the vault" if worker else "starting a worker, opening the vault"
        waiting.on(begun)
        with opened(out, vault, worker or [], chosen) as model:
            made = made or tokenizer_of(model)
            if text is None:
                _converse(model, made, waiting, max_new_tokens, temperature)
                return
            _once(model, made, waiting, text, chat, max_new_tokens, temperature, json=json)


def _once(
    model: Any, tokenizer: Any, waiting: Waiting, text: str, chat: bool | None, new_tokens: int,
    temperature: float, *, json: bool,
) -> None:  # fmt: skip
    """Answer one prompt."""
    from sliplm.engines.transformers.answer import answer, encode

    inputs = encode(tokenizer, text, chat)
    waiting.on(f"reading {inputs['input_ids'].shape[1]} tokens, and dealing masks for them")
    printer = _Printer(waiting, err=json)
    found = answer(model, tokenizer, inputs, new_tokens=new_tokens, temperature=temperature,
                   show=printer.show)  # fmt: skip
    printer.end(found.text)
    counters = model.slip.counters.as_dict()
    _say_what_it_took(counters, len(found.tokens), found.tokens_per_second)
    if json:
        print_json(
            {
                "text": found.text,
                "tokens": len(found.tokens),
                "prompt_tokens": found.prompt_tokens,
                "tokens_per_second": found.tokens_per_second,
                "exchanges": counters["exchanges"],
                "bytes": counters["bytes_sent"] + counters["bytes_received"],
                "counters": counters,
            }
        )


def _converse(model: Any, tokenizer: Any, waiting: Waiting, new_tokens: int, temperature: float) -> None:
    """Answer message after message."""
    from sliplm.engines.transformers.answer import Conversation

    talk, tokens, seconds = Conversation(model, tokenizer, new_tokens, temperature), 0, 0.0
    waiting.over()
    waiting.say("A conversation: each line is a message; Ctrl-D ends it.", "dim")
    for message in messages():
        waiting.on("reading, and dealing masks")
        printer = _Printer(waiting)
        found = talk.say(message, printer.show)
        printer.end(found.text)
        tokens, seconds = tokens + len(found.tokens), seconds + found.decode_seconds
    _say_what_it_took(model.slip.counters.as_dict(), tokens, tokens / seconds if seconds else 0.0)


def _say_what_it_took(counters: dict[str, Any], tokens: int, speed: float) -> None:
    traffic = counters["bytes_sent"] + counters["bytes_received"]
    console(json=True).print(
        f"{tokens} tokens, {speed:.1f} a second; {counters['exchanges']} exchanges, {size(traffic)}"
        + (f"; {counters['rows_lossy']} rows lost precision" if counters["rows_lossy"] else ""),
        style="dim",
    )


class _Printer:
    """Writes what is new of a growing text, which is not waited for any more.

    A stream is looked up when it is written to: rich puts its own in place of both while something turns.
    """

    def __init__(self, waiting: Waiting, *, err: bool = False) -> None:
        self._waiting = waiting
        self._err = err
        self._written = ""

    def show(self, text: str) -> None:
        self._waiting.over()
        if text.startswith(self._written):  # tokenizers may change their mind about the last letters
            self._write(printable(text[len(self._written) :]))
            self._written = text

    def end(self, text: str) -> None:
        self.show(text)
        self._write("\n")

    def _write(self, text: str) -> None:
        stream = sys.stderr if self._err else sys.stdout
        stream.write(text)
        stream.flush()
