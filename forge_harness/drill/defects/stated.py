"""Quantization stated other than it is: modules, scale convention, packing, stored files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from forge_harness.drill import observe
from forge_harness.drill.defect import Benign, Defect, Stage
from forge_harness.formats.manifest import write_manifest
from forge_harness.protocols import QuantizationInfo, TrainingSession, TrainOptions
from forge_harness.subject.reference import ReferenceSubject

Rewrite = Callable[[str, Tensor], Tensor]
"""Gets the name and the values of a stored tensor, and returns what is stored instead."""


class States(ReferenceSubject):
    """States another quantization than that of its weights."""

    def __init__(self, **other: Any) -> None:
        self.other = other

    def quantization_info(self, task: str) -> QuantizationInfo:
        """See `Configures.quantization_info`."""
        return replace(super().quantization_info(task), **self.other)


class Stores(ReferenceSubject):
    """Writes packages with other tensors; digests fit: the defect is in what was written."""

    def __init__(self, change: Rewrite, prefix: str = "") -> None:
        self.change, self.prefix = change, prefix

    def export_package(self, session: TrainingSession, path: Path) -> None:
        """See `ExportsWeights.export_package`."""
        super().export_package(session, path)
        file = next(path.glob("*.safetensors"))
        tensors = load_file(file)
        changed = {
            f"{self.prefix}{name}": self.change(name, tensor).contiguous()
            for name, tensor in tensors.items()
        }
        save_file(changed, file)
        write_manifest(path)


class StoresScaleOfCodes(ReferenceSubject):
    """Quantizes fake-quantized weights once more: the scale shrinks by the share of zeros."""

    def export_package(self, session: TrainingSession, path: Path) -> None:
        """See `ExportsWeights.export_package`."""
        effective = self.effective_weights(session.model)
        shares = {name: float((w != 0).float().mean()) for name, w in effective.items()}

        def shrunk(name: str, tensor: Tensor) -> Tensor:
            module = name.removesuffix(".weight_scale")
            return tensor * shares[module] if module in shares and module != name else tensor

        Stores(shrunk).export_package(session, path)


class ExtendsItsExclusions(ReferenceSubject):
    """The list of exclusions is one object that each task extends."""

    def __init__(self) -> None:
        self.excluded: list[str] = []

    def quantization_info(self, task: str) -> QuantizationInfo:
        """See `Configures.quantization_info`."""
        info = super().quantization_info(task)
        self.excluded.extend(info.excluded)
        return replace(info, excluded=tuple(self.excluded))


class PacksInReverse(ReferenceSubject):
    """Packs the last row first."""

    def pack(self, codes: Tensor) -> Tensor:
        """See `Packs.pack`."""
        return super().pack(codes.flip(0))


class FiveLevelsARow(States):
    """Weights of five levels, by a scale of each row."""

    def __init__(self) -> None:
        super().__init__(granularity="row")

    def effective_weights(self, model: nn.Module) -> Mapping[str, Tensor]:
        """See `BuildsModel.effective_weights`."""
        return {
            name: (4 * weight.detach() / weight.abs().max()).round()
            for name, weight in self.latent_weights(model).items()
        }


class LatentWeightsInForward(ReferenceSubject):
    """What the forward uses are the latent weights."""

    def effective_weights(self, model: nn.Module) -> Mapping[str, Tensor]:
        """See `BuildsModel.effective_weights`."""
        return {name: weight.detach() for name, weight in self.latent_weights(model).items()}


def stated(subject: Any) -> object:
    """What is stated of both tasks, and the weights the forward uses."""
    model = subject.build_model("digits", seed=4)
    info = [subject.quantization_info(task) for task in ("digits", "bytes")]
    return info, dict(subject.effective_weights(model))


def stated_again(subject: Any) -> object:
    """What is stated of each task, asked twice."""
    return [subject.quantization_info(task) for task in ("digits", "bytes") * 2]


def stored(subject: Any) -> object:
    """The tensors of a package of digits after one step, by name."""
    session = subject.session("digits", TrainOptions(seed=2, steps=1))
    session.step()
    with tempfile.TemporaryDirectory() as folder:
        subject.export_package(session, Path(folder) / "package")
        return load_file(next((Path(folder) / "package").glob("*.safetensors")))


def _codes(change: Callable[[Tensor], Tensor]) -> Rewrite:
    """Changes the packed codes."""
    return lambda name, tensor: change(tensor) if tensor.dtype is torch.uint8 else tensor


def _scales(change: Callable[[Tensor], Tensor]) -> Rewrite:
    """Changes the scales."""
    return lambda name, tensor: change(tensor) if name.endswith("weight_scale") else tensor


def _big_endian(scale: Tensor) -> Tensor:
    return scale.view(torch.uint8).flip(0).view(torch.float32)


_states = partial(
    Defect,
    stage=Stage.CONFIGURATION,
    check="configuration.quantization_consistent",
    alive=stated,
)
_stores = partial(
    Defect,
    stage=Stage.EXPORT,
    check="configuration.quantization_consistent",
    alive=stored,
)

DEFECTS = (
    _states(
        id="Q03_states_the_other_convention",
        title="The configuration says that scales divide, and they multiply",
        shows="digits_stored_scales_that_differ is 6 modules",
        subject=lambda: States(scale_convention="divide"),
        source="Blaizzy/mlx-lm#1",
        subtlety=2,
    ),
    _states(
        id="Q18_excludes_nothing",
        title="The list of modules left in full precision is empty",
        shows="bytes_unaccounted is embedding, head",
        subject=lambda: States(excluded=()),
        source="huggingface/transformers#45734",
        subtlety=3,
    ),
    _states(
        id="Q19_excludes_a_ternary_module",
        title="A module on the list of exclusions is quantized all the same",
        shows="digits_excluded_but_ternary is stem",
        subject=lambda: States(excluded=("stem",)),
        source="sgl-project/sglang#37848",
        subtlety=4,
    ),
    _states(
        id="V06_extends_its_exclusions",
        title="The list of exclusions is extended by each task that is asked for",
        shows="digits_stated_again is False",
        subject=ExtendsItsExclusions,
        alive=stated_again,
        source="huggingface/transformers replace_with_bitnet_linear",
        subtlety=4,
    ),
    _states(
        id="five_levels_a_row",
        title="Weights have five levels in each row",
        shows="granularity 'row'",
        subject=FiveLevelsARow,
        subtlety=3,
    ),
    _states(
        id="latent_weights_in_the_forward",
        title="The forward uses the latent weights",
        shows="digits_stated_but_not_ternary is",
        subject=LatentWeightsInForward,
        subtlety=2,
    ),
    _states(
        id="P11_packs_rows_in_reverse",
        title="Codes are packed in another order than the layout that is stated",
        shows="digits_packed_bytes is",
        subject=PacksInReverse,
        alive=observe.packed,
        source="amd/Quark#30",
        subtlety=3,
    ),
    _stores(
        id="Q03_stores_the_reciprocal",
        title="The stored scale is the reciprocal of the one that multiplies",
        shows="digits_stored_scales_that_differ is 6 modules",
        subject=lambda: Stores(_scales(lambda scale: 1 / scale)),
        source="microsoft/BitNet#616",
        subtlety=2,
    ),
    _stores(
        id="Q17_stores_the_scale_of_codes",
        title="The export quantizes weights that are quantized: scales shrink by the zeros",
        shows="digits_stored_scales_that_differ is 6 modules",
        subject=StoresScaleOfCodes,
        source="microsoft/BitNet convert-hf-to-gguf-bitnet.py",
        subtlety=3,
    ),
    _stores(
        id="P14_stores_scales_rounded",
        title="Stored scales have the precision of bfloat16",
        shows="digits_stored_scales_that_differ is",
        subject=lambda: Stores(_scales(lambda scale: scale.bfloat16().float())),
        source="microsoft/BitNet gpu/convert_checkpoint.py",
        subtlety=5,
    ),
    _stores(
        id="P04_stores_scales_big_endian",
        title="Stored scales have the byte order of another machine",
        shows="digits_stored_scales_that_differ is 6 modules",
        subject=lambda: Stores(_scales(_big_endian)),
        source="ggml-org/llama.cpp#12863",
        subtlety=2,
    ),
    _stores(
        id="P13_stores_three_scales",
        title="Three copies of the scale are stored where one is stated",
        shows="digits_stored_scales is 0 modules, expected 6",
        subject=lambda: Stores(_scales(lambda scale: scale.repeat(3))),
        source="microsoft/T-MAC a34d844",
        subtlety=2,
    ),
    _stores(
        id="P11_stores_rows_in_reverse",
        title="Stored codes have their rows in reverse",
        shows="digits_stored_codes_that_differ is 6 modules",
        subject=lambda: Stores(_codes(lambda codes: codes.flip(0))),
        source="amd/Quark#30",
        subtlety=3,
    ),
    _stores(
        id="P09_stores_transposed",
        title="Stored codes lie by columns; a reader of its own would turn them back",
        shows="digits_stored_codes is 0 modules, expected",
        subject=lambda: Stores(_codes(lambda codes: codes.t())),
        source="intel/intel-extension-for-transformers#1407",
        subtlety=2,
    ),
    _stores(
        id="codes_garbled_under_a_prefix",
        title="Stored codes are garbled, under names with a prefix of the writer's own",
        shows="digits_stored_codes_that_differ is 6 modules",
        subject=lambda: Stores(_codes(lambda codes: codes ^ 0x55), prefix="model."),
        subtlety=3,
    ),
)

BENIGN = (
    Benign(
        id="names_with_a_prefix",
        title="Stored names have a prefix in front of the module's own, as transformers writes",
        subject=lambda: Stores(lambda name, tensor: tensor, prefix="model."),
        checks=("configuration.quantization_consistent",),
    ),
)
