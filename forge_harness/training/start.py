"""Starts training from a checkpoint of another format: weights, model and options it implies.

Training quantizes latent weights at every forward, and a packed checkpoint holds none. One is made
from the codes whose absmean quantization gives the codes back bit for bit and the scale to one
ulp; a start that would not is refused.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from forge_harness.errors import CheckpointError, ConfigError, unknown_choice
from forge_harness.formats import ModelDescription, ReadOptions, TernaryTensor
from forge_harness.formats.checkpoint import Checkpoint
from forge_harness.formats.detect import open_checkpoint
from forge_harness.model import BitLinear
from forge_harness.model.families import own_model
from forge_harness.model.from_checkpoint import model_from_checkpoint
from forge_harness.protocols import Precision
from forge_harness.quant import Compute, TernaryLinearOp, absmean_ternary
from forge_harness.training.ingredients import BuildModel
from forge_harness.training.randomness import RandomState
from forge_harness.training.splits import CONTEXT, IMAGE_BYTES

TASK_OF = {"digits": "digits", "byte-lm": "bytes"}
"""Model family -> the reference task its models are trained on."""
_SIZES: Mapping[str, Mapping[str, tuple[int, int | None]]] = {
    "digits": {"inputs": (IMAGE_BYTES, IMAGE_BYTES), "classes": (10, None)},
    "byte-lm": {"vocabulary": (256, None), "context": (CONTEXT, None)},
}
"""Model family -> size -> least and most that the data of its task ask for."""
_ULPS = 1
_NEIGHBOURS = 8
_ATTEMPTS = 8
_SPREAD = 2.0**-16
"""Of magnitudes, relative, at the second attempt; several ulps of every row's sum."""


@dataclass(frozen=True, slots=True)
class Start:
    """What training goes on from.

    Attributes:
        model: Family and configuration, enough to build the model again.
        weights: State dict: latent weights, and the rest as it is.
        compute: Arithmetic the checkpoint was made with.
    """

    model: ModelDescription
    weights: dict[str, Tensor]
    compute: Compute

    @property
    def build_model(self) -> BuildModel:
        """Builds the model the weights fit."""
        return builder_of(self.model, self.compute)


def read_start(path: Path, options: ReadOptions | None = None) -> Start:
    """Reads latent weights and model from a checkpoint of one of our own families.

    Args:
        path: File or directory in any readable format.
        options: What the files cannot say.

    Raises:
        CheckpointError: It cannot be read, is of a family that has no reference task, or holds
            codes and scales that no latent weight quantizes to.
        DamagedCheckpointError: It does not hold what it claims to hold.
    """
    with open_checkpoint(path, options) as checkpoint:
        return start_of(checkpoint)


def start_of(checkpoint: Checkpoint) -> Start:
    """As `read_start`, from a checkpoint that is open."""
    require_own(checkpoint)
    model = model_from_checkpoint(checkpoint, mode="qat")
    with torch.no_grad():
        for name in checkpoint.ternary_names():
            layer = cast(BitLinear, model.get_submodule(name.removesuffix(".weight")))
            stored = checkpoint.ternary(name)
            if not checkpoint.infos[name].master:
                layer.weight.copy_(latent_of(stored))
            require_same(name, layer.weight, stored)
    compute = cast(Compute, checkpoint.quantization.get("compute", "exact"))
    weights = {key: tensor.detach() for key, tensor in model.state_dict().items()}
    return Start(checkpoint.model, weights, compute)


def misfit(model: ModelDescription) -> str:
    """Returns what of a model the data of its reference task do not fit; "" where they do."""
    for name, (least, most) in _SIZES.get(model.family, {}).items():
        size = model.config.get(name)
        if isinstance(size, int) and not least <= size <= (most or size):
            task, bound = TASK_OF[model.family], "" if most else "at least "
            return f"{name} {size}, and the data of {task!r} ask for {bound}{least}"
    return ""


def require_fit(name: str, model: ModelDescription) -> None:
    """Refuses a model of sizes that the data of its reference task do not fit.

    Raises:
        CheckpointError: A size is another one.
    """
    if reason := misfit(model):
        raise CheckpointError(
            f"Training cannot start from {name!r}: its model has {reason}. Start from another, or "
            "train it on data of its size (`load` of train_to_directory)."
        )


def require_own(checkpoint: Checkpoint) -> None:
    """Refuses a model that none of the reference tasks trains.

    Raises:
        CheckpointError: The family is another one.
    """
    family = checkpoint.model.family
    if family not in TASK_OF:
        raise CheckpointError(
            f"{str(checkpoint.path)!r} holds a model of family {family!r}; training starts from "
            f"{' or '.join(TASK_OF)}. Convert a package of such a model, or train this one with "
            "your own loop over model_from_checkpoint(checkpoint, mode='qat')."
        )


