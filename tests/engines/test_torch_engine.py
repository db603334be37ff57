"""Plain PyTorch modules: what is found in them, and hybrids that equal the quantised module, bit for bit."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

import families
import sliplm
from sliplm.engines.torch.convert import split_module
from sliplm.engines.torch.load import load_module, open_module, reference_module
from sliplm.engines.torch.patches import patches_of
from sliplm.engines.torch.trace import trace
from sliplm.engines.torch.weights import SplitWeight
from sliplm.errors import CheckpointError, InputError, LedgerError, RecipeError, ShareError, UnsplittableError
from sliplm.examples.digits import accuracy, digits, digits_skeleton, train_digits
from sliplm.examples.efficientnet import PHOTOGRAPHS, efficientnet_lite0, photographs, skeleton
from sliplm.parties.local_worker import LocalWorker
from sliplm.shares.recipe import Recipe, Rule
from sliplm.shares.share import open_worker, read_vault_manifest

RECIPE = Recipe(rank=2)


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A module in evaluation mode whose random weights are always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = make().eval()
        for buffer in module.buffers():  # batch norms as after training
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)
    return module


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


# --- convolutions as products --------------------------------------------------------------------------

pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@given(
    batch=st.sampled_from([None, 1, 2]),
    channels=st.integers(1, 3),
    rows=st.integers(1, 4),
    size=st.tuples(st.integers(7, 11), st.integers(7, 11)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    stride=pairs,
    padding=st.one_of(st.integers(0, 2), st.tuples(st.integers(0, 2), st.integers(0, 2)), st.just("valid")),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
)
def test_the_product_over_patches_is_the_convolution(
    batch: Any, channels: int, rows: int, size: Any, kernel: Any, stride: Any, padding: Any, dilation: Any
) -> None:
    x = normal(*([] if batch is None else [batch]), channels, *size).double()
    w = normal(rows, channels, *kernel).double()
    expected = F.conv2d(x, w, None, stride, padding, dilation)
    patches = patches_of(tuple(w.shape), stride, padding, dilation)
    assert patches.places(*size) == tuple(expected.shape[-2:])
    found = patches(x) @ w.reshape(rows, -1).T
    assert len(found) == patches.rows(tuple(x.shape))
    found = found.reshape(*expected.shape[:-3], *expected.shape[-2:], rows).movedim(-1, -3)
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@given(kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)), dilation=pairs)
def test_padding_to_the_same_size(kernel: Any, dilation: Any) -> None:
    x, w = normal(2, 2, 9, 10).double(), normal(3, 2, *kernel).double()
    expected = F.conv2d(x, w, padding="same", dilation=dilation)
    found = patches_of(tuple(w.shape), 1, "same", dilation)(x) @ w.reshape(3, -1).T
    torch.testing.assert_close(found.reshape(2, 9, 10, 3).movedim(-1, -3), expected)


# --- what is found -------------------------------------------------------------------------------------


class Padded(nn.Conv2d):
    """As EfficientNet's: pads to one side in its own forward."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class Odd(nn.Module):
    """Odd convolutions, a pair that reads one input, a weight with two names that is used three times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Padded(3, 8, (3, 2), stride=(2, 1), bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.left = nn.Conv2d(8, 6, 3, padding=(1, 2), dilation=(1, 2))
        self.right = nn.Conv2d(8, 6, 3, padding=(1, 2), dilation=(1, 2), bias=False)
        self.narrow = nn.Conv2d(8, 6, 1)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.mirrored = nn.Conv2d(6, 5, 3, padding=1, padding_mode="reflect")
        self.twice = nn.Linear(5, 5)
        self.tied = nn.Linear(5, 5, bias=False)
        self.tied.weight = self.twice.weight
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = self.left(x) + self.right(x) * self.narrow(x)
        x = self.mirrored(self.depthwise(x)).mean((-2, -1))
        x = self.twice(torch.tanh(self.twice(x)))
        return self.head(self.tied(x))


class Whole(nn.Module):
    """Layers that cannot be split, and one that can."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.normed = weight_norm(nn.Linear(8, 8))
        self.raw = nn.Parameter(torch.randn(8, 8))
        self.unused = nn.Linear(8, 3)
        self.table = nn.Linear(8, 20, bias=False)
        self.table.weight = self.embedding.weight

    def forward(self, tokens: Tensor, *, scale: float = 1.0) -> Tensor:
        x = self.encoder(self.embedding(tokens))
        x, _ = self.lstm(x)
        return self.table(self.normed(x) @ self.raw.T) * scale


