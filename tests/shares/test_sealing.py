"""The vault share at rest: it opens with its key, whole and in its place, or not at all."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import logging
import os
import pty
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import families
from sliplm import LocalWorker, SlipConfig
from sliplm.arithmetic.field import derive_key
from sliplm.engines.transformers.convert import split
from sliplm.engines.transformers.load import load, reference
from sliplm.engines.transformers.opened import OpenedModel
from sliplm.errors import CredentialError, SealError, ShareError, SlipError
from sliplm.shares import sealing
from sliplm.shares.contents import sealed_spec, secret_specs, secret_tensors
from sliplm.shares.manifest import KeptTensor, Member, SourceModel, VaultGroup, VaultManifest
from sliplm.shares.recipe import Recipe
from sliplm.shares.sealing import (
    CHUNK_BYTES,
    make_seal,
    open_blob,
    open_seal,
    read_seal,
    reseal,
    seal_blob,
    seal_manifest,
    sealed_bytes,
)
from sliplm.shares.share import open_vault, record
from sliplm.shares.splitting import split_group
from sliplm.shares.tensorfile import SafetensorsWriter, TensorSpec, read_header

KEY, OTHER = bytes(range(32)), bytes(32)
LABEL = "share.safetensors/a"


def sealed(plain: bytes, key: bytes = KEY, label: str = LABEL, step: int = 1 << 20) -> bytes:
    return b"".join(seal_blob(key, label, (plain[i : i + step] for i in range(0, len(plain), step))))


def opened(blob: bytes, plain: int, key: bytes = KEY, label: str = LABEL) -> bytes:
    out = bytearray(plain)
    open_blob(key, label, io.BytesIO(blob), len(blob), memoryview(out))
    return bytes(out)


# --- blobs -----------------------------------------------------------------------------------------------

LENGTHS = st.one_of(
    st.integers(0, 300),
    st.sampled_from([CHUNK_BYTES * i + d for i in (1, 2, 16, 17) for d in (-1, 0, 1)]),
    st.integers(0, 3 * CHUNK_BYTES),
)


@given(LENGTHS, st.integers(1, 3 * CHUNK_BYTES), st.integers(0, 255))
@settings(max_examples=80)
def test_what_is_sealed_opens(length: int, step: int, first: int) -> None:
    plain = (bytes(range(first, 256)) + os.urandom(251)) * (length // 251 + 1)
    plain = plain[:length]
    blob = sealed(plain, step=max(step, length // 50 + 1))
    assert len(blob) == sealed_bytes(length)
    assert opened(blob, length) == plain


def test_the_format() -> None:
    """Once more, from the specification alone."""
    plain = os.urandom(CHUNK_BYTES + 5)
    blob = sealed(plain)
    info = b"sliplm/1/blob/" + LABEL.encode()
    cipher = AESGCM(HKDF(algorithm=SHA256(), length=32, salt=blob[:32], info=info).derive(KEY))
    end = 32 + CHUNK_BYTES + 16
    assert cipher.decrypt(bytes(12), blob[32:end], None) == plain[:CHUNK_BYTES]
    assert cipher.decrypt(bytes(10) + b"\x01\x01", blob[end:], None) == plain[CHUNK_BYTES:]
    assert sealed(plain)[:32] != blob[:32]  # a salt serves once


@pytest.mark.parametrize("length", [0, 1, 100])
def test_every_flipped_bit_is_noticed(length: int) -> None:
    blob = bytearray(sealed(os.urandom(length)))
    for i in range(8 * len(blob)):
        blob[i // 8] ^= 1 << i % 8
        with pytest.raises(SealError, match="altered"):
            opened(bytes(blob), length)
        blob[i // 8] ^= 1 << i % 8
    opened(bytes(blob), length)


@given(st.integers(1, 2 * CHUNK_BYTES + 40), st.data())
@settings(max_examples=40)
def test_cut_off_or_extended_anywhere(length: int, data: st.DataObject) -> None:
    blob = sealed(bytes(length))
    cut = data.draw(st.integers(0, len(blob) - 1))
    for wrong in (blob[:cut], blob + bytes(1 + cut % 70), blob + blob):
        for claimed in {length, max(0, len(wrong) - 48), cut}:
            with pytest.raises(SealError):
                opened(wrong, claimed)
    with pytest.raises(SealError, match="cut off"):
        open_blob(KEY, LABEL, io.BytesIO(blob[:cut]), len(blob), memoryview(bytearray(length)))


def test_chunks_cannot_be_moved_dropped_or_repeated() -> None:
    plain = os.urandom(3 * CHUNK_BYTES)
    blob, size = sealed(plain), CHUNK_BYTES + 16
    salt, one, two, three = blob[:32], blob[32 : 32 + size], blob[32 + size : -size], blob[-size:]
    for parts in ((two, one, three), (one, three, two), (one, one, three), (one, two, two), (three,) * 3):
        with pytest.raises(SealError, match="altered"):
            opened(salt + b"".join(parts), len(plain))
    for parts in ((one, two), (one, three), (three,), (one,), (one, two, three, three)):
        with pytest.raises(SealError, match="altered"):
            opened(salt + b"".join(parts), CHUNK_BYTES * len(parts))


def test_a_blob_opens_in_its_place_only() -> None:
    blob = sealed(b"secret")
    for key, label in ((OTHER, LABEL), (KEY, "share.safetensors/b"), (KEY, "model.safetensors/a"), (KEY, "")):
        with pytest.raises(SealError, match="altered, or sealed for another place"):
            opened(blob, 6, key, label)


@pytest.mark.parametrize("claimed", [0, 31, 47, 49, 1 << 40, 1 << 62, -1])
def test_a_hostile_length_takes_no_memory(claimed: int) -> None:
    class Never(io.BytesIO):
        def readinto(self, buffer: Any) -> int:
            raise AssertionError

    with pytest.raises(SealError, match="are not 0 sealed ones"):
        open_blob(KEY, LABEL, Never(), claimed, memoryview(bytearray()))


# --- a whole vault, as small as one gets -----------------------------------------------------------------


def make_vault(folder: Path, key: Any = KEY) -> Path:
    """One group of 3 x 2, one tensor that stays whole, and no worker share."""
    folder.mkdir(mode=0o700, parents=True)
    data_key = make_seal(folder, key)
    parts = split_group(
        "g", np.arange(6, dtype=np.float32).reshape(3, 2), rank=1, precision=8, rotation="fast"
    )
    group = VaultGroup(
        name="g", rows=3, columns=2, dtype="I8", members=(Member("m", 3),), rank=1, precision=8,
        rotation="fast", error=0.0, svd_error=0.0,
    )  # fmt: skip
    kept = TensorSpec("k", "F32", (5,))
    _write_tensors(folder / "share.safetensors", data_key, secret_specs(group), secret_tensors(parts.secrets))
    _write_tensors(folder / "model.safetensors", data_key, [kept], {"k": np.arange(5, dtype=np.float32)})
    (folder / "config.json").write_text("{}")
    manifest = VaultManifest(
        split_id="0" * 32, sliplm="0", source=SourceModel(name="m", config_class="c", parameters=6),
        recipe=Recipe(), groups=(group,), kept=(), kept_bytes=68, attention=(), worker_files={},
        kept_tensors=(KeptTensor(name="k", dtype="F32", shape=(5,)),),
        files={path.name: record(path) for path in folder.iterdir() if path.name != "seal.json"},
    )  # fmt: skip
    text = manifest.model_dump_json().encode()
    (folder / "manifest.json").write_bytes(text)
    seal_manifest(folder, data_key, text)
    return folder


def _write_tensors(path: Path, data_key: bytes, specs: Any, arrays: dict[str, Any]) -> None:
    with SafetensorsWriter(path, [sealed_spec(spec) for spec in specs]) as file:
        for name, array in arrays.items():
            file.write_bytes(name, b"".join(seal_blob(data_key, f"{path.name}/{name}", [array.tobytes()])))


def read_all(vault: Path, key: Any = KEY) -> bytes:
    """Everything that a vault holds."""
    share = open_vault(vault, key)
    kept = families.kept_tensors(vault, key)
    return (
        b"".join(a.tobytes() for a in secret_tensors(share.groups["g"]).values())
        + kept["k"].numpy().tobytes()
    )


@pytest.fixture
def vault(tmp_path: Path) -> Path:
    return make_vault(tmp_path / "vault")


def test_a_small_vault_opens(vault: Path) -> None:
    assert open_vault(vault, KEY).groups["g"].a.shape == (3, 1)
    assert families.kept_tensors(vault, KEY)["k"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "name", ["seal.json", "manifest.json", "share.safetensors", "model.safetensors", "config.json"]
)
def test_every_flipped_byte_of_a_vault_is_refused(name: str, vault: Path) -> None:
    path = vault / name
    data = bytearray(path.read_bytes())
    for i in range(len(data)):
        data[i] ^= 1
        path.write_bytes(data)
        with pytest.raises(ShareError):
            open_vault(vault, KEY)
        data[i] ^= 1
    path.write_bytes(data)
    read_all(vault)


@pytest.mark.parametrize("name", ["share.safetensors", "model.safetensors"])
def test_every_flipped_byte_is_refused_even_where_digests_were_made_to_match(name: str, vault: Path) -> None:
    """The seals of the tensors hold without the digests."""
    path, data_key = vault / name, open_seal(vault, KEY)
    data = bytearray(path.read_bytes())
    manifest = json.loads((vault / "manifest.json").read_text())
    for i in range(min(entry.start for entry in read_header(path).values()), len(data)):
        data[i] ^= 1
        path.write_bytes(data)
        manifest["files"][name] = record(path).model_dump()
        text = json.dumps(manifest).encode()
        (vault / "manifest.json").write_bytes(text)
        seal_manifest(vault, data_key, text)
        with pytest.raises(SealError, match="altered"):
            read_all(vault)
        data[i] ^= 1


def test_tensors_and_files_cannot_be_swapped(vault: Path) -> None:
    path, data_key = vault / "share.safetensors", open_seal(vault, KEY)
    entries, data = read_header(path), bytearray(path.read_bytes())
    one, two = (entries[f"g/{name}"] for name in ("a", "scale"))  # of equal length
    first, second = (bytes(data[e.start : e.start + e.nbytes]) for e in (one, two))
    data[one.start : one.start + one.nbytes] = second
    data[two.start : two.start + two.nbytes] = first
    path.write_bytes(data)
    manifest = json.loads((vault / "manifest.json").read_text())
    manifest["files"]["share.safetensors"] = record(path).model_dump()
    (vault / "manifest.json").write_text(json.dumps(manifest))
    seal_manifest(vault, data_key, (vault / "manifest.json").read_bytes())
    with pytest.raises(SealError, match="g/a was altered, or sealed for another place"):
        open_vault(vault, KEY)


def test_nothing_of_another_vault_of_the_same_key_fits(vault: Path, tmp_path: Path) -> None:
    other = make_vault(tmp_path / "other")
    for name in ("seal.json", "manifest.json", "share.safetensors", "model.safetensors"):
        mixed = shutil.copytree(vault, tmp_path / f"mixed {name}")
        shutil.copy(other / name, mixed / name)
        with pytest.raises(ShareError):
            open_vault(mixed, KEY)


@pytest.mark.parametrize("name", ["share.safetensors", "model.safetensors", "seal.json", "manifest.json"])
@pytest.mark.parametrize("size", [0, 1, 100, -1, -20])
def test_truncated_files(name: str, size: int, vault: Path) -> None:
    os.truncate(vault / name, size if size >= 0 else (vault / name).stat().st_size + size)
    with pytest.raises(ShareError):
        open_vault(vault, KEY)


# --- the seal and its keys -------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Argon2id with less memory."""
    monkeypatch.setattr(sealing, "PASSPHRASE_MEMORY_KIB", 256)


