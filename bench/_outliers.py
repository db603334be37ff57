"""Models with activation outliers and the same function: a channel times f where it is made, over f where it
is read.

In every block: some channels of what both norms give out, neurons between up and down, and channels between
v and o.  In exact arithmetic nothing changes; in float32, roundings of 10^-7.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

CHANNELS = 4  # of each kind


def with_outliers(source: Path, out: Path, factor: float, seed: int = 0) -> LlamaForCausalLM:
    """Write the Llama-like model `source` with channels times `factor` to `out`; returns it in float32."""
    model: LlamaForCausalLM = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, trust_remote_code=False
    )
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    group = config.num_attention_heads // config.num_key_value_heads
    width = config.hidden_size // config.num_attention_heads
    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            readers = {
                layer.input_layernorm: (attention.q_proj, attention.k_proj, attention.v_proj),
                layer.post_attention_layernorm: (mlp.gate_proj, mlp.up_proj),
            }
            for norm, linears in readers.items():
                chosen = torch.randperm(config.hidden_size, generator=generator)[:CHANNELS]
                norm.weight[chosen] *= factor
                for linear in linears:
                    linear.weight[:, chosen] /= factor
            chosen = torch.randperm(config.intermediate_size, generator=generator)[:CHANNELS]
            mlp.up_proj.weight[chosen] *= factor
            mlp.down_proj.weight[:, chosen] /= factor
            chosen = torch.randperm(config.num_key_value_heads * width, generator=generator)[:CHANNELS]
            attention.v_proj.weight[chosen] *= factor
            for channel in chosen.tolist():
                head, place = divmod(channel, width)
                for reader in range(head * group, (head + 1) * group):
                    attention.o_proj.weight[:, reader * width + place] /= factor
    model.save_pretrained(out)
    return model