def test_groups_of_convolutions() -> None:
    traced = trace(seeded(Odd), normal(2, 3, 12, 9))
    found = {group.name: (group.rows, group.columns, group.positions) for group in traced.groups}
    assert found == {
        "stem": (8, 18, 2 * 6 * 9),
        "left+right": (12, 72, 2 * 6 * 9),
        "narrow": (6, 8, 2 * 6 * 9),
        "mirrored": (5, 54, 2 * 6 * 9),
        "twice": (5, 5, 6),  # three calls, one of them under another name
        "head": (4, 5, 2),
    }
    assert [(group.name, reason) for group, reason in traced.whole] == [
        ("depthwise", "it is used by a convolution in 6 groups, which is as many small matrices")
    ]
    assert traced.tied == {"tied.weight": "twice.weight"}


def test_what_cannot_be_split_says_why() -> None:
    traced = trace(seeded(Whole), {"tokens": torch.tensor([[1, 2, 3]]), "scale": 2.0})
    assert [group.name for group in traced.groups] == ["encoder.linear1", "encoder.linear2"]
    reasons = {group.name: reason for group, reason in traced.whole}
    assert reasons.pop("raw") == "it is used by T"  # its transpose
    assert reasons.pop("unused") == "it took no part in the forward pass"
    assert reasons.pop("embedding") == "it is used by embedding"
    assert reasons.pop("lstm.weight_ih_l0") == "it is used by lstm"
    assert reasons.pop("encoder.self_attn.in_proj_weight") == "it is used by multi_head_attention_forward"
    assert "_weight_norm" in reasons.pop("normed.parametrizations.weight.original1")
    assert set(reasons) == {
        "encoder.self_attn.out_proj", "lstm.weight_hh_l0", "normed.parametrizations.weight.original0"
    }  # fmt: skip


def test_a_module_is_not_changed_by_a_trace() -> None:
    module = seeded(Odd)
    before = copy.deepcopy(module.state_dict())
    with torch.inference_mode():  # tensors without versions
        groups = trace(module, normal(1, 3, 12, 9)).groups
    assert len(groups) == 6
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert all(parameter.requires_grad for parameter in module.parameters())


# --- hybrids -------------------------------------------------------------------------------------------


@dataclass
class Case:
    make: Callable[[], nn.Module]
    inputs: dict[str, Any]
    folder: Path
    report: Any
    original: nn.Module
    hybrid: Any
    reference: nn.Module


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4))


MODULES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "odd": (Odd, {"x": normal(2, 3, 12, 9)}),
    "whole": (Whole, {"tokens": torch.tensor([[1, 2, 3], [4, 5, 19]]), "scale": 0.5}),
    "small": (small, {"input": normal(5, 6)}),
    "root": (lambda: nn.Linear(6, 4), {"input": normal(5, 6)}),
}


