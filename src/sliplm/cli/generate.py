"""`slip generate`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sliplm.cli.screen import console, print_json, printable, quiet, showing_warnings, size
from sliplm.errors import InputError


def command(
    out: Annotated[Path, typer.Argument(help="A split's folder; or its vault folder, with --worker.")],
    *,
    prompt: Annotated[str, typer.Option(help="What to say to the model.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Send a chat message, or continue the prompt as plain text. "
        "By default a chat message if the model has a chat template."),
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
    key: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="What the vault share is sealed with, as slip split takes it."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:  # fmt: skip
    """Generate text with a split model: the vault runs here, the products come from a worker.

    Example: slip generate out --prompt "Why is the sky blue?"

    Example: slip generate out/vault --worker "gpu.example:7400?keys=keys/vault" --prompt "Hello"

    Example: slip generate out/vault --worker A --worker B --dealer C --audit audit.jsonl --prompt Hi
    """
    quiet()
    from sliplm.engines.transformers.answer import answer, encode, load_tokenizer
    from sliplm.engines.transformers.companions import has_tokenizer
    from sliplm.engines.transformers.load import can_generate

    vault = out / "vault" if (out / "vault").is_dir() else out
    options = {
        "share": share, "dealers": dealer or [], "pool": pool, "anchor": anchor, "fallback": fallback,
        "audit": audit, "pad_to": pad_to, "key": key, "adapter": adapter,
    }  # fmt: skip
    if not can_generate(vault):
        raise InputError(
            f"{vault} holds a model that does not generate text, such as an encoder: call it in Python, by "
            "sliplm.open or sliplm.load (a plain PyTorch module: sliplm.open_module)"
        )
    if tokenizer is None and (vault / "config.json").is_file() and not has_tokenizer(vault):
        raise InputError(
            f"no tokenizer came with the checkpoint that was split into {vault}: name a folder that has the "
            "model's, with --tokenizer FOLDER; or call the model in Python, which takes token ids"
        )
    made = None if tokenizer is None else load_tokenizer(tokenizer)
    with showing_warnings(), _model(out, vault, worker or [], options) as model:
        made = made or load_tokenizer(model.slip.files)
        inputs = encode(made, prompt, chat)
        printer = _Printer(sys.stderr if json else sys.stdout)
        found = answer(
            model, made, inputs, new_tokens=max_new_tokens, temperature=temperature, show=printer.show
        )
        printer.show(found.text)
        counters = model.slip.counters.as_dict()
    traffic = counters["bytes_sent"] + counters["bytes_received"]
    printer.end()
    console(json=True).print(
        f"{len(found.tokens)} tokens, {found.tokens_per_second:.1f} a second; "
        f"{counters['exchanges']} exchanges, {size(traffic)}"
        + (f"; {counters['rows_lossy']} rows lost precision" if counters["rows_lossy"] else ""),
        style="dim",
    )
    if json:
        print_json(
            {
                "text": found.text,
                "tokens": len(found.tokens),
                "prompt_tokens": found.prompt_tokens,
                "tokens_per_second": found.tokens_per_second,
                "exchanges": counters["exchanges"],
                "bytes": traffic,
                "counters": counters,
            }
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
    """Writes what is new of a growing text."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._written = ""

    def show(self, text: str) -> None:
        if text.startswith(self._written):  # tokenizers may change their mind about the last letters
            self._stream.write(printable(text[len(self._written) :]))
            self._stream.flush()
            self._written = text

    def end(self) -> None:
        self._stream.write("\n")
        self._stream.flush()