def test_another_key_is_told_from_altered_bytes(vault: Path) -> None:
    with pytest.raises(SealError, match="another key"):
        open_vault(vault, OTHER)
    with pytest.raises(SealError, match="another key"):
        open_vault(vault)
    path = vault / "seal.json"
    seal = json.loads(path.read_text())
    path.write_text(json.dumps({**seal, "wrapped": seal["wrapped"][::-1]}))
    with pytest.raises(SealError, match=r"seal\.json was altered"):
        open_vault(vault, KEY)
    path.unlink()
    with pytest.raises(SealError, match=r"seal\.json cannot be read"):
        open_vault(vault, KEY)


def test_a_passphrase(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOD", "correct horse")
    monkeypatch.setenv("BAD", "correct hose")
    vault = make_vault(tmp_path / "vault", "passphrase:env:GOOD")
    seal = read_seal(vault)
    assert seal.argon2id is not None
    assert (seal.kind, seal.argon2id.memory_kib, seal.argon2id.lanes) == ("passphrase", 256, 4)
    assert read_all(vault, "passphrase:env:GOOD")
    with pytest.raises(SealError, match="another key"):
        open_vault(vault, "passphrase:env:BAD")
    with pytest.raises(SealError, match="sealed with a passphrase, and a key was given"):
        open_vault(vault, KEY)
    with pytest.raises(SealError, match='sealed with a passphrase: give the key "passphrase"'):
        open_vault(vault)
    key_vault = make_vault(tmp_path / "two")
    with pytest.raises(SealError, match="sealed with a key, and a passphrase was given"):
        open_vault(key_vault, "passphrase:env:GOOD")
    for text in ((vault / "seal.json").read_bytes(), repr(seal).encode()):
        assert b"horse" not in text


def test_the_default_of_a_passphrase_takes_a_quarter_of_a_gigabyte() -> None:
    numbers = (sealing.PASSPHRASE_MEMORY_KIB, sealing.PASSPHRASE_ITERATIONS, sealing.PASSPHRASE_LANES)
    assert numbers == (256 * 1024, 3, 4)


@pytest.mark.parametrize(
    ("field", "value"),
    [("memory_kib", 1 << 40), ("memory_kib", (1 << 20) + 1), ("memory_kib", 0), ("memory_kib", "1024"),
     ("iterations", 10**9), ("iterations", 17), ("iterations", 0), ("lanes", 10**6), ("lanes", 0),
     ("lanes", 1.5), ("threads", 4)],
)  # fmt: skip
def test_hostile_argon2_numbers_are_refused_before_use(
    field: str, value: object, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOOD", "correct horse")
    vault = make_vault(tmp_path / "vault", "passphrase:env:GOOD")
    seal = json.loads((vault / "seal.json").read_text())
    seal["argon2id"][field] = value
    (vault / "seal.json").write_text(json.dumps(seal))
    with pytest.raises(SealError, match=f"not a valid seal.*{field}"):
        open_vault(vault, "passphrase:env:GOOD")


def test_argon2_numbers_are_part_of_the_seal(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOOD", "correct horse")
    vault = make_vault(tmp_path / "vault", "passphrase:env:GOOD")
    seal = json.loads((vault / "seal.json").read_text())
    for field in ("memory_kib", "iterations", "lanes"):
        changed = {**seal["argon2id"], field: seal["argon2id"][field] - 1}
        (vault / "seal.json").write_text(json.dumps({**seal, "argon2id": changed}))
        with pytest.raises(SealError):
            open_vault(vault, "passphrase:env:GOOD")


HOSTILE_SEALS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "list": lambda seal: [seal],
    "version": lambda seal: seal | {"version": 2},
    "format": lambda seal: seal | {"format": "age"},
    "kind": lambda seal: seal | {"kind": "none"},
    "numbers": lambda seal: seal | {"argon2id": {"memory_kib": 256, "iterations": 1, "lanes": 1}},
    "passphrase without numbers": lambda seal: seal | {"kind": "passphrase"},
    "extra": lambda seal: seal | {"extra": 1},
    "short": lambda seal: seal | {"wrapped": ""},
    "no key": lambda seal: {name: value for name, value in seal.items() if name != "wrapped"},
    "unfinished": lambda seal: seal | {"manifest": None},
    "deep": lambda seal: json.loads("[" * 500 + "]" * 500),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE_SEALS)
def test_a_seal_that_says_something_else(what: str, vault: Path) -> None:
    path = vault / "seal.json"
    path.write_text(json.dumps(HOSTILE_SEALS[what](json.loads(path.read_text()))))
    with pytest.raises(SealError):
        open_vault(vault, KEY)


@given(st.binary(max_size=400))
@settings(max_examples=60)
def test_noise_is_no_seal(tmp_path_factory: pytest.TempPathFactory, noise: bytes) -> None:
    folder = tmp_path_factory.mktemp("noise")
    (folder / "seal.json").write_bytes(noise)
    with pytest.raises(SealError):
        read_seal(folder)


def test_a_seal_has_a_size_limit(vault: Path) -> None:
    os.truncate(vault / "seal.json", 1 << 40)  # sparse: takes no room
    with pytest.raises(SealError, match="no seal"):
        read_seal(vault)


def test_resealing(quick: None, vault: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOD", "correct horse")
    before, seal = read_all(vault), (vault / "seal.json").read_bytes()
    with pytest.raises(SealError, match="another key"):
        reseal(vault, OTHER, KEY)
    with pytest.raises(CredentialError):
        reseal(vault, KEY, "env:NO_SUCH_KEY")
    assert (vault / "seal.json").read_bytes() == seal
    (vault / ".seal.json.part").write_text("what a crash left")
    for old, new in ((KEY, OTHER), (OTHER, "passphrase:env:GOOD"), ("passphrase:env:GOOD", KEY)):
        reseal(vault, old, new)
        assert read_all(vault, new) == before
        with pytest.raises(SealError):
            open_vault(vault, old)
        assert (vault / "seal.json").stat().st_mode & 0o777 == 0o600
    assert json.loads((vault / "seal.json").read_text())["salt"] not in seal.decode()
    assert not (vault / ".seal.json.part").exists()


def test_resealing_on_a_full_disk_leaves_the_old_seal(vault: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(ShareError, match=r"seal\.json: cannot be written"):
            reseal(vault, KEY, OTHER)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_all(vault, KEY)
    reseal(vault, KEY, OTHER)
    assert read_all(vault, OTHER)


# --- the command ---------------------------------------------------------------------------------------


def slip(*words: object, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sliplm", *map(str, words)], env={**os.environ, "COLUMNS": "200"} | env,
        stdin=subprocess.DEVNULL, start_new_session=True, capture_output=True, text=True, check=False,
        timeout=120,
    )  # fmt: skip


def test_in_python_a_new_key_is_told_of_and_a_terminal_shows_progress(tmp_path: Path) -> None:
    model = families.make("llama", tmp_path / "model", num_hidden_layers=1)
    program = "import sys, sliplm; sliplm.split(sys.argv[1], sys.argv[2], sliplm.Recipe(rank=2), i_know=True)"
    env = {**os.environ, "SLIPLM_KEY_FILE": str(tmp_path / "key"), "COLUMNS": "200", "TERM": "xterm"}
    for tried, wanted in (("a", 1), ("b", 0)):
        master, terminal = pty.openpty()
        child = subprocess.Popen(
            [sys.executable, "-c", program, model, tmp_path / tried],
            env=env, stdin=subprocess.DEVNULL, stdout=terminal, stderr=terminal,
        )  # fmt: skip
        os.close(terminal)
        text = b""
        with contextlib.suppress(OSError):  # EIO: the child has closed it
            while piece := os.read(master, 1 << 16):
                text += piece
        os.close(master)
        assert child.wait(60) == 0, text.decode()
        assert text.decode().count(f"{tmp_path / 'key'} was made just now. Keep a copy of it") == wanted
        assert b"splitting" in text and b"groups" in text
    done = subprocess.run(
        [sys.executable, "-c", program, model, tmp_path / "c"], env=env, capture_output=True, timeout=120,
        check=True,
    )  # fmt: skip
    assert done.stdout + done.stderr == b""


def test_slip_split_says_which_key_it_used_and_that_a_new_one_needs_a_copy(tmp_path: Path) -> None:
    model = families.make("llama", tmp_path / "model", num_hidden_layers=1)
    mine = {"SLIPLM_KEY_FILE": str(tmp_path / "key")}
    assert "is not a folder" in slip("split", tmp_path / "nothing", tmp_path / "a", **mine).stderr
    assert not (tmp_path / "key").exists()
    done = slip("split", model, tmp_path / "a", "--rank", 2, **mine)
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path / 'key'} was made just now. Keep a copy of it" in done.stderr
    assert f"sealed with the key from {tmp_path / 'key'}" in done.stderr
    done = slip("split", model, tmp_path / "b", "--rank", 2, "--i-know", **mine)
    assert "made just now" not in done.stderr
    assert f"sealed with the key from {tmp_path / 'key'}" in done.stderr
    secret = (tmp_path / "key").read_text().strip()
    assert secret not in done.stderr + done.stdout
    for name in ("a", "b"):
        assert open_vault(tmp_path / name / "vault", f"file:{tmp_path / 'key'}").groups
        with pytest.raises(SealError):
            open_vault(tmp_path / name / "vault")


def test_slip_takes_a_key(tmp_path: Path) -> None:
    model = families.make("llama", tmp_path / "model", num_hidden_layers=1)
    (model / "tokenizer.json").write_text("{}")  # without one it would be told so before any key is read
    key = ("--key", "passphrase:env:GOOD")
    done = slip("split", model, tmp_path / "out", "--rank", 2, *key, GOOD="correct horse")
    assert done.returncode == 0, done.stderr
    assert "sealed with the passphrase from env:GOOD" in done.stderr
    shown = slip("inspect", tmp_path / "out", "--json")  # needs no key
    assert json.loads(shown.stdout)["sealed"].startswith("with a passphrase (Argon2id: 262144 KiB")
    generate = ("generate", tmp_path / "out", "--prompt", "x", "--json")
    for words, env, said in (
        (key, {"GOOD": "correct hose"}, "SealError"),
        ((), {}, "SealError"),
        (("--key", "passphrase"), {}, "CredentialError"),  # no terminal
        (("--key", KEY.hex()), {}, "CredentialError"),
    ):
        done = slip(*generate, *words, **env)
        assert done.returncode == 2, done.stderr
        assert json.loads(done.stdout.splitlines()[-1])["error"] == said
        assert "hose" not in done.stderr
        assert KEY.hex() not in done.stderr + done.stdout


# --- transformers ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split of a checkpoint whose config.json does not say its dtype, sealed with KEY."""
    folder = tmp_path_factory.mktemp("sealed")
    model = families.make("llama", folder / "model", num_hidden_layers=1, dtype=torch.bfloat16)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "dtype"}))
    split(model, folder / "out", Recipe(rank=2), key=KEY)
    return folder / "out"


