"""A checkpoint of floats or codes over a source of tensors, whichever file they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from .checkpoint import Checkpoint
from .hf_files import TensorSource
from .tensors import TernaryTensor
from .weights import StoredWeight, absmean_scales, read_finite, read_weight


@dataclass
class FloatCheckpoint(Checkpoint):
    """Ternary weights stored any of four ways, by name, over a source of tensors."""

    source: TensorSource | None = None
    weights: Mapping[str, StoredWeight] = field(default_factory=dict)
    factors: Mapping[str, float] = field(default_factory=dict)
    """Plain tensor -> what multiplies its stored values."""
    _scales: dict[str, Tensor] = field(default_factory=dict)

    def ternary(self, name: str) -> TernaryTensor:
        """See `Checkpoint.ternary`."""
        return read_weight(self._source, self.weights[name], self._scales.get(name))

    def scales(self, name: str) -> Tensor:
        """See `Checkpoint.scales`; those of a master are averaged once."""
        if name not in self._scales:
            self._scales[name] = absmean_scales(self._source, self.weights[name])
        return self._scales[name]

    def plain(self, name: str) -> Tensor:
        """See `Checkpoint.plain`."""
        tensor = read_finite(self._source, name)
        factor = self.factors.get(name)
        return tensor if factor is None else tensor.float() * factor

    def master(self, name: str) -> Tensor:
        """See `Checkpoint.master`."""
        if self.infos[name].master:
            return read_finite(self._source, name)
        return super().master(name)

    def close(self) -> None:
        """See `Checkpoint.close`."""
        self._source.close()

    @property
    def _source(self) -> TensorSource:
        assert self.source is not None
        return self.source
