"""What a hostile peer or folder makes this side hold: one frame at most, and for a manifest a stated sum.

Each case runs in a process of its own; what counts is the peak of its resident memory, above the start.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ledger import Ledger

MIB = 2**20
SLACK = 8 * MIB  # of the interpreter's own
FRAME = 16 * MIB  # protocol.FRAME_BYTES

_BEGIN = """
import sys, threading, time
from pathlib import Path
from sliplm.errors import SlipError

def peak():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])

def start():
    Path("/proc/self/clear_refs").write_text("5")
    return peak()
"""

_FRAMES = """
from fuzz_protocol import header_bytes
from fuzz_stream import SHAPES, SPLIT_ID, asking_vault, greeted_vault, greeted_vault_hello
from sliplm.protocol import frames as wire
from sliplm.protocol.worker_side import WorkerSide
from sliplm.network.transport import pair
from sliplm.protocol.frames import Header, Kind

def ready_worker():
    side, hello = WorkerSide(SPLIT_ID, SHAPES), greeted_vault_hello()
    side.header(hello[:28])
    side.payload(hello[28:])
    side.welcome(bytes(32))
    return side

def hear(side, header, body):
    near, far = pair()
    def speak():
        try:
            far.send(header_bytes(header), memoryview(bytes(body)), deadline=time.monotonic() + 20)
        except SlipError:
            pass  # it hung up
        far.close()
    thread = threading.Thread(target=speak)
    thread.start()
    try:
        near.receive(side(), deadline=time.monotonic() + 20)
    except SlipError:
        pass
    near.close()
    thread.join()

def attack(lengths, body):
    for side in (lambda: WorkerSide(SPLIT_ID, SHAPES), ready_worker, greeted_vault, asking_vault):
        for kind in Kind:
            for length in lengths:
                hear(side, Header(kind, 1, 1, 2, 0, length), body)
                hear(side, Header(kind, 0, 0, 0, 0, length), body)
attack([0], 0)
begun = start()
"""

CASES = {
    "lengths beyond the limits": (
        _FRAMES + "attack([2**16 + 200, 2**24 + 4, wire.MAX_PAYLOAD, 2**32 - 1], 2**16)",
        0,
    ),
    "the longest frame, whole": (
        _FRAMES
        + """
SHAPES[1] = (2, 20_000)
rows = ready_worker().max_rows(1)
length = 80_000 * rows
hear(ready_worker, Header(Kind.MULTIPLY, 1, 1, rows, 0, length), length)
if peak() - begun < length // 2:
    raise SystemExit("the measurement sees nothing")
""",
        FRAME,
    ),
    "a share whose header lies": (
        """
from folders import scratch, worker_folder, worker_manifest
from sliplm.shares.share import SHARE, MANIFEST, open_worker
folder = worker_folder(scratch() / "worker")
data = (folder / SHARE).read_bytes()
open_worker(folder)
begun = start()
for length in (2**63, 2**32, 2**24, len(data) - 8, 2):
    (folder / SHARE).write_bytes(length.to_bytes(8, "little") + data[8:])
    (folder / MANIFEST).write_bytes(worker_manifest(folder))
    try:
        open_worker(folder)
    except SlipError:
        pass
""",
        0,
    ),
    "numbers for Argon2id beyond the bounds": (
        """
import json
from folders import KEY, scratch, vault_folder
from sliplm.shares.sealing import SEAL, open_seal
folder = vault_folder(scratch() / "vault")
seal = json.loads((folder / SEAL).read_text())
begun = start()
for numbers in ((2**32 - 1, 1, 1), (2**20 + 1, 1, 1), (2**18, 17, 1), (2**18, 1, 17)):
    given = dict(zip(("memory_kib", "iterations", "lanes"), numbers))
    (folder / SEAL).write_text(json.dumps({**seal, "kind": "passphrase", "argon2id": given}))
    try:
        open_seal(folder, KEY)
    except SlipError:
        pass
""",
        0,
    ),
}

_MANIFESTS = """
import json
from folders import scratch, vault_folder, worker_folder
from sliplm.shares.share import MANIFEST, MAX_MANIFEST_BYTES, MAX_MANIFEST_ITEMS
from sliplm.shares.share import open_worker, read_vault_manifest
base = scratch()
worker, vault = worker_folder(base / "worker"), vault_folder(base / "vault")
opened = ((worker, open_worker), (vault, read_vault_manifest))
honest = {folder: json.loads((folder / MANIFEST).read_text()) for folder, _ in opened}
begun = start()
for folder, read in opened:
    for number in range(6):
        text = json.dumps({**honest[folder], "groups": "HERE"}).encode()
        before, _, after = text.partition(b'"HERE"')
        piece = [b"[],", b"{},", b"1,", b"[", b'"a",', b'{"name":[' + b"1," * 99 + b"1]},"][number]
        count = MAX_MANIFEST_ITEMS // piece.count(b",") if b"," in piece else MAX_MANIFEST_BYTES
        with (folder / MANIFEST).open("wb") as file:
            file.write(before + b"[")
            for _ in range((count - 2000) >> 10):
                file.write(piece * 1024)
            file.write(b"0]" + after)
        try:
            read(folder)
            raise SystemExit("a manifest that is none was read")
        except SlipError:
            pass
"""
CASES["manifests as long as they may be"] = (_MANIFESTS, 256 * MIB)


@pytest.mark.parametrize("case", CASES)
def test_memory(case: str, ledger: Ledger) -> None:
    """The peak stays below the stated sum, and some slack."""
    script, allowed = CASES[case]
    here = Path(__file__).parent
    code = f"{_BEGIN}{script}\nprint(peak() - begun)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={"PYTHONPATH": f"{here}:{here.parent / 'support'}", "PATH": "/usr/bin:/bin"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    taken = int(done.stdout.split()[-1])
    over = int(taken > allowed + SLACK)
    note = f"{taken / MIB:.0f} MiB taken, {(allowed + SLACK) / MIB:.0f} allowed"
    ledger.record(f"memory: {case}", 1, 1 - over, over, note)
    assert not over, note
