"""The model a checkpoint describes, with the checkpoint's own codes and scales in it.

Nothing that is stored is derived anew: an inference model multiplies by the stored codes, and the
latent weights of a training model quantize to them, which is verified layer by layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from forge_harness.errors import CheckpointError, DamagedCheckpointError, unknown_choice
from forge_harness.formats.checkpoint import Checkpoint, refuse_layer_norms
from forge_harness.formats.tensors import TernaryTensor
from forge_harness.quant import COMPUTES, Compute, TernaryLinearOp, absmean_ternary, dequantize
from forge_harness.quant.bounds import WEIGHT_SCALE_RTOL

from .bitlinear import BitLinear
from .causal_lm import CausalLM, projection_names
from .causal_lm_config import CausalLMConfig
from .describe import DescribesItself
from .families import OWN_FAMILIES, own_model

Mode = Literal["inference", "qat"]
FAMILIES = ("bitnet", "llama", *OWN_FAMILIES)
"""Model families that can be built."""

_IGNORED = "rotary_emb.inv_freq"
"""End of the names of buffers that old Llama checkpoints carry; the configuration says the same."""


@dataclass(frozen=True, slots=True)
class StoredCodes:
    """Quantizer that answers with the codes and scales of a checkpoint, whatever the weight is.

    Attributes:
        codes: int8 (N, K).
        scales: fp32 (P,), one a part.
        parts: Row counts of the parts; they sum to N.
    """

    codes: Tensor
    scales: Tensor
    parts: tuple[int, ...]

    @classmethod
    def of(cls, ternary: TernaryTensor) -> StoredCodes:
        """Unpacks a tensor of a checkpoint."""
        return cls(ternary.codes(), ternary.scales, ternary.parts)

    def __call__(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Returns codes and scale of the part that `weight` is: the whole latent, or a view of it.

        A view is told by where it starts in the latent's storage, which the latent must own.
        """
        if weight.shape[0] == self.codes.shape[0]:
            scale = self.scales if len(self.parts) == 1 else self._row_scales()
            return self.codes.to(weight.device), scale.to(weight.device)
        start = weight.storage_offset() // max(1, self.codes.shape[1])
        part = [sum(self.parts[:index]) for index in range(len(self.parts))].index(start)
        codes = self.codes[start : start + self.parts[part]]
        return codes.to(weight.device), self.scales[part].to(weight.device)

    def values(self) -> Tensor:
        """Returns scale * codes, fp32 (N, K)."""
        return dequantize(self.codes, self._row_scales()[:, None])

    def _row_scales(self) -> Tensor:
        return torch.repeat_interleave(self.scales, torch.tensor(self.parts))


def model_from_checkpoint(checkpoint: Checkpoint, *, mode: Mode = "inference") -> DescribesItself:
    """Builds the model of a checkpoint and loads it; parameters are fp32.

    Args:
        checkpoint: Open; it may be closed afterwards.
        mode: "inference": evaluation mode, ternary layers multiply by the stored codes and scales.
            "qat": training mode, ternary layers quantize their latent weights at every forward.
            The latents are the same in both: the stored masters, or ones made from the codes.

    Raises:
        CheckpointError: The family or its configuration is not supported, or training cannot start
            from a layer because no latent weight quantizes to what it stores.
        DamagedCheckpointError: A tensor is missing, superfluous, of another shape, or differs from
            the one it is tied to.
    """
    if mode not in ("inference", "qat"):
        raise ValueError(unknown_choice("mode", mode, ("inference", "qat")))
    model = empty_model(checkpoint)
    _check_names(checkpoint, model)
    filled: dict[int, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if id(parameter) not in filled:
            filled[id(parameter)] = nn.Parameter(_read(checkpoint, name, parameter))
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, filled[id(parameter)])
    _check_tied(checkpoint, model)
    for name in model.quantized_names():
        layer = cast(BitLinear, model.get_submodule(name))
        _set_arithmetic(checkpoint, f"{name}.weight", layer, mode)
    return model.train(mode == "qat")


def empty_model(checkpoint: Checkpoint) -> DescribesItself:
    """Builds the model a checkpoint's configuration describes, its weights not loaded.

    Llama and BitNet models hold no memory yet (their parameters are on the meta device).

    Raises:
        CheckpointError: The family or its configuration is not supported, or the checkpoint has
            ternary weights where the model has none.
    """
    refuse_layer_norms(checkpoint, "a model of this package")
    family, config = checkpoint.model.family, checkpoint.model.config
    ternary = tuple(name.removesuffix(".weight") for name in checkpoint.ternary_names())
    if family in ("bitnet", "llama"):
        settings = CausalLMConfig.from_transformers(family, config)
        head = () if settings.tie_word_embeddings else ("lm_head",)
        _check_ternary(checkpoint, set(ternary) - {*projection_names(settings), *head})
        with torch.device("meta"):
            return CausalLM(settings, ternary=ternary)
    if family == "unknown":
        raise CheckpointError(
            f"{str(checkpoint.path)!r} does not say which model its tensors belong to; expected a "
            f"configuration of one of {', '.join(FAMILIES)}: put a config.json beside safetensors "
            "files, or name a package."
        )
    if family not in FAMILIES:
        raise CheckpointError(unknown_choice("model family", family, FAMILIES))
    return _own(checkpoint, own_model(family, config), ternary)


