"""A checkpoint as a subject: the model its files describe, with the codes and scales they hold.

Files have no quantizer and no trainer, so checks that need those do not apply; what the files say
about the model, its alphabet and its structure is checked on the weights they hold.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forge_harness.formats import ReadOptions
from forge_harness.formats.detect import open_checkpoint
from forge_harness.model import BitLinear
from forge_harness.model.describe import DescribesItself
from forge_harness.model.from_checkpoint import model_from_checkpoint
from forge_harness.protocols import Batch, ModelSpec

TASK = "checkpoint"
_TOKENS = 16
_PIXELS = "digits"


class CheckpointSubject:
    """Offers `BuildsModel` and `HoldsCheckpoint` over the files at a path.

    Args:
        path: File or directory in any readable format.
        options: What the files cannot say.

    Attributes:
        name: Format and last part of the path.

    Raises:
        CheckpointError: It cannot be read, or its family is none that can be built.
        DamagedCheckpointError: It does not hold what it claims to hold.
    """

    def __init__(self, path: Path, options: ReadOptions | None = None) -> None:
        self._path = path
        with open_checkpoint(path, options) as checkpoint:
            self.name = f"{checkpoint.format} {path.name}"
            self._family = checkpoint.model.family
            self._model = model_from_checkpoint(checkpoint, mode="qat")

    def __deepcopy__(self, memo: dict[int, object]) -> CheckpointSubject:
        return self

    def provide_checkpoint(self, directory: Path) -> Path:
        """See `HoldsCheckpoint.provide_checkpoint`: the files themselves."""
        return self._path

    def tasks(self) -> Sequence[str]:
        """See `BuildsModel.tasks`."""
        return (TASK,)

    def model_spec(self, task: str) -> ModelSpec:
        """See `BuildsModel.model_spec`: what the configuration in the files declares."""
        model = self._model
        return ModelSpec(
            task=task,
            parameters=model.parameter_formula(),
            max_parameters=model.parameter_formula(),
            quantized=model.quantized_names(),
            full_precision=model.full_precision_names(),
            sub_norms=model.sub_norm_names(),
            causal=self._family != _PIXELS,
            tied=model.tied(),
        )

    def build_model(self, task: str, *, seed: int) -> DescribesItself:
        """See `BuildsModel.build_model`: the stored weights, whatever the seed."""
        return copy.deepcopy(self._model).train()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """See `BuildsModel.loss`: cross-entropy of the next token, or of the class."""
        logits = model(batch.inputs)
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), batch.targets.reshape(-1))

    def example_batch(self, task: str, *, batch_size: int, seed: int) -> Batch:
        """See `BuildsModel.example_batch`: random tokens, or random pixels."""
        generator = torch.Generator().manual_seed(seed)
        if self._family == _PIXELS:
            width = int(next(self._model.parameters()).shape[1])
            inputs = torch.rand(batch_size, width, generator=generator)
            return Batch(
                inputs=inputs, targets=torch.randint(2, (batch_size,), generator=generator)
            )
        vocabulary = int(next(self._model.parameters()).shape[0])
        text = torch.randint(vocabulary, (batch_size, _TOKENS + 1), generator=generator)
        return Batch(inputs=text[:, :-1].contiguous(), targets=text[:, 1:].contiguous())

    def effective_weights(self, model: nn.Module) -> Mapping[str, Tensor]:
        """See `BuildsModel.effective_weights`."""
        return {name: layer.effective_weight() for name, layer in _ternary_layers(model)}

    def latent_weights(self, model: nn.Module) -> Mapping[str, nn.Parameter]:
        """See `BuildsModel.latent_weights`."""
        return {name: layer.weight for name, layer in _ternary_layers(model)}


def _ternary_layers(model: nn.Module) -> list[tuple[str, BitLinear]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, BitLinear) and module.precision == "ternary"
    ]
