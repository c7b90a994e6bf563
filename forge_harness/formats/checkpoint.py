"""What every reader offers, whatever the files look like: names, ternary tensors, the rest.

Names are state-dict keys with their ".weight", in the model family's own spelling. A tensor is
*ternary* when the model multiplies by its codes, however the file stores it; its name is that of
the weight, and its scales are part of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor

from forge_harness.errors import CheckpointError

from .tensors import TernaryTensor

Kind = Literal["ternary", "plain"]
ScaleConvention = Literal["multiply", "divide"]
I2SLayout = Literal["x86-act", "arm", "x86-rows"]

FORMATS = ("hf-packed", "hf-online", "gguf-tq1_0", "gguf-tq2_0", "native")
"""What `convert` writes."""
READ_ONLY = (
    "native-0.9",
    "hf-unpacked",
    "hf-fake-quant",
    "legacy-safetensors",
    "legacy-pt",
    "gguf-i2_s",
    "gguf-float",
)
"""What is only read. Unpacked: float codes with a scale. Fake-quant: dense codes * scale."""
IMPORTED = ("hf-online", "hf-fake-quant", "legacy-safetensors", "legacy-pt")
"""What holds no codes, so that its matrices are chosen when it is read."""
STATES_CONVENTION = ("hf-packed", "hf-unpacked")
"""What holds codes beside scales of either convention."""


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """What the files cannot say and the user must; None: not told, and never guessed.

    Attributes:
        scale_convention: Whether a stored `weight_scale` multiplies codes or divides them.
        i2s_layout: Which of the three byte layouts a GGUF file of type I2_S has.
        quantize: Shell patterns of 2-D weights to quantize when importing full precision; None:
            the default rule of the importer, which it reports.
        exclude: Patterns that win over `quantize`.
    """

    scale_convention: ScaleConvention | None = None
    i2s_layout: I2SLayout | None = None
    quantize: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class WriteOptions:
    """Choices within a format.

    Attributes:
        scale_convention: hf-packed: "multiply" (autobitlinear) or "divide" (bitlinear). None:
            "multiply", unless a ternary layer has a bias, which autobitlinear would multiply too.
        gguf_scale: "block": d = fp16(scale) in every block, which any reader understands;
            "tensor": d = 1 and the exact scale in an F32 tensor `<name>.scale`, which llama.cpp's
            bitnet graph multiplies after the product.
        master_dtype: hf-online: dtype of weights made from codes ("F32" keeps the scale to one
            rounding; "BF16" moves it by up to 2**-8). Stored masters are copied as they are.
    """

    scale_convention: ScaleConvention | None = None
    gguf_scale: Literal["block", "tensor"] = "block"
    master_dtype: Literal["F32", "BF16"] = "F32"


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """What the files say about the model.

    Attributes:
        family: "bitnet" or "llama" (transformers' model types), another model type, "byte-lm",
            "digits" (this package's models), or "unknown".
        config: The family's own configuration, JSON; quantization is not part of it.
    """

    family: str
    config: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint, known without reading its data.

    Attributes:
        name: State-dict key.
        kind: "ternary" or "plain".
        shape: Sizes of the tensor itself, unpacked: (N, K) when ternary.
        layout: How the file stores it: a dtype ("F32", "BF16"), "i2-rowblock", "TQ2_0", ...
        nbytes: Stored bytes, scales and padding included.
        parts: Row counts of the scale groups of a ternary tensor; () when plain.
        master: Whether the file stores the full-precision weight the codes are derived from.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    layout: str
    nbytes: int
    parts: tuple[int, ...] = ()
    master: bool = False


@dataclass(frozen=True, slots=True)
class Detection:
    """What files are, from the files alone.

    Attributes:
        format: One of `FORMATS` or `READ_ONLY`.
        reasons: What was seen, one clause each, in the order it was looked for.
        version: Version of the format where it has one.
        questions: What the files do not say and an option must, one sentence each, naming the
            option. `open_checkpoint` refuses with them while they are open.
    """

    format: str
    reasons: tuple[str, ...]
    version: str | None = None
    questions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Anomaly:
    """Something a reader noticed that does not make the file unreadable.

    Attributes:
        what: One sentence.
        tensor: Name of the tensor, or "".
    """

    what: str
    tensor: str = ""


@dataclass
class Checkpoint(ABC):
    """An open checkpoint. Tensors are read when asked for; memory holds one at a time.

    Attributes:
        format: One of `FORMATS` or `READ_ONLY`.
        path: File or directory.
        model: What the files say about the model.
        infos: Every tensor by name, in the order of the files.
        version: Version of the format where it has one.
        tied: Alias -> name of tensors that are stored once.
        quantization: Facts about codes and scales: `scale_convention`, `packing`, ...
        anomalies: What deserves a look.
        extras: Further JSON the format carries (step, targets, lineage).
        unread: Names of files beside those that were read, which no conversion carries over.
    """

    format: str
    path: Path
    model: ModelDescription
    infos: Mapping[str, TensorInfo]
    version: str | None = None
    tied: Mapping[str, str] = field(default_factory=dict)
    quantization: Mapping[str, Any] = field(default_factory=dict)
    anomalies: list[Anomaly] = field(default_factory=list)
    extras: Mapping[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = ()

    @abstractmethod
    def ternary(self, name: str) -> TernaryTensor:
        """Reads a ternary tensor.

        Raises:
            DamagedCheckpointError: With the tensor's name and the byte or value at fault.
        """

    def scales(self, name: str) -> Tensor:
        """Returns the scales of a ternary tensor, fp32 (P,); cheaper than its codes where it can.

        Raises:
            DamagedCheckpointError: As `ternary`.
        """
        return self.ternary(name).scales

    @abstractmethod
    def plain(self, name: str) -> Tensor:
        """Reads any other tensor, in its stored dtype.

        Raises:
            DamagedCheckpointError: With the tensor's name and what is wrong.
        """

    def master(self, name: str) -> Tensor:
        """Reads the full-precision weight of a ternary tensor, in its stored dtype.

        Where the file stores none, one is made that quantizes to the stored codes and scales: with
        p the share of codes that are not 0, codes * scale / p has absmean `scale`. (codes * scale
        itself would shrink the scale by p at every pass.) fp32.
        """
        return master_of(self.ternary(name))

    @abstractmethod
    def close(self) -> None:
        """Closes the files; reading is over."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def ternary_names(self) -> list[str]:
        """Names of the ternary tensors."""
        return [name for name, info in self.infos.items() if info.kind == "ternary"]

    def plain_names(self) -> list[str]:
        """Names of the others."""
        return [name for name, info in self.infos.items() if info.kind == "plain"]


def master_of(ternary: TernaryTensor) -> Tensor:
    """Returns an fp32 weight (N, K) whose absmean quantization gives these codes and scales."""
    master = torch.empty(ternary.shape)
    for start, stop in ternary.chunks():
        master[start:stop] = ternary.codes(start, stop).float()
    for part, scale in zip(torch.split(master, list(ternary.parts)), ternary.scales, strict=True):
        nonzero = int(part.count_nonzero())
        part *= scale * (part.numel() / nonzero) if nonzero else 0.0
    return master


def biases_of(names: Container[str], weights: Iterable[str]) -> dict[str, str]:
    """Returns weight -> bias for the layers that have one among `names`."""
    found = {weight: weight.removesuffix("weight") + "bias" for weight in weights}
    return {weight: bias for weight, bias in found.items() if bias in names}


def refuse_layer_norms(checkpoint: Checkpoint, target: str) -> None:
    """Refuses a model whose ternary layers normalise their own inputs where nothing would do so.

    Raises:
        CheckpointError: The checkpoint has `use_rms_norm`.
    """
    if checkpoint.quantization.get("use_rms_norm"):
        raise CheckpointError(
            f"{checkpoint.path} has use_rms_norm true: every ternary layer normalises its own "
            f"input, and {target} has no such norm; use transformers, or convert to hf-packed or "
            "hf-online."
        )


def files_beside(directory: Path, read: Collection[str]) -> tuple[str, ...]:
    """Returns the names of a directory's other files; hidden ones are of whatever fetched it."""
    names = {entry.name for entry in directory.iterdir() if not entry.is_dir()}
    return tuple(sorted(name for name in names.difference(read) if not name.startswith(".")))


def unknown_format(path: Path, why: str) -> CheckpointError:
    """Returns the error for files that are no checkpoint this package reads."""
    return CheckpointError(
        f"{str(path)!r} is no checkpoint that can be read: {why}. Readable: {', '.join(FORMATS)}, "
        f"{', '.join(READ_ONLY)}."
    )