def _own(
    checkpoint: Checkpoint, model: DescribesItself, ternary: tuple[str, ...]
) -> DescribesItself:
    """Returns a model of this package, in which every projection is ternary."""
    _check_ternary(checkpoint, set(ternary) ^ set(model.quantized_names()))
    return model


def _check_ternary(checkpoint: Checkpoint, wrong: set[str]) -> None:
    for name in sorted(wrong):
        stored = "" if f"{name}.weight" in checkpoint.ternary_names() else "not "
        raise CheckpointError(
            f"Tensor '{name}.weight' is {stored}ternary in {checkpoint.path.name!r}; in a "
            f"{checkpoint.model.family} model of this configuration it is the opposite."
        )


def _check_names(checkpoint: Checkpoint, model: nn.Module) -> None:
    wanted = dict(model.named_parameters(remove_duplicate=False))
    for name in checkpoint.infos:
        if name not in wanted and not name.endswith(_IGNORED):
            raise DamagedCheckpointError(
                f"Tensor {name!r} has no place in the {checkpoint.model.family} model of the "
                "configuration; one of the two is wrong.",
                path=str(checkpoint.path),
                tensor=name,
            )


def _source(checkpoint: Checkpoint, name: str) -> str:
    if name in checkpoint.infos:
        return name
    if checkpoint.tied.get(name) in checkpoint.infos:
        return checkpoint.tied[name]
    raise DamagedCheckpointError(
        f"Tensor {name!r} is missing; the {checkpoint.model.family} model of the configuration "
        "needs it.",
        path=str(checkpoint.path),
        tensor=name,
    )


def _read(checkpoint: Checkpoint, name: str, parameter: nn.Parameter) -> Tensor:
    """Returns the tensor as fp32 in a storage of its own (see `StoredCodes`)."""
    source = _source(checkpoint, name)
    info = checkpoint.infos[source]
    if info.shape != tuple(parameter.shape):
        raise DamagedCheckpointError(
            f"Tensor {source!r} has shape {info.shape}; the configuration calls for "
            f"{tuple(parameter.shape)}.",
            path=str(checkpoint.path),
            tensor=source,
        )
    read = checkpoint.master if info.kind == "ternary" else checkpoint.plain
    return read(source).detach().to(torch.float32, copy=True).contiguous()


def _check_tied(checkpoint: Checkpoint, model: DescribesItself) -> None:
    state = model.state_dict()
    for first, second in model.tied():
        for name in {first, second} & checkpoint.infos.keys():
            if not torch.equal(checkpoint.plain(name).float(), state[first]):
                raise DamagedCheckpointError(
                    f"Tensor {second!r} is tied to {first!r} by the configuration, and the two "
                    "are stored with different values.",
                    path=str(checkpoint.path),
                    tensor=second,
                )


def _set_arithmetic(checkpoint: Checkpoint, name: str, layer: BitLinear, mode: Mode) -> None:
    compute = cast(Compute, checkpoint.quantization.get("compute", "exact"))
    if compute not in COMPUTES:
        raise CheckpointError(unknown_choice("compute mode", str(compute), COMPUTES))
    stored = StoredCodes.of(checkpoint.ternary(name))
    parts = layer.parts or (layer.out_features,)
    if stored.parts != parts:
        raise DamagedCheckpointError(
            f"Tensor {name!r} has scales for parts of {stored.parts} rows; the configuration "
            f"calls for {parts}.",
            path=str(checkpoint.path),
            tensor=name,
        )
    if mode == "inference":
        layer.linear = TernaryLinearOp(quantize_weight=stored, compute=compute)
    else:
        layer.linear = TernaryLinearOp(compute=compute)
        _check_latent(name, layer.weight.detach(), stored)


def _check_latent(name: str, latent: Tensor, stored: StoredCodes) -> None:
    """Refuses a latent weight that training would quantize to something else than is stored."""
    pieces = zip(
        torch.split(latent, list(stored.parts)),
        torch.split(stored.codes, list(stored.parts)),
        stored.scales,
        strict=True,
    )
    for weight, codes, scale in pieces:
        own_codes, own_scale = absmean_ternary(weight)
        differing = int((own_codes != codes).sum())
        if not differing and not codes.any():
            continue  # whatever multiplies only zeros
        error = abs(float(own_scale) - float(scale)) / float(scale)
        if differing or not error <= WEIGHT_SCALE_RTOL:
            raise CheckpointError(
                f"Training cannot start from tensor {name!r}: its scale {float(scale):.6g} and "
                f"codes are none that absmean quantization gives ({differing} codes differ, the "
                f"scale becomes {float(own_scale):.6g}); open it for inference only."
            )
