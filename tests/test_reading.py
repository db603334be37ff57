"""Secrets that a container mounts with mode 0440, and those that too many can reach."""

import warnings
from pathlib import Path

import pytest

from sliplm.errors import SlipWarning
from sliplm.reading import is_private


def mounted(folder: Path, mode: int, home: int) -> Path:
    """A secret as Kubernetes mounts it: a link to ..data/key, and ..data a link to the real folder."""
    real = folder / "..2026"
    real.mkdir()
    (real / "key").write_text("secret")
    (folder / "..data").symlink_to(real.name)
    (folder / "key").symlink_to("..data/key")
    (real / "key").chmod(mode)
    real.chmod(home)
    return folder / "key"


def test_a_key_that_its_group_reads_will_do_in_a_folder_of_its_owners(tmp_path: Path) -> None:
    path = mounted(tmp_path, 0o440, 0o700)
    with pytest.warns(SlipWarning, match="readable by its group"):
        assert is_private(path, path.stat())


@pytest.mark.parametrize(
    ("mode", "home"),
    [(0o444, 0o700), (0o460, 0o700), (0o404, 0o700), (0o402, 0o700), (0o440, 0o775), (0o440, 0o777)],
)
def test_what_others_reach_or_replace_is_refused(tmp_path: Path, mode: int, home: int) -> None:
    path = mounted(tmp_path, mode, home)
    assert not is_private(path, path.stat())


def test_a_key_of_its_owner_alone_needs_no_warning(tmp_path: Path) -> None:
    path = mounted(tmp_path, 0o400, 0o755)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert is_private(path, path.stat())
