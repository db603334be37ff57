"""The two sides of `decode.py`, each in a process of its own: the plain model, and a vault with its worker.

A side sleeps on its pipe until it is asked, so that neither is timed in the other's way.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

HEAD: Final = "lm_head"
PHASES: Final = ("vault", "burn", "check", "link", "worker")
SHORT: Final = 32  # tokens of the prompt before decoding
_CALL_LIMIT: Final = 600.0  # seconds


class Side:
    """A process that answers calls, from the one that measures.

    Args:
        kind: "Plain" or "Hybrid".
        options: what its class takes.
    """

    def __init__(self, kind: str, **options: Any) -> None:
        # torch as anybody has it: nothing of a shell that was set up for fewer or for patient threads
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
        command = [sys.executable, __file__, kind, json.dumps(options)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=plain, text=True
        )
        self.ready = self._answer()

    def start(self, name: str, **options: Any) -> None:
        """Ask for something, without waiting for it."""
        if self._process.stdin is not None:
            self._process.stdin.write(json.dumps([name, options]) + "\n")
            self._process.stdin.flush()

    def call(self, name: str, **options: Any) -> dict[str, Any]:
        """Call a method there."""
        self.start(name, **options)
        return self._answer()

    def result(self) -> dict[str, Any]:
        """Of what was started."""
        return self._answer()

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> dict[str, Any]:
        line = "" if self._process.stdout is None else self._process.stdout.readline()
        if not line:
            raise RuntimeError("a side of the bench has ended; what it said stands above")
        found: dict[str, Any] = json.loads(line)
        return found


class Plain:
    """The unprotected model, in float32 and in bfloat16."""

    def __init__(self, prompt: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from sliplm.examples import smollm2

        self._ids = _ids(prompt)
        self._models = {
            name: AutoModelForCausalLM.from_pretrained(
                smollm2(), dtype=getattr(torch, name), trust_remote_code=False
            )
            for name in ("float32", "bfloat16")
        }
        for name in self._models:
            self.decode(name, 1, 4)

    def decode(self, dtype: str, rows: int, tokens: int) -> dict[str, Any]:
        """Seconds, of the clock and of processors, for `tokens` steps of `rows` sequences."""
        return _decoded(self._models[dtype], self._ids, rows, tokens)

    def prompt(self, dtype: str) -> dict[str, Any]:
        """Seconds to read the whole prompt."""
        return _read(self._models[dtype], self._ids)


class Hybrid:
    """A vault, and a worker on this machine.

    Args:
        bits: precision of the split.
        prompt: tokens of the long prompt.
        link: "own", as `sliplm.open` has it; "tls" on loopback; else the address of a worker that runs.
        ahead: masks that are dealt in the background; None for the default.
        pool: tokens to deal on disk before.
    """

    def __init__(
        self, bits: int, prompt: int, link: str = "own", ahead: int | None = None, pool: int = 0
    ) -> None:
        from _common import split_smollm2

        self._ids, self._out = _ids(prompt), split_smollm2(bits)
        self._stack = ExitStack()
        self._options: dict[str, Any] = {} if ahead is None else {"ahead": ahead}
        if pool:
            self._options["pool"] = self._pool(pool)
        self.address = self._tls_worker() if link == "tls" else None if link == "own" else link
        self._model = self._opened()
        self._inner = [name for name in self._model.slip.groups if name != HEAD]
        self.decode(1, 4)

    def reopen(self) -> dict[str, Any]:
        """The model anew, as in the first lines of a program; masks are being dealt from then on."""
        self._model.close()
        self._model = self._opened()
        return {}

    def rest(self) -> dict[str, Any]:
        """Close the model, with all that works in the background."""
        self._model.close()
        return {}

    def deal(self, rows: int, tokens: int, prompt: int = SHORT) -> dict[str, Any]:
        """Have masks ready for `rows` prompts and for `tokens` steps each."""
        vault = self._model.slip
        vault.deal(rows * (prompt + tokens), self._inner)
        vault.deal(rows * (1 + tokens), [HEAD])
        return {}

    def wait(self) -> dict[str, Any]:
        """Until the background has dealt what it keeps ready: seconds."""
        start = time.perf_counter()
        if not self._model.slip.wait_dealt(300):
            raise RuntimeError("masks are not dealt in 300 s")
        return {"seconds": time.perf_counter() - start}

    def decode(self, rows: int, tokens: int) -> dict[str, Any]:
        """As `Plain.decode`; and milliseconds a token, by where they went."""
        before = self._model.slip.counters.as_dict()
        found = _decoded(self._model, self._ids, rows, tokens)
        now = self._model.slip.counters.as_dict()
        found["late"] = now["rows_dealt_late"] - before["rows_dealt_late"]
        for name in PHASES:
            found[name] = 1e3 * (now[f"seconds_{name}"] - before[f"seconds_{name}"]) / tokens
        return found

    def prompt(self) -> dict[str, Any]:
        """As `Plain.prompt`."""
        return _read(self._model, self._ids)

    def dealing(self) -> dict[str, Any]:
        """Seconds to deal the masks of 64 tokens on all cores."""
        start = time.perf_counter()
        self._model.slip.deal(64)
        return {"seconds": time.perf_counter() - start}

    def worker(self) -> dict[str, Any]:
        """The address of its worker."""
        return {"address": self._model.slip.workers[0].address}

    def close(self) -> None:
        """Close the model, and the worker made for it."""
        self._model.close()
        self._stack.close()

    def _opened(self) -> Any:
        import sliplm

        if self.address is None:
            return sliplm.open(self._out, **self._options)
        return sliplm.load(self._out / "vault", [self.address], **self._options)

    def _tls_worker(self) -> str:
        from sliplm.network import authority

        keys = Path(self._stack.enter_context(tempfile.TemporaryDirectory())) / "keys"
        authority.init(keys)
        command = [sys.executable, "-m", "sliplm", "worker", str(self._out / "worker"), "--json"]
        command += ["--listen", "127.0.0.1:0", "--keys", str(keys / "worker")]
        process = self._stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
        self._stack.callback(process.terminate)
        listening = json.loads(process.stdout.readline())["listening"] if process.stdout else ""
        return f"{listening}?keys={keys / 'vault'}"

    def _pool(self, tokens: int) -> Path:
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(dir=self._out.parent)))
        os.environ["SLIPLM_STATE"] = str(folder / "anchors")
        deal = ["deal", str(self._out / "vault"), str(folder / "pool"), "--tokens", str(tokens)]
        subprocess.run([sys.executable, "-m", "sliplm", *deal], check=True, stdout=sys.stderr)
        return folder / "pool"


def _ids(prompt: int) -> Any:
    from transformers import AutoTokenizer

    from sliplm.examples import smollm2, wikipedia

    tokenizer = AutoTokenizer.from_pretrained(smollm2(), trust_remote_code=False)
    return tokenizer(wikipedia()[:20_000], return_tensors="pt").input_ids[:, :prompt]


def _decoded(model: Any, ids: Any, rows: int, tokens: int) -> dict[str, Any]:
    from _common import decode

    short = ids[:, :SHORT] if rows == 1 else ids[0, : rows * SHORT].reshape(rows, SHORT)
    return decode(model, short, tokens)._asdict()


def _read(model: Any, ids: Any) -> dict[str, Any]:
    from _common import prefill

    return {"seconds": prefill(model, ids)}


def main() -> None:
    """Answer calls on the standard input until it closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    options = json.loads(sys.argv[2])
    side: Any = {"Plain": Plain, "Hybrid": Hybrid}[sys.argv[1]](**options)
    print(json.dumps({"side": sys.argv[1]}), file=answers, flush=True)
    try:
        for line in sys.stdin:
            name, given = json.loads(line)
            print(json.dumps(getattr(side, name)(**given)), file=answers, flush=True)
    finally:
        if isinstance(side, Hybrid):
            side.close()


if __name__ == "__main__":
    main()
