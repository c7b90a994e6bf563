"""A checkpoint that exists in memory only: a source with known codes, scales and names."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from forge_harness.formats import Checkpoint, ModelDescription, TensorInfo, TernaryTensor
from forge_harness.formats.architecture import expected_tensors, role_of
from forge_harness.formats.safetensors_file import NAMES


@dataclass
class MemoryCheckpoint(Checkpoint):
    """Codes and plain tensors by name."""

    coded: dict[str, TernaryTensor] = field(default_factory=dict)
    others: dict[str, torch.Tensor] = field(default_factory=dict)

    def ternary(self, name):
        return self.coded[name]

    def plain(self, name):
        return self.others[name]

    def close(self):
        pass


def memory_checkpoint(coded, others, *, family="unknown", config=None, tied=None, extras=None):
    """Returns a checkpoint of these tensors; `coded` maps names to `TernaryTensor`."""
    infos = {
        name: TensorInfo(name, "ternary", t.shape, "i2-rowblock", t.packed.numel(), t.parts)
        for name, t in coded.items()
    } | {
        name: TensorInfo(
            name, "plain", tuple(t.shape), NAMES[t.dtype], t.numel() * t.element_size()
        )
        for name, t in others.items()
    }
    return MemoryCheckpoint(
        format="native",
        path=Path("memory"),
        model=ModelDescription(family, config or {}),
        infos=infos,
        tied=tied or {},
        extras=extras or {},
        coded=dict(coded),
        others=dict(others),
    )


def random_ternary(rows, columns, *, scales=(0.05,), parts=None, seed=0):
    """Returns codes of density 0.69 with these scales."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(rows, columns, generator=generator)
    codes = (draw < 0.345).to(torch.int8) - (draw > 0.655).to(torch.int8)
    return TernaryTensor.from_codes(codes, torch.tensor(scales), parts)


HF_CONFIG = {
    "architectures": ["BitNetForCausalLM"],
    "model_type": "bitnet",
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "relu2",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
}


def hf_checkpoint(seed=0, **changes):
    """Returns a tiny BitNet (or, with model_type="llama", Llama) under transformers' names."""
    config = {**HF_CONFIG, **changes}
    family = config["model_type"]
    coded, others = {}, {}
    description = ModelDescription(family, config)
    for index, (name, shape) in enumerate(expected_tensors(description).items()):
        generator = torch.Generator().manual_seed(1000 * seed + index)
        role = role_of(name, "hf")
        if role.kind in ("q", "k", "v", "o", "gate", "up", "down"):
            scale = 0.02 * 1.3 ** (index % 7)
            coded[name] = random_ternary(*shape, scales=(scale,), seed=1000 * seed + index)
        elif len(shape) == 1:
            others[name] = 0.5 + torch.rand(shape, generator=generator)
        else:
            others[name] = torch.randn(shape, generator=generator)
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if config["tie_word_embeddings"] else {}
    return memory_checkpoint(coded, others, family=family, config=config, tied=tied)
