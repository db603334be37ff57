"""A command on a terminal of its own, as a person has it in front of him."""

from __future__ import annotations

import fcntl
import os
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

LIMIT = 180.0  # seconds for every wait: other tests keep the machine busy


class Terminal:
    """Runs `command` on a pseudo terminal of `width` columns.

    Attributes:
        text: what it wrote so far, without the codes that move and colour.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str], width: int = 80) -> None:
        own = {name: value for name, value in env.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        self._end, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
        self._process = subprocess.Popen(
            ["setsid", "--ctty", *command],  # Ctrl-C is a signal where the terminal is its own
            env={**own, "TERM": "xterm"}, stdin=theirs, stdout=theirs, stderr=theirs,
        )  # fmt: skip
        os.close(theirs)
        self._raw = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._end)

    @property
    def text(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self._raw.decode("utf-8", "replace"))

    @property
    def lines(self) -> list[str]:
        """Every line that was drawn, those that were drawn over too."""
        return [line for line in re.split(r"[\r\n]+", self.text) if line.strip()]

    def wait_for(self, what: str, times: int = 1) -> None:
        """Read on until a text was there so often."""
        deadline = time.monotonic() + LIMIT
        while self.text.count(what) < times:
            assert self._read(deadline), f"no {what!r} came:\n{self.text}"

    def send(self, text: str) -> None:
        os.write(self._end, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C until it is heard: one just before readline waits is heard at the next key only."""
        deadline = time.monotonic() + LIMIT
        while "interrupted" not in self.text:
            assert time.monotonic() < deadline, f"it goes on:\n{self.text}"
            self.send("\x03")
            heard = time.monotonic() + 2.0
            while "interrupted" not in self.text and time.monotonic() < heard:
                if select.select([self._end], [], [], 0.1)[0] and not self._read(deadline):
                    return

    def status(self) -> int:
        """Read to the end; the exit status."""
        deadline = time.monotonic() + LIMIT
        while self._read(deadline):
            pass
        return self._process.wait(LIMIT)

    def _read(self, deadline: float) -> bool:
        ready, _, _ = select.select([self._end], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"it stands still:\n{self.text}"
        try:
            part = os.read(self._end, 65536)
        except OSError:  # nobody holds the other end any more
            part = b""
        self._raw += part
        return bool(part)
