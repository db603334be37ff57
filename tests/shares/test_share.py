"""The two artefacts on disk: whatever is missing, altered or mixed up is noticed."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import families
from sliplm.engines.transformers.convert import split
from sliplm.errors import MismatchError, SealError, ShareError
from sliplm.shares.contents import sealed_spec, secret_specs, worker_spec
from sliplm.shares.manifest import ExpertOf, Member, VaultGroup, WorkerGroup, WorkerManifest
from sliplm.shares.recipe import Recipe, Rule
from sliplm.shares.share import (
    MAX_MANIFEST_BYTES,
    check_pair,
    open_vault,
    open_worker,
    read_vault_manifest,
    record,
)
from sliplm.shares.tensorfile import (
    MAX_HEADER_BYTES,
    HeaderLimit,
    SafetensorsWriter,
    TensorSpec,
    map_file,
    read_header,
)

SRC = Path(__file__).parents[2] / "src"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two splits of one model."""
    folder = tmp_path_factory.mktemp("share")
    model = families.make("llama", folder / "model", num_hidden_layers=1)
    rules = (Rule(pattern="*.o_proj", precision=8), Rule(pattern="*.down_proj", rank=0))
    for name in ("one", "two"):
        split(model, folder / name, Recipe(rank=3, rules=rules), i_know=True)
    return folder


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """A copy of the first split, to be damaged."""
    shutil.copytree(made / "one", tmp_path / "out")
    return tmp_path / "out"


def test_what_is_read_is_what_was_written(made: Path) -> None:
    vault, worker = open_vault(made / "one" / "vault"), open_worker(made / "one" / "worker")
    check_pair(vault, worker)
    assert vault.split_id == worker.split_id
    assert len(bytes.fromhex(vault.split_id)) == 16
    assert tuple(vault.groups) == tuple(vault.members) == worker.names == tuple(worker.matrices)
    for name, secrets in vault.groups.items():
        w = worker.matrices[name]
        k = 0 if name.endswith("down_proj") else 3
        assert w.shape == (secrets.m, secrets.n)
        assert w.dtype == (np.int8 if name.endswith("o_proj") else np.int16)
        assert not w.flags.writeable
        assert (secrets.a.shape, secrets.b.shape) == ((secrets.m, k), (k, secrets.n))
        assert {secrets.a.dtype, secrets.b.dtype, secrets.scale.dtype} == {np.dtype(np.float32)}
        assert (secrets.c.dtype, secrets.c.shape) == (np.dtype(np.uint32), (8, secrets.n))
        assert len(secrets.seed) == 32
        assert sum(member.rows for member in vault.members[name]) == secrets.m


def test_the_worker_learns_names_shapes_and_types_only(made: Path) -> None:
    worker = made / "one" / "worker"
    assert sorted(file.name for file in worker.iterdir()) == ["manifest.json", "share.safetensors"]
    manifest = json.loads((worker / "manifest.json").read_text())
    assert set(manifest) == {"format", "version", "split_id", "groups", "files"}
    assert all(set(group) == {"name", "rows", "columns", "dtype"} for group in manifest["groups"])
    tensors = load_file(worker / "share.safetensors")
    assert set(tensors) == {group["name"] for group in manifest["groups"]}
    assert {t.dtype for t in tensors.values()} == {np.dtype(np.int8), np.dtype(np.int16)}


def test_only_the_owner_can_read_the_vault(made: Path) -> None:
    vault = made / "one" / "vault"
    assert stat.S_IMODE(vault.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in vault.iterdir()} == {0o600}


def test_secrets_hide_themselves(made: Path) -> None:
    vault = open_vault(made / "one" / "vault")
    seed = next(iter(vault.groups.values())).seed
    assert "secrets hidden" in repr(vault)
    assert seed.hex() not in repr(vault) + repr(vault.groups)
    assert vault.data_key.hex() not in repr(vault)
    assert repr(vault.data_key) not in repr(vault)
    assert repr(seed) not in repr(vault.groups)


def test_secrets_for_pools_differ_by_label_and_split(made: Path) -> None:
    one, two = (open_vault(made / name / "vault") for name in ("one", "two"))
    keys = {share.pool_key(label) for share in (one, two) for label in ("a", "b")}
    assert {len(key) for key in keys} == {32}
    assert len(keys) == 4
    assert one.pool_key("a") == open_vault(made / "one" / "vault").pool_key("a")
    assert not keys & {one.data_key, two.data_key}


