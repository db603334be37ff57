"""Small share folders in memory, for targets that replace one file of them."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path

import numpy as np

from sliplm.shares.contents import sealed_spec, secret_tensors
from sliplm.shares.manifest import (
    Attention,
    KeptTensor,
    Member,
    SourceModel,
    VaultGroup,
    VaultManifest,
    WorkerGroup,
    WorkerManifest,
)
from sliplm.shares.recipe import Recipe
from sliplm.shares.sealing import make_seal, seal_blob, seal_manifest
from sliplm.shares.share import MANIFEST, MODEL, SHARE, record
from sliplm.shares.splitting import split_group
from sliplm.shares.tensorfile import SafetensorsWriter, TensorSpec

SPLIT_ID = "5a" * 16
KEY = bytes(range(32))
SHAPES = {"block.0.attn": (6, 4), "block.0.mlp": (3, 5)}


def scratch() -> Path:
    """A folder of this process, in memory where there is such a thing."""
    memory = Path("/dev/shm")
    made = Path(tempfile.mkdtemp(prefix="sliplm-fuzz-", dir=memory if memory.is_dir() else None))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def worker_folder(folder: Path, matrices: dict[str, np.ndarray] | None = None) -> Path:
    """A worker's share, of these matrices; else the same in every run."""
    folder.mkdir()
    generator = np.random.default_rng(3)
    specs = [TensorSpec(name, "I16", shape) for name, shape in SHAPES.items()]
    with SafetensorsWriter(folder / SHARE, specs) as file:
        for name, shape in SHAPES.items():
            w = generator.integers(-2047, 2048, shape) if matrices is None else matrices[name]
            file.write(name, w.astype(np.int16))
    (folder / MANIFEST).write_bytes(worker_manifest(folder))
    return folder


def worker_manifest(folder: Path) -> bytes:
    """The manifest that vouches for the share in this folder, whatever it is."""
    groups = tuple(WorkerGroup(name=name, rows=m, columns=n, dtype="I16") for name, (m, n) in SHAPES.items())
    manifest = WorkerManifest(split_id=SPLIT_ID, groups=groups, files={SHARE: record(folder / SHARE)})
    return manifest.model_dump_json().encode()


def vault_folder(folder: Path, worker: Path | None = None) -> Path:
    """A vault's share, sealed with KEY; the worker's that belongs to it goes to `worker`."""
    folder.mkdir()
    data_key = make_seal(folder, KEY)
    generator = np.random.default_rng(3)
    groups, secrets, matrices = [], {}, {}
    for name, (m, n) in SHAPES.items():
        made = split_group(
            name, generator.standard_normal((m, n)).astype(np.float32), rank=1, precision=12, rotation="haar"
        )
        secrets |= secret_tensors(made.secrets)
        matrices[name] = made.w
        groups.append(
            VaultGroup(
                name=name, rows=m, columns=n, dtype="I16", members=(Member(name, m),), rank=1, precision=12,
                rotation="haar", error=made.error, svd_error=made.svd_error,
            )
        )  # fmt: skip
    kept = np.arange(12, dtype=np.float32).reshape(3, 4)
    spec = KeptTensor(name="embedding", dtype="F32", shape=kept.shape)
    if worker is not None:
        worker_folder(worker, matrices)
    write_sealed(folder / SHARE, data_key, secrets)
    write_sealed(folder / MODEL, data_key, {"embedding": kept})
    (folder / "config.json").write_text("{}", encoding="utf-8")
    names = (SHARE, MODEL, "config.json")
    manifest = VaultManifest(
        split_id=SPLIT_ID, sliplm="0", source=SourceModel(name="toy", config_class="Toy", parameters=51),
        recipe=Recipe(), groups=tuple(groups), kept=(), kept_tensors=(spec,), kept_bytes=0,
        attention=(Attention(heads=1, head_dim=4),), files={name: record(folder / name) for name in names},
        worker_files={},
    )  # fmt: skip
    text = manifest.model_dump_json().encode()
    (folder / MANIFEST).write_bytes(text)
    seal_manifest(folder, data_key, text)
    return folder


def write_sealed(path: Path, data_key: bytes, tensors: dict[str, np.ndarray]) -> None:
    """A file of the vault."""
    plain = [TensorSpec(name, "U8", (array.nbytes,)) for name, array in tensors.items()]
    with SafetensorsWriter(path, [sealed_spec(spec) for spec in plain]) as file:
        for name, array in tensors.items():
            pieces = [np.ascontiguousarray(array).tobytes()]
            file.write_bytes(name, b"".join(seal_blob(data_key, f"{path.name}/{name}", pieces)))
