"""Where sealing keys come from, and what is refused there."""

from __future__ import annotations

import copy
import os
import pickle
import pty
import re
import shlex
import stat
import subprocess
import sys
import termios
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sliplm.errors import CredentialError
from sliplm.shares.keysource import MAX_SECRET_BYTES, Key, checked, default_path, described, find

SRC = Path(__file__).parents[2] / "src"
RAW = bytes(range(32))
PYTHON = shlex.quote(sys.executable)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without a key file."""
    monkeypatch.delenv("SLIPLM_KEY_FILE")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "sliplm"


def key_file(path: Path, text: str = RAW.hex() + "\n", mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def command(code: str) -> str:
    return f"command:{PYTHON} -c {shlex.quote(code)}"


# --- sources ---------------------------------------------------------------------------------------------


def test_bytes() -> None:
    assert (find(RAW).kind, find(RAW).secret) == ("key", RAW)
    assert find(find(RAW)).secret == RAW
    with pytest.raises(CredentialError, match="32 bytes, not 16"):
        find(RAW[:16])


@pytest.mark.parametrize("text", [RAW.hex(), RAW.hex() + "\n", RAW.hex().upper() + "\r\n"])
def test_files_the_environment_and_commands(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = key_file(tmp_path / "key", text)
    monkeypatch.setenv("A_KEY", text)
    for spec in (f"file:{path}", "env:A_KEY", f"command:cat {path}", command(f"print({text.strip()!r})")):
        found = find(spec)
        assert (found.kind, found.secret, found.made) == ("key", RAW, False)


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    key_file(tmp_path / "key")
    assert find("file:~/key").secret == RAW


def test_what_openssl_prints_is_a_key(tmp_path: Path) -> None:
    assert len(find("command:openssl rand -hex 32").secret) == 32


def test_passphrases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = key_file(tmp_path / "pass", "correct horse: battery \n")
    monkeypatch.setenv("A_PASS", "cafe\u0301")
    from_file = find(f"passphrase:file:{path}")
    assert (from_file.kind, from_file.secret) == ("passphrase", b"correct horse: battery ")
    assert find("passphrase:env:A_PASS").secret == "caf\u00e9".encode()  # however it was typed
    key_file(path, "\n")
    with pytest.raises(CredentialError, match="empty"):
        find(f"passphrase:file:{path}")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(CredentialError, match="not UTF-8"):
        find(f"passphrase:file:{path}")


@pytest.mark.parametrize(
    "spec",
    ["", "key", RAW.hex(), "file:", "env:", "command:", "command: ", "passphrase:", "passphrase:tty",
     "passphrase:file:", "hex:" + RAW.hex(), 7, ["file:x"]],
)  # fmt: skip
def test_an_unknown_form_is_refused_and_not_repeated(spec: object) -> None:
    with pytest.raises(CredentialError, match="not known") as caught:
        checked(spec)  # type: ignore[arg-type]
    assert RAW.hex() not in str(caught.value)
    with pytest.raises(CredentialError):
        find(spec)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["", "5ec2e7", RAW.hex()[:-1], RAW.hex() + "0", "g" * 64, RAW.hex() + "\n" + RAW.hex()]
)
def test_what_is_no_key_is_refused_and_not_shown(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = key_file(tmp_path / "key", text)
    monkeypatch.setenv("A_KEY", text)
    for spec in (f"file:{path}", "env:A_KEY", f"command:cat {path}"):
        with pytest.raises(CredentialError, match="64 hexadecimal digits") as caught:
            find(spec)
        assert not text or text not in str(caught.value)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(CredentialError, match="nokey"):
        find(f"file:{tmp_path / 'nokey'}")
    with pytest.raises(CredentialError, match="NO_SUCH_KEY"):
        find("env:NO_SUCH_KEY")
    with pytest.raises(CredentialError, match="cannot be started"):
        find("command:/no/such/program")


def test_where_a_key_comes_from_is_said_without_secrets() -> None:
    assert described(None) == f"the key from {default_path()}"
    assert described("file:/k") == "the key from file:/k"
    assert described("passphrase") == "the passphrase from the terminal"
    assert described("command:get-key --token 'tell nobody'") == "the key from the command get-key"
    assert described(RAW) == "the key from 32 bytes given"
    with pytest.raises(CredentialError):
        described(RAW.hex())


def test_a_key_hides_itself() -> None:
    key = Key("passphrase", b"correct horse", "here")
    for text in (repr(key), str(key), f"{key}", repr({"key": key})):
        assert "correct" not in text
        assert "hidden" in text
    assert copy.deepcopy(key) is key
    with pytest.raises(CredentialError, match="not written to disk"):
        pickle.dumps(key)


# --- files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o604, 0o644, 0o620, 0o601, 0o777])
def test_a_file_that_others_can_touch_is_refused(mode: int, tmp_path: Path) -> None:
    path = key_file(tmp_path / "a key", mode=mode)
    with pytest.raises(CredentialError, match=re.escape(f"chmod 600 '{path}'")):
        find(f"file:{path}")
    with pytest.raises(CredentialError, match="chmod 600"):
        find(f"passphrase:file:{path}")


@pytest.mark.skipif(os.geteuid() != 0, reason="giving files away takes root")
def test_a_file_of_another_user_is_refused(tmp_path: Path) -> None:
    path = key_file(tmp_path / "key")
    os.chown(path, 12345, -1)
    with pytest.raises(CredentialError, match="another user"):
        find(f"file:{path}")


def test_only_small_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    for path in (tmp_path / "fifo", Path("/dev/zero"), tmp_path):
        with pytest.raises(CredentialError, match="no regular file"):
            find(f"file:{path}")
    os.truncate(key_file(tmp_path / "key"), 1 << 40)  # sparse: takes no room
    with pytest.raises(CredentialError, match="this is no key"):
        find(f"file:{tmp_path / 'key'}")


def test_the_default_file_is_made_by_who_seals_and_by_nobody_else(home: Path) -> None:
    with pytest.raises(CredentialError, match="there is no key file"):
        find(None)
    assert not home.exists()
    made = find(None, new=True)
    assert made.made
    assert default_path() == home / "key"
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert stat.S_IMODE((home / "key").stat().st_mode) == 0o600
    assert [file.name for file in home.iterdir()] == ["key"]
    again = find(None, new=True)
    assert (again.secret, again.made) == (made.secret, False)
    assert find(None).secret == made.secret
    (home / "key").chmod(0o644)
    with pytest.raises(CredentialError, match="chmod 600"):
        find(None)


def test_the_environment_names_another_default_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPLM_KEY_FILE", str(home / "other"))
    assert find(None, new=True).source == str(home / "other")


def test_many_who_make_it_at_once_have_one_key(home: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda _: find(None, new=True), range(64)))
    assert len({key.secret for key in found}) == 1
    assert [file.name for file in home.iterdir()] == ["key"]


def test_a_default_file_that_cannot_be_made(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPLM_KEY_FILE", "/proc/key")
    with pytest.raises(CredentialError, match="cannot be made"):
        find(None, new=True)
    home.parent.mkdir()
    home.symlink_to("/nowhere/at/all")
    monkeypatch.setenv("SLIPLM_KEY_FILE", str(home))
    with pytest.raises(CredentialError, match="cannot be read"):  # a link to nothing is not replaced
        find(None, new=True)


# --- commands --------------------------------------------------------------------------------------------

HOSTILE = {
    "endless": ("import sys\nwhile True: sys.stdout.write('0' * 9999)", "more than 4096 bytes"),
    "long": (f"print('0' * {MAX_SECRET_BYTES})", "more than 4096 bytes"),
    "silent": ("import time; time.sleep(600)", "gave no key within the time limit"),
    "slow": ("import sys, time\nwhile True: print('0', flush=True); time.sleep(0.2)", "time limit"),
    "never ends": ("import os, time; os.close(1); time.sleep(600)", "did not end within"),
    "fails": (f"import sys; print({RAW.hex()!r}); sys.exit(3)", "failed with status 3"),
    "dies": (
        f"import os; print({RAW.hex()!r}, flush=True); os.kill(os.getpid(), 9)",
        "failed with status -9",
    ),
    "says nothing": ("", "64 hexadecimal digits"),
    "asks": (f"print(input('?') or {RAW.hex()!r})", "failed with status 1"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_command(what: str, tmp_path: Path) -> None:
    code, word = HOSTILE[what]
    pid = tmp_path / "pid"
    note = f"import os; open({str(pid)!r}, 'w').write(str(os.getpid()))\n"
    with pytest.raises(CredentialError, match=word) as caught:
        find(command(note + code), limit=1.5)
    assert RAW.hex() not in str(caught.value)
    assert not Path(f"/proc/{pid.read_text()}").exists()  # it is gone, and waited for


def test_a_command_is_no_shell_line(tmp_path: Path) -> None:
    with pytest.raises(CredentialError):
        find(f"command:echo {RAW.hex()} > {tmp_path / 'leak'}")
    assert not (tmp_path / "leak").exists()
    with pytest.raises(CredentialError, match="open quote"):
        find("command:echo 'x")


def test_what_a_command_says_on_stderr_passes_through(capfd: pytest.CaptureFixture[str]) -> None:
    find(command(f"import sys; print({RAW.hex()!r}); print('touch the token', file=sys.stderr)"))
    assert "touch the token" in capfd.readouterr().err


# --- the terminal ----------------------------------------------------------------------------------------

ASKED = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from sliplm.errors import CredentialError
from sliplm.shares.keysource import find
try:
    print("found", find("passphrase", new=sys.argv[1] == "new").secret.hex())
except CredentialError as error:
    print("refused", error)
"""
ENV = {**os.environ, "PYTHONPATH": str(SRC)}