@pytest.fixture(scope="module", params=MODULES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    make, inputs = MODULES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    original = seeded(make)
    report = split_module(original, inputs, folder, RECIPE)
    with open_module(seeded(make, seed=1), folder, timeout=20.0) as hybrid:
        reference = reference_module(seeded(make, seed=2), folder)
        yield Case(make, inputs, folder, report, original, hybrid, reference)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_hybrid_is_the_quantised_module(case: Case, mode: Any) -> None:
    with mode():
        found = case.hybrid(**case.inputs)
        assert torch.equal(found, case.reference(**case.inputs))
        expected = case.original(**case.inputs)
    assert (found - expected).norm() < 2e-3 * expected.norm()


def test_other_sizes_of_input(case: Case) -> None:
    inputs = {
        name: torch.cat([value, value.flip(-1)], -1) if name in ("x", "tokens") else value
        for name, value in case.inputs.items()
    }
    with torch.no_grad():
        assert torch.equal(case.hybrid(**inputs), case.reference(**inputs))


def test_the_hybrid_has_no_split_weight(case: Case) -> None:
    manifest = read_vault_manifest(case.folder / "vault")
    split = {member.module for group in manifest.groups for member in group.members}
    names = {name for name, _ in case.original.named_parameters()}
    names -= {f"{name}.weight" for name in split} | split  # a parameter of the module itself
    assert {name for name, _ in case.hybrid.named_parameters()} == names
    state = case.original.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in case.hybrid.state_dict().items())
    assert not case.hybrid.training
    assert not any(parameter.requires_grad for parameter in case.hybrid.parameters())


def test_the_worker_gets_integers_only(case: Case) -> None:
    worker = open_worker(case.folder / "worker")
    assert all(matrix.dtype.kind == "i" for matrix in worker.matrices.values())
    assert worker.names == tuple(g.name for g in case.report.groups if g.placement == "split")
    text = (case.folder / "worker" / "manifest.json").read_text()
    assert {"positions", "members", "recipe"}.isdisjoint(json.loads(text)["groups"][0])


def test_the_report_counts_one_call(tmp_path: Path) -> None:
    report = split_module(seeded(Odd), normal(1, 3, 12, 9), tmp_path, RECIPE)
    groups = {group.name: group for group in report.groups}
    assert groups["left+right"].plain_macs == 12 * 72 * 54
    assert groups["left+right"].bytes_to_worker == 4 * 72 * 54
    assert groups["twice"].positions == 3
    assert groups["depthwise"].plain_macs == groups["depthwise"].vault_macs.whole == 6 * 9 * 54
    assert "6 groups" in groups["depthwise"].reason
    assert report.exchanges == 6
    assert report.vault_macs.total == sum(group.vault_macs.total for group in report.groups)


def test_exchanges_are_shared_and_repeated(tmp_path: Path) -> None:
    module = seeded(Odd)
    split_module(module, normal(1, 3, 12, 9), tmp_path, RECIPE)
    with open_module(seeded(Odd), tmp_path, ahead=0) as hybrid, torch.no_grad():
        hybrid(normal(1, 3, 12, 9))
        counters = hybrid.slip.counters
        # stem, left and right together, narrow, mirrored, three times the shared weight, head
        assert counters.exchanges == 8
        assert counters.rows == 4 * 54 + 3 + 1
        assert counters.bytes_sent == 4 * (54 * (18 + 72 + 8 + 54) + 3 * 5 + 5)


def test_a_skeleton_without_memory(tmp_path: Path) -> None:
    original, x = seeded(Odd), normal(1, 3, 12, 9)
    split_module(original, x, tmp_path, RECIPE)
    with torch.device("meta"):
        bare = Odd()
    reference = reference_module(bare, tmp_path)
    assert not any(tensor.is_meta for tensor in reference.state_dict().values())
    with torch.no_grad():
        assert (reference(x) - original(x)).norm() < 2e-3 * original(x).norm()
    assert isinstance(bare.twice.weight, SplitWeight)
    assert bare.tied.weight is bare.twice.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types(tmp_path: Path, dtype: torch.dtype) -> None:
    original, x = seeded(small).to(dtype), normal(5, 6).to(dtype)
    split_module(original, x, tmp_path, RECIPE)
    with open_module(seeded(small).to(dtype), tmp_path) as hybrid, torch.no_grad():
        found = hybrid(x)
        assert found.dtype == dtype == hybrid[0].bias.dtype
        assert torch.equal(found, reference_module(seeded(small).to(dtype), tmp_path)(x))
        torch.testing.assert_close(found, original(x), rtol=0.02, atol=0.02)


