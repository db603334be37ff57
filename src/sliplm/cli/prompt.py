"""What to say to a model: an option, standard input, or a person's lines one after the other."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from sliplm.errors import InputError

MOST = 16 << 20  # bytes of a prompt
STDIN = "-"


def read_prompt(option: str | None, chat: bool | None) -> str | None:
    """The text to answer, or None for a conversation.

    Args:
        option: what --prompt gave; `-` is standard input.
        chat: what --chat or --no-chat gave: with --chat alone the lines of standard input are messages.

    Raises:
        InputError: there is no prompt, or standard input is no text.
    """
    if option is not None and option != STDIN:
        return option
    if option is None and (chat or (chat is None and _person())):
        return None
    if sys.stdin is None or (option is None and _person()):
        raise InputError("there is no prompt: give --prompt TEXT, or a text on standard input")
    data = sys.stdin.buffer.read(MOST + 1)
    if len(data) > MOST:
        raise InputError(f"the prompt on standard input has more than {MOST} bytes: give less")
    return _text(data)


def messages() -> Iterator[str]:
    """The lines of standard input that are not empty, asked for where a person is there, until its end.

    Raises: InputError: a line is no text.
    """
    if not _person():
        for data in iter(sys.stdin.buffer.readline, b""):
            if text := _text(data).strip():
                yield text
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lines can be edited, and come back
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            sys.stdout.write("\n")
            return
        except UnicodeDecodeError as error:
            raise _no_text() from error
        if text:
            yield text


def _person() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _text(data: bytes) -> str:
    try:
        return data.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise _no_text() from error


def _no_text() -> InputError:
    return InputError("standard input is no text in UTF-8: write it in a terminal or file that is")