def on_a_terminal(answers: list[str], mode: str) -> str:
    """All that the terminal shows while each question is answered in turn."""
    master, slave = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", ASKED, mode], stdin=slave, stdout=slave, stderr=slave, env=ENV,
        start_new_session=True,
    )  # fmt: skip
    os.close(slave)
    shown = ""
    try:
        for answer in answers:
            while not shown.rstrip(" ").endswith(":"):
                shown += os.read(master, 4096).decode()
            while termios.tcgetattr(master)[3] & termios.ECHO:  # asked before the echo is off: wait
                time.sleep(0.01)
            os.write(master, answer.encode())
            shown += "\n"
        while True:
            shown += os.read(master, 4096).decode()
    except OSError:  # the child has closed its side
        return shown
    finally:
        child.wait(60)
        os.close(master)


def test_a_passphrase_is_asked_for() -> None:
    shown = on_a_terminal(["horse\n"], "old")
    assert f"found {b'horse'.hex()}" in shown
    assert "horse" not in shown  # no echo
    assert shown.count(":") == 1


def test_a_new_passphrase_is_asked_for_twice() -> None:
    assert f"found {b'horse'.hex()}" in on_a_terminal(["horse\n", "horse\n"], "new")
    assert "refused the two passphrases differ" in on_a_terminal(["horse\n", "hose\n"], "new")


def test_an_empty_answer_or_none_is_refused() -> None:
    assert "is empty" in on_a_terminal(["\n"], "old")
    assert "no passphrase was given" in on_a_terminal(["\x04"], "old")


def test_without_a_terminal_nothing_is_asked() -> None:
    code = "from sliplm.shares.keysource import find; find('passphrase')"
    done = subprocess.run(
        [sys.executable, "-c", code], input="horse\n", env=ENV, start_new_session=True,
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "there is no terminal to ask on" in done.stderr