def test_rules_place_layers_in_the_vault(tmp_path: Path) -> None:
    recipe = Recipe(
        rank=2, rules=(Rule(pattern="left+right", placement="vault"), Rule(pattern="head", rank=1))
    )
    report = split_module(seeded(Odd), normal(1, 3, 12, 9), tmp_path, recipe)
    groups = {group.name: group for group in report.groups}
    assert (groups["left+right"].placement, groups["left+right"].reason) == ("vault", "")
    assert groups["head"].rank == 1
    reference = reference_module(seeded(Odd, seed=5), tmp_path)
    assert torch.equal(reference.left.weight, seeded(Odd).left.weight)


def test_haar_and_no_rotation(tmp_path: Path) -> None:
    original, x = seeded(small), normal(5, 6)
    for kind in ("haar", "none"):
        split_module(original, x, tmp_path / kind, Recipe(rank=1, rotation=kind), i_know=True)
        with torch.no_grad():
            found = reference_module(seeded(small), tmp_path / kind)(x)
            assert (found - original(x)).norm() < 2e-3 * original(x).norm()


def test_a_second_split_of_a_module_is_refused(tmp_path: Path) -> None:
    original, x = seeded(small), normal(5, 6)
    split_module(original, x, tmp_path / "one", Recipe(rank=1))
    with pytest.raises(LedgerError, match="split before"):
        split_module(original, x, tmp_path / "two", Recipe(rank=2))
    assert not (tmp_path / "two" / "worker").exists()


# --- the paper's three ---------------------------------------------------------------------------------


def test_a_network_for_digits(tmp_path: Path) -> None:
    """Trained here, on real scans; its hybrid reads those that were held out as well as it does."""
    original = train_digits()
    _, held_out = digits()
    assert accuracy(original, held_out) > 0.9
    split_module(original, held_out.images[:1], tmp_path, Recipe(rank=8))
    with open_module(digits_skeleton(), tmp_path) as hybrid:
        reference = reference_module(digits_skeleton(), tmp_path)
        with torch.inference_mode():
            found, expected = hybrid(held_out.images), original(held_out.images)
            assert torch.equal(found, reference(held_out.images))
            assert torch.equal(found.argmax(1), expected.argmax(1))
            assert (found - expected).norm() < 1e-3 * expected.norm()
        assert accuracy(hybrid, held_out) == accuracy(original, held_out)


def test_efficientnet_on_photographs(tmp_path: Path) -> None:
    """At 64 pixels through a worker; what it sees there is the original's opinion, right or wrong."""
    original, x = efficientnet_lite0(64), photographs(64)
    report = split_module(original, x[:1], tmp_path, Recipe(rank=8))
    whole = {g.name: g.reason for g in report.groups if g.placement == "vault"}
    assert len(whole) == 16 and all("_depthwise_conv" in name for name in whole)
    assert all("groups" in reason for reason in whole.values())
    with open_module(skeleton(64), tmp_path) as hybrid, torch.inference_mode():
        found, expected = hybrid(x), original(x)
        assert torch.equal(found, reference_module(skeleton(64), tmp_path)(x))
    assert (found - expected).norm() < 1e-2 * expected.norm()
    assert torch.equal(found.argmax(1), expected.argmax(1))
    # at full size, where the network is right
    with torch.inference_mode():
        large = reference_module(skeleton(224), tmp_path)(photographs(224))
    assert large.argmax(1).tolist() == list(PHOTOGRAPHS.values())


# --- errors --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    split_module(seeded(small), normal(1, 6), folder, RECIPE)
    return folder


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(6, 9)), "no 2 of 4 x 9"),
        (lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 5)), "no 2 of 4 x 9"),
        (lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4, bias=False)), r"no 2.bias \[4\]"),
        (lambda: nn.Sequential(*small(), nn.BatchNorm1d(4)), "lacks 3.weight"),
        (lambda: nn.ReLU(), "of another model"),
    ],
    ids=["fewer", "rows", "bias", "more", "nothing"],
)
def test_the_skeleton_of_another_model(plain: Path, other: Any, message: str) -> None:
    module = other().eval()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ShareError, match=message):
        reference_module(module, plain)
    assert module.state_dict().keys() == before.keys()
    assert not any(isinstance(getattr(child, "weight", None), SplitWeight) for child in module.modules())


