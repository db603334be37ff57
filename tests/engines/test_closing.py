"""A model that was opened closes by itself, and lets go of everything."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import families
import sliplm
from sliplm.errors import MaskError
from sliplm.parties.local_worker import LocalWorker

LIMIT = 120.0
MODELS = 10
INPUT = torch.tensor([[1, 2, 3]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("closing")
    families.make_with_tokenizer("llama", base / "model", num_hidden_layers=1)
    sliplm.split(base / "model", base / "out")
    return base / "out"


@pytest.fixture(autouse=True)
def own_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where worker processes have their sockets."""
    monkeypatch.setenv("SLIPLM_HOME", str(tmp_path))
    monkeypatch.delenv("TMPDIR", raising=False)
    return tmp_path / "tmp"


def wait_until(what: Any) -> None:
    end = time.monotonic() + LIMIT
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def descriptors(pid: int | str = "self") -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def doors(temporary: Path) -> list[Path]:
    """The sockets of worker processes; their keys, where the name of a folder is too long for a socket."""
    return [*temporary.glob("sliplm-*/s"), *temporary.glob("sliplm-*/keys")]


def ends(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


@torch.no_grad()
def test_open_without_a_block(folder: Path, own_temporary: Path) -> None:
    model: Any = sliplm.open(folder)
    assert isinstance(model, sliplm_class()) and doors(own_temporary)
    first = model(INPUT).logits
    pid = model.slip._others[0].pid
    del model
    gc.collect()
    wait_until(lambda: ends(pid) and not doors(own_temporary))
    with sliplm.open(folder) as other:
        assert torch.equal(other(INPUT).logits, first)
        pid = other.slip._others[0].pid
    assert ends(pid) and not doors(own_temporary)
    with pytest.raises(MaskError, match="closed"):
        other(INPUT)


def sliplm_class() -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM


@torch.no_grad()
def test_a_part_of_a_model_keeps_it_open(folder: Path) -> None:
    model: Any = sliplm.open(folder)
    part, pid = model.model, model.slip._others[0].pid
    del model
    gc.collect()
    assert part(INPUT).last_hidden_state.shape[:2] == (1, 3)
    del part
    gc.collect()
    wait_until(lambda: ends(pid))


def test_a_script_that_ends_leaves_nothing(folder: Path, own_temporary: Path) -> None:
    script = (
        "import sys, sliplm\nm = sliplm.open(sys.argv[1])\nprint(m.slip._others[0].pid)\n"
        "if len(sys.argv) > 2: raise SystemExit(3)"
    )
    for extra in ([], ["fails"]):
        done = subprocess.run(
            [sys.executable, "-c", script, str(folder), *extra],
            capture_output=True, text=True, timeout=LIMIT, check=False,
        )  # fmt: skip
        assert done.returncode == 3 * len(extra), done.stderr
        assert ends(int(done.stdout))
        assert not list(own_temporary.glob("sliplm-*"))


def test_an_error_while_opening_leaves_nothing(folder: Path, own_temporary: Path) -> None:
    with pytest.raises(sliplm.errors.InputError):
        sliplm.open(folder, adapter="none of that name")
    assert not list(own_temporary.glob("sliplm-*"))


@torch.no_grad()
def test_ten_models_made_and_deleted(folder: Path) -> None:
    with LocalWorker(folder / "worker", threads=1) as worker:
        seen = []
        for _ in range(MODELS + 1):
            model: Any = sliplm.load(folder / "vault", [worker.address])
            model(INPUT)
            vault = weakref.ref(model.slip)
            del model
            gc.collect()
            assert vault() is None
            seen.append((descriptors(), threading.active_count()))
        assert seen[-1][0] <= seen[0][0] and seen[-1][1] <= seen[0][1], seen  # the first starts what stays
        wait_until(lambda: descriptors(worker.pid) <= 12)  # no seat is taken


def test_a_vault_that_the_collector_finds(folder: Path) -> None:
    """In a cycle with its model, and dropped in any thread."""
    with LocalWorker(folder / "worker", threads=1) as worker:
        before = threading.active_count()
        model: Any = sliplm.load(folder / "vault", [worker.address])
        model.itself = [model]
        vault = weakref.ref(model.slip)
        del model
        collector = threading.Thread(target=gc.collect)
        collector.start()
        collector.join(LIMIT)
        assert vault() is None
        wait_until(lambda: threading.active_count() <= before)


def test_modules_close_too(tmp_path: Path, own_temporary: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()

    sliplm.split_module(make(), torch.ones(2, 64), tmp_path / "split")
    module = sliplm.open_module(make(), tmp_path / "split")
    assert type(module).__name__ == "Sequential" and isinstance(module, nn.Sequential)
    module(torch.ones(2, 64))
    pid = module.slip._others[0].pid
    module.close()
    assert ends(pid) and not doors(own_temporary)
    with sliplm.open_module(make(), tmp_path / "split") as again:
        pid = again.slip._others[0].pid
    assert ends(pid)
    dropped = sliplm.open_module(make(), tmp_path / "split")
    pid = dropped.slip._others[0].pid
    del dropped
    gc.collect()
    wait_until(lambda: ends(pid) and not doors(own_temporary))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_told_to_end_leaves_nothing(
    folder: Path, own_temporary: Path, number: signal.Signals
) -> None:
    command = [sys.executable, "-m", "sliplm", "generate", str(folder), "--prompt", "hello"]
    command += ["--max-new-tokens", "100000"]
    before = signal.signal(number, signal.SIG_DFL)  # `nohup` would pass on that it is ignored
    try:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    finally:
        signal.signal(number, before)
    with process:
        try:
            wait_until(lambda: doors(own_temporary) or process.poll() is not None)
            for _ in range(2):  # as `timeout` does
                process.send_signal(number)
            assert process.wait(LIMIT) == 128 + number
        finally:
            process.kill()
    assert not list(own_temporary.glob("sliplm-*"))