def test_a_vault_file_holds_its_tensors_sealed_under_their_names(made: Path) -> None:
    vault = open_vault(made / "one" / "vault")
    sealed = load_file(made / "one" / "vault" / "share.safetensors")
    assert {name.rsplit("/", 1)[0] for name in sealed} == set(vault.groups)
    assert {tensor.dtype for tensor in sealed.values()} == {np.dtype(np.uint8)}
    group = next(iter(vault.groups.values()))
    assert sealed[f"{group.name}/seed"].shape == (32 + 32 + 16,)
    assert sealed[f"{group.name}/a"].nbytes == group.a.nbytes + 32 + 16


def test_a_manifest_that_was_not_sealed_is_refused(made: Path, out: Path) -> None:
    path = out / "vault" / "manifest.json"
    text = path.read_text()
    path.write_text(text + " ")
    with pytest.raises(SealError, match="not the one that was sealed"):
        open_vault(out / "vault")
    shutil.copy(made / "two" / "vault" / "manifest.json", path)
    with pytest.raises(SealError, match="not the one that was sealed"):
        open_vault(out / "vault")


def test_the_workers_side_needs_no_torch(made: Path) -> None:
    code = (
        "import sys; from sliplm.shares.share import open_worker; open_worker(sys.argv[1]); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    run = [sys.executable, "-c", code, str(made / "one" / "worker")]
    assert (
        subprocess.run(run, check=False, env={**os.environ, "PYTHONPATH": str(SRC)}, timeout=120).returncode
        == 0
    )


def _remove(path: Path) -> None:
    path.unlink()


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _empty(path: Path) -> None:
    os.truncate(path, 0)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


HARM = (_remove, _truncate, _empty, _flip, _replace_by_folder)


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("name", ["share.safetensors", "model.safetensors", "config.json"])
def test_a_damaged_vault_file_is_named(out: Path, name: str, harm: Callable[[Path], None]) -> None:
    harm(out / "vault" / name)
    with pytest.raises(ShareError, match=name):
        open_vault(out / "vault")


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_worker_file_is_named(out: Path, harm: Callable[[Path], None]) -> None:
    harm(out / "worker" / "share.safetensors")
    with pytest.raises(ShareError, match=r"worker/share\.safetensors"):
        open_worker(out / "worker")


@pytest.mark.parametrize("side", ["vault", "worker"])
@pytest.mark.parametrize("harm", [_remove, _truncate, _empty, _replace_by_folder])
def test_a_damaged_manifest_is_named(out: Path, side: str, harm: Callable[[Path], None]) -> None:
    harm(out / side / "manifest.json")
    with pytest.raises(ShareError, match=rf"{side}(/| has no )manifest\.json"):
        {"vault": open_vault, "worker": open_worker}[side](out / side)


@pytest.mark.parametrize("side", ["vault", "worker"])
@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"format": "other"}, "format"),
        ({"version": 4}, "version"),
        ({"version": 1}, "older release.*split again"),
        ({"version": 2}, "older release.*split again"),
        ({"extra": 1}, "extra"),
        ({"split_id": "xyz"}, "split_id"),
        ({"files": {"../secret": {"bytes": 1, "sha256": "00"}}}, "files"),
        ({"files": {}}, "no digest"),
        ({"groups": []}, "does not hold|share.safetensors"),
        ({"groups": [{"name": "a"}]}, "groups.0"),
    ],
)
def test_a_manifest_that_says_something_else(
    out: Path, side: str, change: dict[str, object], word: str
) -> None:
    path = out / side / "manifest.json"
    if side == "vault":
        families.sign_manifest(out / side, lambda manifest: manifest.update(change))
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ShareError, match=word):
        {"vault": open_vault, "worker": open_worker}[side](out / side)


def test_the_wrong_side_and_no_folder(out: Path) -> None:
    with pytest.raises(ShareError, match="is the worker's folder: give the vault's"):
        open_vault(out / "worker")
    with pytest.raises(ShareError, match="is the secret vault"):
        open_worker(out / "vault")
    with pytest.raises(ShareError, match="does not exist"):
        open_worker(out / "nowhere")


def test_a_manifest_has_a_size_limit(out: Path) -> None:
    os.truncate(out / "worker" / "manifest.json", 1 << 40)  # sparse: takes no room
    with pytest.raises(ShareError, match="no manifest"):
        open_worker(out / "worker")