def test_a_skeleton_stays_as_it_is_when_no_worker_is_there(plain: Path, tmp_path: Path) -> None:
    module = seeded(small)
    with pytest.raises(sliplm.errors.WorkerError):
        load_module(module, plain / "vault", [f"unix:{tmp_path}/none.sock"])
    assert isinstance(module[0].weight, nn.Parameter)
    assert not hasattr(module, "slip")


def test_a_vault_of_another_kind(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ShareError, match="load_module"):
        sliplm.load(plain / "vault", ["127.0.0.1:1"])
    sliplm.split(families.make("llama", tmp_path / "model", num_hidden_layers=1), tmp_path / "out", RECIPE)
    with pytest.raises(ShareError, match=r"sliplm\.load"):
        reference_module(seeded(small), tmp_path / "out")


def test_what_cannot_be_loaded(plain: Path) -> None:
    with pytest.raises(InputError, match="list of addresses"):
        load_module(seeded(small), plain / "vault", "127.0.0.1:7400")
    with pytest.raises(InputError, match="no option speed"):
        load_module(seeded(small), plain / "vault", ["127.0.0.1:7400"], speed=3)  # type: ignore[call-arg]
    with pytest.raises(sliplm.errors.SealError, match="another key"):
        load_module(seeded(small), plain / "vault", ["127.0.0.1:7400"], key=bytes(32))


