"""A split language model on a card, as its users call it: needs one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import sliplm
from fakecard import cards
from families import make
from sliplm.errors import InputError, PrecisionError
from sliplm.parties.local_worker import LocalWorker

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not cards() or not torch.cuda.is_available(),
        reason="needs an NVIDIA card and PyTorch for CUDA: `make test-gpu` on a machine with both",
    ),
]
IDS = torch.arange(2, 42).reshape(2, 20)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("oncard")
    sliplm.split(make("llama", base / "model"), base / "out")
    return base / "out"


def divergence(got: Any, want: Any) -> float:
    """KL of the next token, the mean over all places, in nats."""
    p, q = (logits.float().log_softmax(-1) for logits in (want.cpu(), got.cpu()))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_a_model_on_the_card_is_that_on_the_processor(out: Path) -> None:
    with sliplm.open(out, ahead=0) as model, torch.no_grad():
        want = model(IDS).logits
        model.to("cuda")
        exchanges = model.slip.counters.exchanges
        got = model(IDS.to("cuda")).logits
        assert got.is_cuda and model.slip.counters.exchanges > exchanges
        assert divergence(got, want) < 1e-6
        tokens = model.generate(IDS.to("cuda"), max_new_tokens=5, do_sample=False)
        assert tokens.is_cuda
        model.to("cpu")
        assert torch.equal(model(IDS).logits, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_the_card_costs_what_it_costs_the_plain_model(
    out: Path, dtype: torch.dtype
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(out.parent / "model", dtype=torch.float32).eval()
    with sliplm.open(out, ahead=0, dtype=dtype) as model, torch.no_grad():
        want = plain(IDS).logits
        halved = plain.to("cuda", dtype)(IDS.to("cuda")).logits
        got = model.to("cuda")(IDS.to("cuda")).logits
        assert got.dtype is dtype
        assert divergence(got, want) < 2 * divergence(halved, want) + 1e-6


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
def test_a_device_map_puts_it_there(out: Path) -> None:
    with LocalWorker(out / "worker") as worker:
        config = sliplm.SlipConfig(workers=[worker.address], ahead=0)
        for place in ("cuda", "auto", {"": 0}):
            model = AutoModelForCausalLM.from_pretrained(
                out / "vault", quantization_config=config, device_map=place
            )
            with model, torch.no_grad():
                assert model.device.type == "cuda"
                assert torch.isfinite(model(IDS.to("cuda")).logits).all()


def test_masks_are_dealt_on_the_card(out: Path) -> None:
    with sliplm.open(out, ahead=0, deal_on="cuda") as model, torch.no_grad():
        model.slip.deal(50)
        model.to("cuda")(IDS.to("cuda"))
        assert model.slip.counters.rows_dealt_late == 0


def test_an_input_that_is_no_number_is_named(out: Path) -> None:
    with sliplm.open(out, ahead=0) as model, torch.no_grad():
        model.to("cuda")
        embedded = model.get_input_embeddings()(IDS.to("cuda"))
        embedded[0, 3] = float("nan")
        with pytest.raises(InputError, match="NaN"):
            model(inputs_embeds=embedded)
        assert torch.isfinite(model(IDS.to("cuda")).logits).all()


def test_members_of_a_group_share_an_exchange_and_a_write_between_them_does_not(out: Path) -> None:
    with sliplm.open(out, ahead=0) as model, torch.no_grad():
        model.to("cuda")
        attention = model.model.layers[0].self_attn
        x = torch.randn(3, attention.q_proj.in_features, device="cuda")
        before = model.slip.counters.exchanges
        attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
        assert model.slip.counters.exchanges == before + 1
        q = attention.q_proj(x)
        x += 1
        assert not torch.equal(attention.q_proj(x), q)
        assert model.slip.counters.exchanges == before + 3


def test_a_product_of_which_nothing_is_left_is_an_error_of_its_own_call(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sliplm.open(out, ahead=0) as model, torch.no_grad():
        model.to("cuda")
        model(IDS.to("cuda"))

        def lost(asked: Any) -> int:
            raise PrecisionError("lost")

        head = model.slip._codecs[-1]
        monkeypatch.setattr(head, "judge", lost)
        with pytest.raises(PrecisionError):
            model(IDS.to("cuda"))
        monkeypatch.undo()
        model(IDS.to("cuda"))