def builder_of(model: ModelDescription, compute: Compute = "exact") -> BuildModel:
    """Returns a builder of the model a checkpoint describes; the task it is asked for must fit.

    Raises:
        CheckpointError: The family is none of ours.
    """
    if model.family not in TASK_OF:
        raise CheckpointError(unknown_choice("model family", model.family, TASK_OF))

    def build(task: str, seed: int, precision: Precision) -> nn.Module:
        wanted = TASK_OF[model.family]
        if task.partition("#")[0] != wanted:
            raise ConfigError(
                f"Task {task!r} was asked for, and the checkpoint holds a {model.family} model; "
                f"train it on {wanted!r}.",
                key="task",
            )
        linear = TernaryLinearOp(compute=compute)
        with RandomState(seed).active():
            built: nn.Module = own_model(
                model.family, model.config, linear=linear, precision=precision
            )
        return built

    return build


def latent_of(ternary: TernaryTensor) -> Tensor:
    """Returns an fp32 weight (N, K) that absmean quantization turns into these codes and scales.

    With p the share of codes that are not 0, codes * scale / p has absmean `scale` up to the
    rounding of its sum; magnitudes are then moved until the quantizer's own sum agrees.
    """
    latent = ternary.codes().float()
    for part, scale in zip(torch.split(latent, list(ternary.parts)), ternary.scales, strict=True):
        if part.any():
            _scale_to(part, float(scale))
    return latent


def require_same(name: str, latent: Tensor, stored: TernaryTensor) -> None:
    """Refuses a latent weight that training would quantize to something else than is stored.

    Raises:
        CheckpointError: A code differs, or a scale by more than one ulp.
    """
    codes = stored.codes()
    rows = list(stored.parts)
    for weight, wanted, scale in zip(
        torch.split(latent, rows), torch.split(codes, rows), stored.scales, strict=True
    ):
        found, own = absmean_ternary(weight)
        differing = int((found != wanted).sum())
        # A scale that only multiplies zeros has no effect.
        off = ulps(float(own), float(scale)) if wanted.any() else 0.0
        if differing or off > _ULPS:
            raise CheckpointError(
                f"Training cannot start from tensor {name!r}: of its latent weight {differing} "
                f"codes differ from those stored and the scale is {float(own):.9g}, stored is "
                f"{float(scale):.9g}; open it for inference only."
            )


def ulps(value: float, reference: float) -> float:
    """Returns |value - reference| in units of the last place of `reference` in fp32."""
    if not (math.isfinite(value) and math.isfinite(reference)):
        return math.inf
    return abs(value - reference) / float(np.spacing(np.float32(abs(reference))))


def _scale_to(codes: Tensor, scale: float) -> None:
    """Gives codes, in place, magnitudes whose absmean is `scale`, or as near as was found.

    One magnitude for all will not do: rows of one sum round alike, and their total jumps several
    ulps from one fp32 magnitude to the next. Spread a little, rows round one by one. What is then
    left are ties, which go to even and hide every other total: another spread has other ties.
    """
    generator = torch.Generator().manual_seed(0)
    found, error = codes, math.inf
    for attempt in range(_ATTEMPTS):
        spread = torch.rand(codes.shape, generator=generator) * (attempt * _SPREAD)
        latent = _scaled(codes * (1 + spread), scale)
        off = ulps(_absmean(latent), scale)
        if off < error:
            found, error = latent, off
        if not error:
            break
    codes.copy_(found)


def _scaled(weight: Tensor, scale: float) -> Tensor:
    """Returns `weight` times a factor, or the next one, so that the absmean comes to `scale`.

    Element after element gets the larger factor until it does: the sum rounds monotonically.
    """
    factor = _factor(weight, scale)
    low, high = weight * float(factor), weight * float(_after(factor, math.inf))
    mixed = low.clone()

    def absmean(count: int) -> float:
        mixed.copy_(low).view(-1)[:count] = high.view(-1)[:count]
        return _absmean(mixed)

    absmean(bisect_left(range(weight.numel()), scale, key=absmean))
    return mixed


def _factor(weight: Tensor, scale: float) -> np.float32:
    """Returns the largest fp32 a > 0 for which the absmean of a * weight is at most `scale`.

    The sum rounds, so the fp32 neighbours of the quotient are tried.
    """
    factor = np.float32(scale * weight.numel() / float(weight.double().abs().sum()))
    for _ in range(_NEIGHBOURS):
        if _absmean(weight * float(factor)) <= scale:
            break
        factor = _after(factor, 0.0)
    for _ in range(_NEIGHBOURS):
        above = _after(factor, math.inf)
        if _absmean(weight * float(above)) > scale:
            break
        factor = above
    return factor


def _after(value: np.float32, towards: float) -> np.float32:
    return np.float32(np.nextafter(value, np.float32(towards)))


def _absmean(weight: Tensor) -> float:
    return float(absmean_ternary(weight)[1])