class Buffered(nn.Module):
    """Has values that are no part of its state."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.register_buffer("mask", torch.full((4,), float("-inf")))
        self.register_buffer("shift", torch.ones(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.maximum(self.linear(x), self.mask) + self.shift


def test_buffers(tmp_path: Path) -> None:
    original, x = Buffered().eval(), normal(3, 6)
    split_module(original, x, tmp_path, RECIPE)
    with torch.no_grad():
        found = reference_module(Buffered(), tmp_path)(x)
        assert (found - original(x)).norm() < 2e-3 * original(x).norm()
    with torch.device("meta"):
        bare = Buffered()
    with pytest.raises(InputError, match="shift has no values"):
        reference_module(bare, tmp_path)


def test_bad_modules(tmp_path: Path) -> None:
    x = normal(2, 6)
    with pytest.raises(InputError, match="training mode"):
        split_module(small(), x, tmp_path, RECIPE)
    with pytest.raises(InputError, match="tensors on meta"):
        split_module(seeded(small).to("meta"), x, tmp_path, RECIPE)
    with pytest.raises(InputError, match="cannot be run on its example inputs"):
        split_module(seeded(small), normal(2, 7), tmp_path, RECIPE)
    with pytest.raises(UnsplittableError, match="no linear layer or convolution"):
        split_module(seeded(lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm1d(6))), x, tmp_path, RECIPE)
    with pytest.raises(UnsplittableError, match="3 groups"):
        split_module(seeded(lambda: nn.Conv2d(6, 6, 1, groups=3)), normal(1, 6, 2, 2), tmp_path, RECIPE)
    odd = Recipe(rank=2, rules=(Rule(pattern="nothing_such", rank=1),))
    with pytest.raises(RecipeError, match="nothing_such"):
        split_module(seeded(small), x, tmp_path, odd)
    with pytest.raises(RecipeError, match="rank 5"):
        split_module(seeded(small), x, tmp_path, Recipe(rank=5))
    for place, value in ((0, float("nan")), (2, float("inf"))):
        damaged = seeded(small)
        with torch.no_grad():
            damaged[place].weight[0, 0] = value
        with pytest.raises(CheckpointError, match=f"{place}.weight holds NaN"):
            split_module(damaged, x, tmp_path, RECIPE)
    assert not list(tmp_path.iterdir())


def test_a_split_is_not_overwritten(plain: Path) -> None:
    with pytest.raises(ShareError, match="exists"):
        split_module(seeded(small), normal(1, 6), plain, RECIPE)


@pytest.mark.parametrize("same", [True, False])
def test_a_split_that_was_stopped(tmp_path: Path, same: bool) -> None:
    """It goes on with the same module, and begins again with another one."""
    seen: list[str] = []

    def stop(done: int, total: int, name: str) -> None:
        seen.append(name)
        if name == "2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        split_module(seeded(small), normal(1, 6), tmp_path, RECIPE, progress=stop)
    assert seen == ["0", "2"] and not (tmp_path / "vault").exists()
    first = json.loads((tmp_path / ".partial" / "journal").read_text().splitlines()[0])["split_id"]
    module, x = seeded(small, seed=0 if same else 1), normal(5, 6)
    split_module(module, normal(1, 6), tmp_path, RECIPE)
    assert (read_vault_manifest(tmp_path / "vault").split_id == first) == same
    assert not (tmp_path / ".partial").exists()
    with torch.no_grad():
        found = reference_module(seeded(small, seed=7), tmp_path)(x)
        assert (found - module(x)).norm() < 2e-3 * module(x).norm()


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 7),
        torch.ones(2, 6, dtype=torch.int64),
        torch.randn(2, 6, device="meta"),
        torch.randn(2, 6, requires_grad=True),
        torch.full((2, 6), float("nan")),
    ],
    ids=["width", "integers", "device", "gradient", "NaN"],
)
def test_inputs_that_a_linear_layer_cannot_use(plain: Path, x: Tensor) -> None:
    with pytest.raises(InputError):
        reference_module(seeded(small), plain)(x)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(1, 2, 9, 9),
        torch.randn(3, 9),
        torch.randn(1, 3, 2, 2),
        torch.ones(1, 3, 9, 9, dtype=torch.int64),
        torch.randn(1, 3, 9, 9, device="meta"),
        torch.randn(1, 3, 9, 9, requires_grad=True),
    ],
    ids=["channels", "dimensions", "smaller than the kernel", "integers", "device", "gradient"],
)
def test_inputs_that_a_convolution_cannot_use(tmp_path: Path, x: Tensor) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3))

    split_module(seeded(make), normal(1, 3, 9, 9), tmp_path, RECIPE)
    reference = reference_module(seeded(make), tmp_path)
    with pytest.raises(InputError, match=r"group 0 (takes|has no gradient)"):
        reference(x)
    assert reference(normal(3, 9, 9)).shape == (4, 7, 7)
    assert reference(torch.zeros(0, 3, 9, 9)).shape == (0, 4, 7, 7)


def test_training_is_refused(plain: Path) -> None:
    module = reference_module(seeded(small), plain)
    module.requires_grad_(True)
    with pytest.raises(InputError, match="cannot be trained"):
        module(normal(2, 6))
    with torch.no_grad():
        assert not module(normal(2, 6)).requires_grad


def test_a_split_weight_has_no_values(plain: Path) -> None:
    module: Any = reference_module(seeded(small), plain)
    weight = module[0].weight
    assert (weight.shape, weight.dtype, weight.device.type) == ((9, 6), torch.float32, "cpu")
    assert repr(weight) == "SplitWeight([9, 6], group=0)"
    for use in (
        lambda: weight.sum(),
        lambda: weight + 1,
        lambda: weight.numpy(),
        lambda: weight[0],
        lambda: weight.T,
        lambda: F.linear(weight, normal(3, 6)),
        lambda: F.linear(normal(3, 6), normal(4, 6), weight),
        lambda: weight.tolist(),
    ):
        with pytest.raises(InputError, match="no party has it"):
            use()
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(InputError, match="copied or pickled"):
            copied(module)


def test_the_worker_of_another_split(plain: Path, tmp_path: Path) -> None:
    """It has the same names and shapes, and is not taken for the right one."""
    split_module(seeded(small), normal(1, 6), tmp_path, RECIPE)
    with LocalWorker(tmp_path / "worker") as worker, pytest.raises(sliplm.errors.MismatchError):
        load_module(seeded(small), plain / "vault", [worker.address])
    with LocalWorker(plain / "worker") as worker:
        hybrid: Any = load_module(seeded(small), plain / "vault", [worker.address])
        with closing(hybrid.slip):
            assert hybrid.slip.groups == ("0", "2")