# --- as many groups as the largest mixtures have -----------------------------------------------------------

LAYERS, EXPERTS = 58, 256  # DeepSeek-V3: 29,696 groups


def many_groups() -> tuple[VaultGroup, ...]:
    """Its experts by their names, with tiny matrices."""
    found = []
    for layer in range(3, 3 + LAYERS):
        module = f"model.layers.{layer}.mlp.experts"
        for weight, (rows, columns) in (("gate_up_proj", (4, 2)), ("down_proj", (2, 3))):
            for number in range(EXPERTS):
                place = f"{module}.{weight}.{number}"
                found.append(
                    VaultGroup(
                        name=place, rows=rows, columns=columns, dtype="I16", members=(Member(place, rows),),
                        rank=1, precision=12, rotation="fast", error=1.2345678901234567e-4,
                        svd_error=1.2345678901234567e-7, localisation=0.4312431243124312,
                        expert=ExpertOf(module, weight, number, 8 / EXPERTS),
                    )
                )  # fmt: skip
    return tuple(found)


def test_a_split_of_30_000_groups_is_read(out: Path) -> None:
    """Both manifests and both headers, and the worker's whole share, at DeepSeek-V3's count of experts."""
    groups = many_groups()
    worker, vault = out / "worker", out / "vault"
    with SafetensorsWriter(worker / "share.safetensors", map(worker_spec, groups), mode=0o644):
        pass
    seen = tuple(WorkerGroup(name=g.name, rows=g.rows, columns=g.columns, dtype=g.dtype) for g in groups)
    manifest = WorkerManifest(
        split_id="5a" * 16, groups=seen, files={"share.safetensors": record(worker / "share.safetensors")}
    )
    (worker / "manifest.json").write_text(manifest.model_dump_json())
    opened = open_worker(worker)
    assert len(opened.names) == 2 * LAYERS * EXPERTS == 29_696
    assert opened.matrices[opened.names[-1]].shape == (2, 3)

    whole = read_vault_manifest(vault).model_copy(update={"groups": groups})
    (vault / "manifest.json").write_text(whole.model_dump_json())
    assert 12 * 2**20 < (vault / "manifest.json").stat().st_size < MAX_MANIFEST_BYTES / 2
    assert read_vault_manifest(vault).groups == groups
    specs = {s.name: sealed_spec(s) for group in groups for s in secret_specs(group)}
    with SafetensorsWriter(vault / "share.safetensors", specs.values()) as file:
        size = file.size
    limit = HeaderLimit.of(specs.values())
    assert MAX_HEADER_BYTES < size - sum(spec.nbytes for spec in specs.values()) < limit.nbytes
    assert len(read_header(vault / "share.safetensors", limit=limit)) == 9 * len(groups)


def test_a_header_is_as_long_as_its_tensors_need_and_no_longer(out: Path) -> None:
    """What a manifest does not call for is refused before memory is taken for it."""
    path = out / "worker" / "share.safetensors"
    specs = [worker_spec(group) for group in open_worker(out / "worker").manifest.groups]
    limit, data = HeaderLimit.of(specs), path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert set(read_header(path, limit=limit)) == {spec.name for spec in specs}
    spaces = limit.nbytes - length
    for more, word in ((spaces, None), (spaces + 1, "too long")):
        path.write_bytes(
            (length + more).to_bytes(8, "little") + data[8 : 8 + length] + b" " * more + data[8 + length :]
        )
        if word is None:
            read_header(path, limit=limit)
        else:
            with pytest.raises(ValueError, match=word):
                read_header(path, limit=limit)
    header = b'{"a":{"dtype":"U8","shape":[' + b"1," * limit.items + b'1],"data_offsets":[0,1]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"x")
    with pytest.raises(ValueError, match="more than its tensors"):
        read_header(path, limit=HeaderLimit(len(header), limit.items))


@pytest.mark.parametrize("name", ["t", "\u00e9" * 40, "\U0001f512" * 30, '"\\' * 20, "x" * 300])
def test_every_header_that_is_written_is_within_the_limit_for_reading(tmp_path: Path, name: str) -> None:
    specs = [TensorSpec(name, "U32", (1,) * 7 + (3,)), TensorSpec(f"{name}2", "F8_E4M3", ((1 << 31) - 1, 0))]
    with SafetensorsWriter(tmp_path / "x", specs, metadata={"format": "pt", "sealed": "sliplm/1"}):
        pass
    assert set(read_header(tmp_path / "x", limit=HeaderLimit.of(specs))) == {spec.name for spec in specs}


