"""Tiny Hugging Face checkpoints, written with `safetensors` and the float64 oracles alone.

Nothing here shares code with the readers and writers of the package.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from forge_harness import oracles
from forge_harness.formats.checkpoint import Checkpoint, ModelDescription, TensorInfo
from forge_harness.formats.tensors import TernaryTensor

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "dtype": "float32",
}
BITNET = {
    "model_type": "bitnet",
    "architectures": ["BitNetForCausalLM"],
    "hidden_act": "relu2",
    "rms_norm_eps": 1e-5,
    "rope_theta": 20_000.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 20_000.0},
    "tie_word_embeddings": True,
    **SIZES,
}
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "tie_word_embeddings": False,
    **SIZES,
}
QUANTIZATION = {
    "online": {"linear_class": "autobitlinear", "quantization_mode": "online"},
    "autobitlinear": {"linear_class": "autobitlinear", "quantization_mode": "offline"},
    "bitlinear": {"linear_class": "bitlinear", "quantization_mode": "offline"},
}


def masters(config, seed=0):
    """Random full-precision weights of every tensor of a configuration, by transformers' names."""
    generator = torch.Generator().manual_seed(seed)
    width, hidden = config["hidden_size"], config["intermediate_size"]
    size = config.get("head_dim") or width // config["num_attention_heads"]
    query, key_value = (config[f"num_{k}_heads"] * size for k in ("attention", "key_value"))
    shapes = {
        "self_attn.q_proj": (query, width),
        "self_attn.k_proj": (key_value, width),
        "self_attn.v_proj": (key_value, width),
        "self_attn.o_proj": (width, query),
        "mlp.gate_proj": (hidden, width),
        "mlp.up_proj": (hidden, width),
        "mlp.down_proj": (width, hidden),
    }
    norms = {"input_layernorm": width, "post_attention_layernorm": width}
    if config["model_type"] == "bitnet":
        norms |= {"self_attn.attn_sub_norm": width, "mlp.ffn_sub_norm": hidden}

    def random(*shape, spread=0.05):
        return torch.randn(*shape, generator=generator) * spread

    tensors = {"model.embed_tokens.weight": random(config["vocab_size"], width, spread=1.0)}
    for n in range(config["num_hidden_layers"]):
        for name, shape in shapes.items():
            tensors[f"model.layers.{n}.{name}.weight"] = random(*shape)
            biased = "mlp_bias" if name.startswith("mlp") else "attention_bias"
            if config.get(biased):
                tensors[f"model.layers.{n}.{name}.bias"] = random(shape[0], spread=0.5)
        for name, features in norms.items():
            gain = 0.5 + torch.rand(features, generator=generator)
            tensors[f"model.layers.{n}.{name}.weight"] = gain
    tensors["model.norm.weight"] = 0.5 + torch.rand(width, generator=generator)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = random(config["vocab_size"], width)
    return tensors


def is_projection(name):
    return name.endswith("_proj.weight")


def write(directory, config, tensors, layout):
    """Writes config.json and model.safetensors; layout None: a dense model."""
    directory.mkdir(parents=True, exist_ok=True)
    stored = {}
    for name, value in tensors.items():
        if layout in (None, "online") or not is_projection(name):
            stored[name] = value.contiguous()
            continue
        codes, scale, _ = oracles.ternary(value)
        packed = oracles.pack_row_blocks(codes)
        stored[name] = torch.from_numpy(np.ascontiguousarray(packed, dtype=np.uint8))
        factor = scale if layout == "autobitlinear" else 1 / scale
        stored[f"{name}_scale"] = torch.tensor([factor], dtype=torch.float32)
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    if layout is not None:
        quantization = {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}
        config = {**config, "quantization_config": quantization | QUANTIZATION[layout]}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


class MemoryCheckpoint(Checkpoint):
    """A checkpoint without files: codes of the masters that are projections, the rest plain."""

    def __init__(self, family, config, tensors, *, ternary=is_projection, stored=False, **facts):
        self.tensors, self.stored = tensors, stored
        infos = {
            name: TensorInfo(
                name,
                "ternary" if ternary(name) else "plain",
                tuple(value.shape),
                "F32",
                value.nbytes,
                parts=(value.shape[0],) if ternary(name) else (),
            )
            for name, value in tensors.items()
        }
        model = ModelDescription(family, config)
        super().__init__("memory", Path("memory"), model, infos, **facts)

    def ternary(self, name):
        codes, scale, _ = oracles.ternary(self.tensors[name])
        return TernaryTensor.from_codes(torch.from_numpy(codes), torch.tensor(scale))

    def plain(self, name):
        return self.tensors[name]

    def master(self, name):
        return self.tensors[name] if self.stored else super().master(name)

    def close(self):
        pass
