"""Where files go, in real processes: without a home, a passwd entry, /tmp, or a root that can be written."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import families
from sliplm import places
from sliplm.errors import PlaceError

SOURCE = Path(__file__).parents[1] / "src"
NOBODY = 54321  # no passwd entry names it
BARE = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}

# the mounts that can be written become read-only, all but the one folder; then a user who is nobody here.
# flags that the mount has must be named again: a user namespace may not drop them
NAMESPACE = """
set -e
mount --bind "$1" "$1"
while read -r _ where kind options _; do
  case "$where:$kind" in "$1":*|*:proc|*:sysfs|*:devtmpfs|*:devpts|*:cgroup*|*:mqueue) continue;; esac
  case ",$options," in *,ro,*) continue;; esac
  keep=$(printf %s "$options" | tr , '\\n' | grep -xE 'nosuid|nodev|noexec|noatime|relatime' | paste -sd, -)
  mount -o "remount,bind,ro${keep:+,$keep}" "$where" || mount -t tmpfs -o ro none "$where"
done < /proc/mounts
cd /
shift
exec unshare --user --map-user=54321 --map-group=54321 "$@"
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("places") / "model"
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    return families.make_with_tokenizer("llama", folder, template=template, num_hidden_layers=1)


Run = Callable[..., subprocess.CompletedProcess[str]]


def _run(before: list[str], environment: dict[str, str]) -> Run:
    def run(*arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
        command = [*before, sys.executable, "-P", "-m", "sliplm", *map(str, arguments)]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=300, check=False, cwd="/"
        )
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
        return done

    return run


def namespaced(folder: Path) -> list[str]:
    """What runs a command where this folder alone can be written; skips if the kernel refuses."""
    outer = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", NAMESPACE, "bash", str(folder)]
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare here")
    probe = subprocess.run([*outer, "true"], capture_output=True, text=True, timeout=60, check=False)
    if probe.returncode:
        pytest.skip(f"this kernel gives no user namespace: {probe.stderr.strip()[-200:]}")
    return outer


def test_a_read_only_root_with_one_folder(model: Path, tmp_path: Path) -> None:
    """Split, worker and generate, with no variable set but that folder."""
    folder = tmp_path / "writable"
    folder.mkdir()
    before = namespaced(folder)
    seen = subprocess.run(
        [
            *before,
            "sh",
            "-c",
            f"touch /x {shlex.quote(str(tmp_path))}/x; touch {shlex.quote(str(folder))}/x; id -u",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert seen.stderr.count("Read-only file system") == 2
    assert seen.stdout.strip() == str(NOBODY)
    slip = _run(before, BARE | {"SLIPLM_HOME": str(folder)})
    out = folder / "out"
    slip("split", model, out, "--rank", 4, "--json")
    done = slip("generate", out, "--prompt", "hello", "--max-new-tokens", 3, "--json")
    assert json.loads(done.stdout.splitlines()[-1])
    assert (folder / "config" / "key").stat().st_mode & 0o777 == 0o600
    assert list((folder / "cache" / "numba").rglob("*.nbi"))  # compiled once, and not in each process
    assert not list((folder / "tmp").iterdir())  # the local worker's keys are gone


def test_help_and_version_where_nothing_can_be_written(tmp_path: Path) -> None:
    slip = _run([*namespaced(tmp_path)], BARE)
    assert "sliplm" in slip("--version").stdout
    assert "split" in slip("--help").stdout


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No variable that `places` asks for, and no passwd entry."""
    for variable in places.VARIABLES:
        monkeypatch.delenv(variable, raising=False)

    def nobody(_: int) -> object:
        raise KeyError

    monkeypatch.setattr("sliplm.places.pwd.getpwuid", nobody)
    return monkeypatch


def test_what_must_last_has_no_place_without_a_home(bare: pytest.MonkeyPatch) -> None:
    for place in (places.key_file, places.ledger, places.anchors):
        with pytest.raises(PlaceError, match="SLIPLM_HOME"):
            place()
    with pytest.raises(PlaceError, match="write the whole path"):
        places.expanded("~/key")
    assert places.cache().name.startswith("sliplm-")  # what may go lies among the temporary files
    bare.setenv("HOME", "relative")
    with pytest.raises(PlaceError, match="SLIPLM_HOME"):
        places.key_file()


def test_one_variable_for_everything_and_each_its_own(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bare.setenv("SLIPLM_HOME", str(tmp_path))
    assert places.key_file() == tmp_path / "config" / "key"
    assert places.ledger() == tmp_path / "config" / "ledger"
    assert places.anchors() == tmp_path / "state" / "anchors"
    assert places.cache() == tmp_path / "cache"
    assert places.temporary() == tmp_path / "tmp"
    bare.setenv("SLIPLM_KEY_FILE", str(tmp_path / "mine"))
    assert places.key_file() == tmp_path / "mine"
    bare.delenv("SLIPLM_HOME")
    bare.setenv("XDG_CONFIG_HOME", "relative")  # counts as unset
    with pytest.raises(PlaceError):
        places.ledger()
    bare.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    assert places.ledger() == tmp_path / "xdg" / "sliplm" / "ledger"


def test_no_code_is_cached_where_others_can_write(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """numba runs what it finds in its cache."""
    bare.setenv("SLIPLM_CACHE", str(tmp_path / "cache"))
    assert places.code_cache() == tmp_path / "cache" / "numba"
    (tmp_path / "cache").chmod(0o777)
    assert places.code_cache() is None


def test_folders_of_killed_processes_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPLM_HOME", str(tmp_path))
    monkeypatch.delenv("TMPDIR", raising=False)
    script = (
        "import os, signal\nfrom sliplm import places\nheld = places.NewFolder()\n"
        "(held.path / 'key.pem').write_text('secret')\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", script], check=False, timeout=120)
    (killed,) = (tmp_path / "tmp").glob("sliplm-*")
    (strange := tmp_path / "tmp" / "sliplm-strange").mkdir()
    with places.NewFolder() as young:
        assert (killed / "key.pem").exists()  # its process might not have locked it yet
        for folder in (killed, young.path):
            os.utime(folder / ".alive", (0, 0))
        with places.NewFolder():
            assert not killed.exists()
            assert young.path.exists() and strange.exists()
    assert [path.name for path in (tmp_path / "tmp").iterdir()] == ["sliplm-strange"]
