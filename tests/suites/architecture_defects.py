"""Models with one behaviour changed, and sound ones of an unusual kind that no check may accuse."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from forge_harness import training
from forge_harness.model import BitLinear
from forge_harness.protocols import ModelSpec
from forge_harness.subject.reference import ReferenceSubject

PRE_NORMS = tuple(f"blocks.{i}.{n}" for i in range(2) for n in ("attention_norm", "ffn_norm"))


class AttentionDefect(ReferenceSubject):
    """The output of each attention changed: `change(attention, x, output)`."""

    def __init__(self, change):
        self.change = change

    def build_model(self, task, *, seed):
        model = super().build_model(task, seed=seed)
        for block in model.blocks if task == "bytes" else ():
            block.attention.register_forward_hook(
                lambda module, args, out: self.change(module, args[0], out)
            )
        return model


def sees_the_next_key_at_block_ends(attention, x, out):
    """Row 7 of each block of 8 sees the first key of the next block."""
    rows = torch.arange(7, x.shape[1] - 1, 8)
    return out.index_add(1, rows, 0.1 * attention.v(x)[:, rows + 1])


def sees_the_next_key_beyond_64_tokens(attention, x, out):
    """Another kernel takes long inputs, with a mask off by one."""
    if x.shape[1] <= 64:
        return out
    return out + 0.1 * F.pad(attention.v(x)[:, 1:], (0, 0, 0, 1))


class NormOverTheBatch(ReferenceSubject):
    """The final norm takes its statistics over all samples."""

    def build_model(self, task, *, seed):
        model = super().build_model(task, seed=seed)
        if task == "bytes":
            norm = model.norm
            norm.forward = lambda x: (
                x * torch.rsqrt(x.square().mean((0, -1), keepdim=True) + 1e-6) * norm.weight
            )
        return model


class DeclaresPreNorms(ReferenceSubject):
    """The norms in front of attention and feed-forward are declared as well."""

    def model_spec(self, task):
        spec = super().model_spec(task)
        return replace(spec, sub_norms=PRE_NORMS) if task == "bytes" else spec


class KeysReadTheRawStream(DeclaresPreNorms):
    """q reads the output of the norm; k and v read what the norm was given."""

    def build_model(self, task, *, seed):
        model = super().build_model(task, seed=seed)
        for block in model.blocks if task == "bytes" else ():
            raw = []
            block.attention_norm.register_forward_pre_hook(
                lambda module, args, raw=raw: raw.append(args[0])
            )
            for projection in (block.attention.k, block.attention.v):
                projection.register_forward_pre_hook(lambda module, args, raw=raw: (raw[-1],))
        return model


class NormMissingAndUndeclared(ReferenceSubject):
    """The second block has no sub-norm, and a declaration read off the model agrees."""

    def model_spec(self, task):
        spec = super().model_spec(task)
        if task != "digits":
            return spec
        return replace(spec, sub_norms=spec.sub_norms[:1], parameters=spec.parameters - 128)

    def build_model(self, task, *, seed):
        model = super().build_model(task, seed=seed)
        if task == "digits":
            model.blocks[1].down.norm = None
        return model


class LayersSwallowMissingKeys(ReferenceSubject):
    """Ternary layers load without their weight, as legacy loaders let them; all others do not."""

    def tasks(self):
        return ("bytes",)

    def build_model(self, task, *, seed):
        model = super().build_model(task, seed=seed)
        for layer in model.modules():
            if isinstance(layer, BitLinear):
                layer._load_from_state_dict = lenient(layer._load_from_state_dict)
        return model


def lenient(load):
    def loading(state, prefix, metadata, strict, missing, unexpected, errors):
        load(state, prefix, metadata, strict, [], unexpected, errors)

    return loading


class NothingQuantized(ReferenceSubject):
    """A full-precision model that declares just that, and no scale to look for."""

    def quantization_info(self, task):
        return replace(super().quantization_info(task), granularity="row")

    def model_spec(self, task):
        spec = super().model_spec(task)
        names = {*spec.quantized, *spec.full_precision}
        return replace(spec, quantized=(), full_precision=tuple(sorted(names)), sub_norms=())

    def build_model(self, task, *, seed):
        return training.reference_model(task, seed, "full")


# Sound, and of another kind than the reference.


class Dropout(ReferenceSubject):
    """Dropout in training mode."""

    def build_model(self, task, *, seed):
        model = super().build_model(task, seed=seed)
        model.head.register_forward_pre_hook(
            lambda module, args: (F.dropout(args[0], 0.1, training=module.training),)
        )
        return model


class InMapping(nn.Module):
    """Answers with a mapping that has a scalar in front, as transformers' outputs may."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return {"auxiliary_loss": torch.zeros(()), "logits": self.inner(x)}


class AnswersWithAMapping(ReferenceSubject):
    """Models whose output is a mapping; the loss takes the logits out of it."""

    def model_spec(self, task):
        spec = super().model_spec(task)
        names = ("quantized", "full_precision", "sub_norms")
        changed = {n: tuple(f"inner.{name}" for name in getattr(spec, n)) for n in names}
        tied = tuple(tuple(f"inner.{key}" for key in pair) for pair in spec.tied)
        return replace(spec, **changed, tied=tied)

    def build_model(self, task, *, seed):
        return InMapping(super().build_model(task, seed=seed))

    def loss(self, model, batch):
        logits = model(batch.inputs)["logits"]
        return F.cross_entropy(logits.flatten(0, -2), batch.targets.flatten())


class ScaleARow(ReferenceSubject):
    """Declares one scale a row, and quantizes so."""

    def quantization_info(self, task):
        return replace(super().quantization_info(task), granularity="row")

    def quantize_weight(self, weight):
        scale = weight.abs().mean(dim=1, keepdim=True).clamp(min=1e-5)
        return (weight / scale).round().clamp(-1, 1).to(torch.int8), scale.flatten()


class SaysRowsAndHasOne(ReferenceSubject):
    """Declares one scale a row and computes with one a weight: what is there is measured."""

    def quantization_info(self, task):
        return replace(super().quantization_info(task), granularity="row")


class LayerNorms(ReferenceSubject):
    """Sub-norms are LayerNorm, whose bias is not zero."""

    def model_spec(self, task) -> ModelSpec:
        spec = super().model_spec(task)
        return replace(spec, parameters=spec.parameters + 256) if task == "digits" else spec

    def build_model(self, task, *, seed):
        model = super().build_model(task, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for block in model.blocks if task == "digits" else ():
            norm = nn.LayerNorm(128)
            with torch.no_grad():
                norm.bias.copy_(0.1 * torch.randn(128, generator=generator))
            block.down.norm = norm
        return model
