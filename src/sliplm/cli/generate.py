"""`slip generate`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sliplm.cli.options import Json, Key
from sliplm.cli.prompt import messages, read_prompt
from sliplm.cli.screen import Waiting, console, print_json, printable, quiet, showing_warnings, size
from sliplm.errors import InputError
from sliplm.shares.folders import side_of
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
    worker: Annotated[
        list[str] | None,
        typer.Option(help="Address of a worker, as slip worker serves it, with ?keys=FOLDER for TLS. "
        "May be given several times: requests are spread over them, and they stand in for each other. "
        "Without it, a worker is started here."),
    ] = None,
    share: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The worker folder that masks are dealt from; by default the one "
        "beside the vault folder, or none with --dealer or --pool.", rich_help_panel="Masks"),
    ] = None,
    dealer: Annotated[
        list[str] | None,
        typer.Option(metavar="ADDRESS", help="A worker that deals the masks, and does not collude with the "
        "others. May be given several times.", rich_help_panel="Masks"),
    ] = None,
    pool: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Masks dealt ahead by slip deal.", rich_help_panel="Masks"),
    ] = None,
    anchor: Annotated[
        str | None,
        typer.Option(metavar="COMMAND", help="The pool's anchor, as slip deal took it.",
                     rich_help_panel="Masks"),
    ] = None,
    fallback: Annotated[
        Literal["fail", "here"],
        typer.Option(help="When no worker is left: fail, or compute here from --share, slowly.",
                     rich_help_panel="Workers that fail"),
    ] = "fail",
    audit: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Append a line of JSON for each lie, loss and return.",
                     rich_help_panel="Workers that fail"),
    ] = None,
    pad_to: Annotated[
        int,
        typer.Option(min=1, help="Pad prompts to a multiple of so many tokens, so that workers do not see "
        "their length."),
    ] = 1,
    adapter: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The adapter to answer with; by default the base without any."),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="A folder with the tokenizer; by default the vault's own."),
    ] = None,
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
    vault = out / "vault" if (out / "vault").is_dir() else out
    options: dict[str, Any] = {
        "share": share, "dealers": dealer or [], "pool": pool, "anchor": anchor, "fallback": fallback,
        "audit": audit, "pad_to": pad_to, "key": key, "adapter": adapter,
    }  # fmt: skip
    with Waiting() as waiting, showing_warnings(waiting.say):
        waiting.on("loading torch and transformers")
        quiet()
        made = _check(vault, tokenizer)
        if key is not None:
            waiting.over()  # a passphrase may be asked for
            options["key"] = find(key)
        begun = "opening the vault" if worker else "starting a worker, opening the vault"
        waiting.on(begun)
        with _model(out, vault, worker or [], options) as model:
            made = made or _tokenizer(model)
            if text is None:
                _converse(model, made, waiting, max_new_tokens, temperature)
                return
            _once(model, made, waiting, text, chat, max_new_tokens, temperature, json=json)


def _check(vault: Path, tokenizer: Path | None) -> Any:
    """Refuse what cannot generate before anything is opened; the tokenizer that was named, or None."""
    from sliplm.engines.transformers.answer import load_tokenizer
    from sliplm.engines.transformers.companions import has_tokenizer
    from sliplm.engines.transformers.load import can_generate

    if not can_generate(vault):
        raise InputError(
            f"{vault} holds a model that does not generate text, such as an encoder: call it in Python, by "
            "sliplm.open or sliplm.load (a plain PyTorch module: sliplm.open_module)"
        )
    if tokenizer is not None:
        return load_tokenizer(tokenizer)
    if side_of(vault) == "vault" and not has_tokenizer(vault):
        raise InputError(
            f"no tokenizer came with the checkpoint that was split into {vault}: name a folder that has the "
            "model's, with --tokenizer FOLDER; or call the model in Python, which takes token ids"
        )
    return None


def _tokenizer(model: Any) -> Any:
    from sliplm.engines.transformers.answer import load_tokenizer

    return load_tokenizer(model.slip.files)


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


@contextmanager
def _model(out: Path, vault: Path, workers: list[str], options: dict[str, Any]) -> Iterator[Any]:
    import sliplm

    if workers:
        model: Any = sliplm.load(vault, workers, **options)
        with closing(model.slip):
            yield model
    elif vault != out or not (out / "manifest.json").exists():
        with sliplm.open(out, **options) as model:
            yield model
    else:
        raise InputError(
            f"{out} is one of the two folders that a split wrote: name a worker with --worker, "
            f"or give {out.resolve().parent}, and a worker is started from it"
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
