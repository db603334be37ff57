"""The audit record's chain: whatever is changed, left out or put in between shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sliplm.parties.audit import AuditLog
from sliplm.parties.chain import Head, verify

LINES = 6


@pytest.fixture
def file(tmp_path: Path) -> Path:
    log = AuditLog(tmp_path / "audit.jsonl")
    for i in range(LINES):
        log.write("asked", "answered", role="client", address="alice", detail={"charged": i})
    return tmp_path / "audit.jsonl"


def test_an_untouched_file_is_whole(file: Path) -> None:
    head, seen = verify(file)
    assert (head.lines, head.bare, head.broken, seen) == (LINES, 0, None, True)
    last = json.loads(file.read_text().splitlines()[-1])
    assert last["hash"] == head.hash
    assert last["detail"] == {"charged": LINES - 1}


@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_changed_bit_shows(tmp_path_factory: pytest.TempPathFactory, place: int, bit: int) -> None:
    path = tmp_path_factory.getbasetemp() / "audit-bit.jsonl"
    path.unlink(missing_ok=True)
    log = AuditLog(path)
    for _ in range(3):
        log.write("asked", "answered", address="alice")
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1 << bit
    path.write_bytes(data)
    head, seen = verify(path, log.head)
    assert head.broken is not None or not seen or head.bare


@pytest.mark.parametrize("line", range(LINES - 1))
def test_a_line_left_out_shows(file: Path, line: int) -> None:
    lines = file.read_bytes().splitlines(keepends=True)
    del lines[line]
    file.write_bytes(b"".join(lines))
    assert verify(file)[0].broken == line + 1


def test_lines_that_change_places_show(file: Path) -> None:
    lines = file.read_bytes().splitlines(keepends=True)
    lines[1], lines[2] = lines[2], lines[1]
    file.write_bytes(b"".join(lines))
    assert verify(file)[0].broken == 2


def test_an_end_that_was_cut_off_shows_by_a_noted_hash(file: Path) -> None:
    noted = verify(file)[0].hash
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:-1]))
    head, seen = verify(file, noted)
    assert head.broken is None
    assert not seen


def test_a_later_process_goes_on(file: Path) -> None:
    noted, told = verify(file)[0].hash, []
    log = AuditLog(file, told.append)
    assert [line["detail"]["charged"] for line in told] == list(range(LINES))
    log.write("asked", "answered", address="bob")
    head, seen = verify(file, noted)
    assert (head.lines, head.broken, seen) == (LINES + 1, None, True)


def test_two_processes_append_to_one_chain(file: Path) -> None:
    program = (
        "import sys; from sliplm.parties.audit import AuditLog; log = AuditLog(sys.argv[1])\n"
        "for _ in range(50): log.write('asked', 'answered', address=sys.argv[2])"
    )
    both = [subprocess.Popen([sys.executable, "-c", program, str(file), name]) for name in ("a", "b")]
    assert [process.wait(60) for process in both] == [0, 0]
    head, _ = verify(file)
    assert (head.lines, head.broken) == (LINES + 100, None)


def test_what_a_crash_left_is_covered(file: Path) -> None:
    with file.open("ab") as torn:
        torn.write(b'{"time":"2026')
    AuditLog(file).write("asked", "answered", address="bob")
    head, _ = verify(file)
    assert (head.lines, head.bare, head.broken) == (LINES + 1, 1, None)
    file.write_bytes(file.read_bytes().replace(b'{"time":"2026\n', b'{"time":"2027\n'))
    assert verify(file)[0].broken == LINES + 2


def test_lines_of_older_versions_are_covered(tmp_path: Path) -> None:
    path = tmp_path / "old.jsonl"
    path.write_text('{"event":"lost"}\n{"event":"rejoined"}\n')
    AuditLog(path).write("lost", "gone")
    assert verify(path)[0][2:] == (1, 2, None)
    path.write_text(path.read_text().replace("rejoined", "suspended"))
    assert verify(path)[0].broken == 3


def test_a_file_that_was_put_away_begins_a_new_chain(file: Path) -> None:
    log = AuditLog(file)
    file.rename(file.with_suffix(".1"))
    log.write("asked", "answered", address="bob")
    assert verify(file)[0][2:] == (1, 0, None)
    assert verify(file.with_suffix(".1"))[0].lines == LINES


def test_a_pipe_has_no_chain(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    AuditLog(f"/dev/fd/{writing}").write("lost", "gone")
    os.close(writing)
    with os.fdopen(reading) as said:
        assert json.loads(said.read())["event"] == "lost"


def test_an_empty_file_is_whole(tmp_path: Path) -> None:
    (tmp_path / "audit.jsonl").touch()
    assert verify(tmp_path / "audit.jsonl") == (Head(), True)