@pytest.fixture(autouse=True)
def own_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Other processes of this machine may use the usual one.  (A socket's path has to be short.)"""
    with tempfile.TemporaryDirectory(prefix="s") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield


def left_behind() -> set[str]:
    return {path.name for path in Path(tempfile.gettempdir()).iterdir()} | {
        target for target in map(_target, Path("/proc/self/fd").iterdir()) if "memfd:sliplm" in target
    }


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:
        return ""


def test_from_pretrained_opens_a_sealed_folder(
    out: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    before = left_behind()
    original = AutoModelForCausalLM.from_pretrained(out.parent / "model", dtype=torch.bfloat16)
    with LocalWorker(out / "worker") as worker:
        config = SlipConfig(workers=[worker.address], key=KEY)
        with pytest.warns(UserWarning, match="loading attributes"):  # transformers' own; it names no values
            model = AutoModelForCausalLM.from_pretrained(
                out / "vault", quantization_config=config, dtype="auto"
            )
        try:
            assert model.dtype == torch.bfloat16
            assert torch.equal(model.model.embed_tokens.weight, original.model.embed_tokens.weight)
            assert torch.equal(model.model.norm.weight, original.model.norm.weight)
            assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
            said = repr(model.config) + repr(model.config.to_dict()) + repr(config) + repr(model)
            said += repr(model.hf_quantizer.quantization_config.__dict__) + repr(vars(config)) + caplog.text
            for secret in (KEY, open_seal(out / "vault", KEY)):
                assert secret.hex() not in said
                assert repr(secret) not in said
            assert model.config.to_dict()["quantization_config"] == {"quant_method": "slip"}
            assert model.hf_quantizer.quantization_config.key is None
        finally:
            model.slip.close()
        key_file = out.parent / "key"
        key_file.write_text(KEY.hex())
        key_file.chmod(0o600)
        monkeypatch.setenv("SLIPLM_KEY_FILE", str(key_file))
        monkeypatch.setenv("SLIPLM_WORKERS", worker.address)
        AutoModelForCausalLM.from_pretrained(out / "vault").slip.close()
        load(out / "vault", [worker.address], f"file:{key_file}").slip.close()
    assert left_behind() == before


def test_a_wrong_or_missing_key_does_not_load(
    out: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = left_behind()
    with pytest.raises(SealError, match="another key"):
        reference(out, key=OTHER)
    monkeypatch.setenv("SLIPLM_KEY_FILE", str(tmp_path / "none"))
    with pytest.raises(CredentialError, match="there is no key file"):
        reference(out)
    assert not (tmp_path / "none").exists()
    for key in (b"short", "hex:00", 7):
        with pytest.raises(CredentialError):
            SlipConfig(key=key)  # type: ignore[arg-type]
        with pytest.raises(CredentialError):
            load(out / "vault", ["127.0.0.1:1"], key)  # type: ignore[arg-type]
    gc.collect()
    assert left_behind() == before


def test_loading_that_fails_halfway_leaves_nothing(out: Path) -> None:
    before = left_behind()
    share = open_vault(out / "vault", KEY)
    model = OpenedModel(share)
    assert left_behind() > before
    with Path(model.path).open("rb") as file:
        assert file.read(8) != bytes(8)
    assert Path(model.path).is_symlink()
    del model  # as when transformers raises
    gc.collect()
    assert left_behind() == before
    damaged = shutil.copytree(out / "vault", out.parent / "damaged")
    share = open_vault(damaged, KEY)
    path = damaged / "model.safetensors"  # after it was verified
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(SealError, match=r"model\.safetensors/.* was altered"):
        OpenedModel(share)
    os.truncate(path, len(data) - 1)
    with pytest.raises(SlipError, match=r"model\.safetensors"):
        OpenedModel(share)
    assert left_behind() == before


def test_keys_for_different_uses_differ(out: Path) -> None:
    share = open_vault(out / "vault", KEY)
    uses = {
        derive_key(share.data_key, "manifest"),
        share.pool_key("manifest"),
        share.pool_key(""),
        share.data_key,
    }
    assert len(uses) == 4