def test_two_splits_do_not_mix(made: Path, out: Path) -> None:
    with pytest.raises(MismatchError, match="different splits"):
        check_pair(open_vault(made / "one" / "vault"), open_worker(made / "two" / "worker"))
    # an altered share under the right split's name, with a manifest to match
    share, manifest = out / "worker" / "share.safetensors", out / "worker" / "manifest.json"
    _flip(share)
    entry = json.loads(manifest.read_text())
    entry["files"]["share.safetensors"]["sha256"] = hashlib.sha256(share.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(entry))
    worker = open_worker(out / "worker")
    with pytest.raises(MismatchError, match="is not the file"):
        check_pair(open_vault(out / "vault"), worker)


# --- the tensor file ------------------------------------------------------------------------------------

DTYPES = {"I8": np.int8, "I16": np.int16, "U32": np.uint32, "F64": np.float64, "F32": np.float32}


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), min_size=1, max_size=3)),
        max_size=6,
    ),
    st.randoms(use_true_random=False),
)
def test_written_tensors_are_read_by_the_library_and_by_us(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[str, list[int]]], random: object
) -> None:
    path = tmp_path_factory.mktemp("w") / "x.safetensors"
    specs = [TensorSpec(f"t{i}", dtype, tuple(shape)) for i, (dtype, shape) in enumerate(shapes)]
    arrays = {
        s.name: (np.arange(np.prod(s.shape)).reshape(s.shape) * 7).astype(DTYPES[s.dtype]) for s in specs
    }
    order = list(arrays)
    random.shuffle(order)  # type: ignore[attr-defined]
    with SafetensorsWriter(path, specs, metadata={"format": "pt"}) as file:
        for name in order:
            file.write(name, arrays[name])
    theirs, entries = load_file(path), read_header(path)
    with path.open("rb") as file:
        ours = map_file(file, entries)
    assert set(theirs) == set(ours) == set(arrays)
    for name, array in arrays.items():
        assert np.array_equal(theirs[name], array)
        assert np.array_equal(ours[name], array)
        assert entries[name].start % array.itemsize == 0
        assert ours[name].dtype == array.dtype


def test_a_writer_takes_only_what_was_announced(tmp_path: Path) -> None:
    with SafetensorsWriter(tmp_path / "x", [TensorSpec("a", "F32", (2, 3))]) as file:
        for wrong in (np.zeros((3, 2), np.float32), np.zeros((2, 3), np.float64)):
            with pytest.raises(ValueError, match="announced"):
                file.write("a", wrong)
        with pytest.raises(ValueError, match="do not fit"):
            file.write_bytes("a", b"x" * 9, offset=16)
        file.write("a", np.arange(6, dtype=np.float32).reshape(3, 2).T.copy(order="F"))
    assert load_file(tmp_path / "x")["a"].tolist() == [[0, 2, 4], [1, 3, 5]]


def test_only_the_same_file_is_resumed(tmp_path: Path) -> None:
    specs = [TensorSpec("a", "U8", (4,))]
    with SafetensorsWriter(tmp_path / "x", specs, resume=True) as file:
        assert not file.resumed
        file.write("a", np.arange(4, dtype=np.uint8))
    with SafetensorsWriter(tmp_path / "x", specs, resume=True) as file:
        assert file.resumed
    assert load_file(tmp_path / "x")["a"].tolist() == [0, 1, 2, 3]
    with SafetensorsWriter(tmp_path / "x", [TensorSpec("b", "U8", (4,))], resume=True) as file:
        assert not file.resumed


def test_a_file_beyond_the_limit_leaves_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(ShareError, match=r"\d+ bytes needed, \d+ free"):
            SafetensorsWriter(tmp_path / "x", [TensorSpec("a", "U8", (2 << 20,))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_noise_is_no_tensor_file(tmp_path_factory: pytest.TempPathFactory, noise: bytes) -> None:
    path = tmp_path_factory.mktemp("n") / "x"
    path.write_bytes(len(noise).to_bytes(8, "little") + noise)
    with pytest.raises(ValueError, match="safetensors"):
        read_header(path)


def test_a_header_that_claims_too_much_is_refused_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="too long"):
        read_header(tmp_path / "x")
