"""Run a split PyTorch module: the owner's own module class, its weights from the vault and the workers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from sliplm.engines.modules import (
    Closeable,
    GroupProduct,
    Products,
    derive,
    refuse_in_children,
    refuse_script,
)
from sliplm.engines.torch.convert import TYPES
from sliplm.engines.torch.trace import named_parameters, persistent_buffers
from sliplm.engines.torch.weights import SplitWeight
from sliplm.engines.transformers.load import Running
from sliplm.engines.transformers.quantizer import Folder, SlipConfig, connect, open_shares
from sliplm.errors import InputError, ShareError
from sliplm.parties.local_products import LocalProducts
from sliplm.parties.local_worker import LocalWorker
from sliplm.shares.folders import check_folder
from sliplm.shares.keysource import KeySpec
from sliplm.shares.manifest import PLAIN_MODULE
from sliplm.shares.share import MODEL, VaultShare, open_tensors


def load_module(
    skeleton: nn.Module,
    vault_dir: Folder,
    workers: Sequence[str],
    key: KeySpec = None,
    **options: Unpack[Running],
) -> nn.Module:
    """Turn a module of the class that was split into the hybrid: its split layers ask the workers.

    Its vault is `module.slip` (`counters`, `deal`); `module.close()`, the end of a `with` block, or the last
    reference to the module closes it.  The module is in evaluation mode, without gradients.  It is changed
    only when everything has been opened and fits.

    Args:
        skeleton: built as the original was; its values do not matter, and it may lie on the meta device.
        vault_dir: the folder `vault` that `split_module` wrote.
        workers: addresses of workers that hold its worker share.
        key: what the vault share is sealed with; None takes the user's key file.
        options: as `sliplm.load` takes them.

    Returns: `skeleton`.

    Raises:
        InputError: an argument cannot be used.
        ShareError: a folder is missing or damaged, or the skeleton is of another model.
        CredentialError, SealError, MaskError, WorkerError: as `sliplm.load`.
    """
    unknown = set(options) - set(Running.__annotations__)
    if unknown:
        raise InputError(f"load_module has no option {', '.join(sorted(unknown))}; see SlipConfig")
    config = SlipConfig(workers=workers, key=key, **options)
    vault, worker = open_shares(Path(vault_dir), config)
    fitted = _fit(skeleton, vault)
    tensors = _kept(vault)
    _fill(skeleton, fitted, tensors, connect(config, vault, worker))
    return skeleton


def open_module(skeleton: nn.Module, out_dir: Folder, **options: Any) -> Any:
    """Run a split module on this machine: `out_dir/worker` in a worker process, `out_dir/vault` here.

    It closes as the model of `sliplm.open` does.

    Returns: `skeleton`, which has `close` now and can stand in a with block.

    Raises:
        what `load_module` and `LocalWorker` raise.
    """
    out_dir = Path(out_dir)
    check_folder(out_dir, None)
    with ExitStack() as stack:
        worker = stack.enter_context(LocalWorker(out_dir / "worker"))
        module: Any = load_module(skeleton, out_dir / "vault", [worker.address], **options)
        module.slip.close_with_it(worker)
        stack.pop_all()
    return skeleton


def reference_module(
    skeleton: nn.Module, out_dir: Folder, *, key: KeySpec = None, inputs: int = 1
) -> nn.Module:
    """The quantised module that a split stands for, from both shares in this process, without a worker.

    The hybrid, with the same `inputs`, gives the same numbers, bit for bit: this is the yardstick.  It
    protects nothing.

    Raises:
        CredentialError, SealError, ShareError: as `load_module`.
    """
    vault, worker = open_shares(Path(out_dir) / "vault", SlipConfig(key=key))
    if worker is None:
        raise InputError("the reference needs the worker share")
    fitted = _fit(skeleton, vault)
    _fill(skeleton, fitted, _kept(vault), LocalProducts(vault, worker, inputs=inputs))
    return skeleton


class _Place(NamedTuple):
    """A split parameter of the skeleton."""

    parameter: str
    group: str
    number: int


def _fit(skeleton: nn.Module, vault: VaultShare) -> tuple[_Place, ...]:
    """Find every tensor of the share in the skeleton; nothing is changed.

    Raises:
        ShareError: the folder is no module's, or the skeleton is of another model.
    """
    if vault.manifest.source.config_class != PLAIN_MODULE:
        raise ShareError(f"{vault.path} is the vault of a checkpoint folder: load it with sliplm.load")
    parameters, _ = named_parameters(skeleton)
    buffers = persistent_buffers(skeleton)
    places, shapes = [], {name: tuple(t.shape) for name, t in (*parameters.items(), *buffers.items())}
    for group in vault.manifest.groups:
        for index, member in enumerate(group.members):
            name = next((n for n in (f"{member.module}.weight", member.module) if n in parameters), None)
            size = () if name is None else shapes.pop(name, ())
            if name is None or size[:1] != (member.rows,) or parameters[name][0].numel() != group.columns:
                raise _other(vault, f"{member.module} of {member.rows} x {group.columns}")
            places.append(_Place(name, group.name, index))
    for tensor in vault.manifest.kept_tensors:
        if shapes.pop(tensor.name, None) != tensor.shape:
            raise _other(vault, f"{tensor.name} {list(tensor.shape)}")
    if shapes:
        raise ShareError(
            f"{vault.path} lacks {next(iter(shapes))}, which the module has: it is of another model; "
            "build the module as it was when it was split"
        )
    loose = [name for name, buffer in skeleton.named_buffers() if name not in buffers and buffer.is_meta]
    if loose:
        raise InputError(
            f"{loose[0]} has no values on the meta device and is not part of the state: build the module "
            "on the CPU"
        )
    return tuple(places)


def _other(vault: VaultShare, what: str) -> ShareError:
    return ShareError(
        f"the module has no {what}, which {vault.path} holds: it is of another model; build the module as it "
        "was when it was split"
    )


def _kept(vault: VaultShare) -> dict[str, Tensor]:
    """What the vault keeps whole, decrypted."""
    specs = {tensor.name: tensor.spec for tensor in vault.manifest.kept_tensors}
    raw = {name: np.empty(spec.nbytes, np.uint8) for name, spec in specs.items()}
    open_tensors(vault.path / MODEL, vault.data_key, specs, {name: a.data for name, a in raw.items()})
    types = {code: dtype for dtype, code in TYPES.items()}
    return {
        name: torch.from_numpy(raw[name]).view(types[spec.dtype]).reshape(spec.shape)
        for name, spec in specs.items()
    }


def _fill(
    module: nn.Module, places: Sequence[_Place], tensors: Mapping[str, Tensor], source: Products
) -> None:
    """Put the tensors and the split weights in place, under all their names."""
    parameters, tied = named_parameters(module)
    names: dict[str, list[str]] = {name: [name] for name in parameters}
    for other, name in tied.items():
        names[name].append(other)
    for place, weight in _weights(module, places, source):
        for name in names[place.parameter]:
            owner, leaf = _owner(module, name)
            delattr(owner, leaf)
            setattr(owner, leaf, weight)
            owner.__prepare_scriptable__ = refuse_script  # type: ignore[assignment]
    for name, tensor in tensors.items():
        new = nn.Parameter(tensor, requires_grad=False) if name in names else tensor
        for other in names.get(name, [name]):
            owner, leaf = _owner(module, other)
            setattr(owner, leaf, new)
    module.requires_grad_(False)
    module.train(False)
    module.slip = source  # type: ignore[assignment]
    refuse_in_children(module)
    derive(module, Closeable, {})


def _weights(
    module: nn.Module, places: Sequence[_Place], source: Products
) -> Iterator[tuple[_Place, SplitWeight]]:
    groups: dict[str, list[_Place]] = {}
    for place in places:
        groups.setdefault(place.group, []).append(place)
    for name, members in groups.items():
        weights = [module.get_parameter(place.parameter) for place in members]
        group = GroupProduct(name, [weight.shape[0] for weight in weights], source)
        for place, weight in zip(members, weights, strict=True):
            yield place, SplitWeight(weight.shape, weight.dtype, group, place.number)


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, leaf = name.rpartition(".")
    return module.get_submodule(parent), leaf
