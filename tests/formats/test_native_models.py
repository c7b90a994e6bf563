"""The native package of a model that is known: its tensors are those of its configuration."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_harness.errors import CheckpointError, DamagedCheckpointError
from forge_harness.model import ByteLM, ByteLMConfig, DigitsConfig, DigitsModel

from .memory import MemoryCheckpoint, hf_checkpoint, memory_checkpoint, random_ternary
from .native_maker import (
    make,
    read_all,
    refuse,
    vouch,
    written,
)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return make(tmp_path)


HF_NAMES = sorted(hf_checkpoint().infos)


def reference(model: torch.nn.Module, family: str) -> MemoryCheckpoint:
    """The state dict of a model, as the model itself names and shapes it."""
    state = {k: v.detach() for k, v in model.state_dict().items() if k != "head.weight"}
    tied = {"head.weight": "embedding.weight"}
    if family == "digits":
        state, tied = dict(model.state_dict()), {}
    ternary = {f"{name}.weight" for name in model.quantized_names()}  # type: ignore[operator]
    coded = {k: random_ternary(*v.shape, scales=(0.1,)) for k, v in state.items() if k in ternary}
    others = {k: v for k, v in state.items() if k not in ternary}
    config = asdict(model.config)  # type: ignore[arg-type]
    return memory_checkpoint(coded, others, family=family, config=config, tied=tied)


@settings(max_examples=20)
@given(
    layers=st.integers(1, 3),
    heads=st.integers(1, 3),
    hidden=st.integers(1, 9),
    sub_norm=st.booleans(),
    fused=st.booleans(),
)
def test_every_byte_lm_is_as_its_configuration_says(
    layers: int, heads: int, hidden: int, sub_norm: bool, fused: bool
) -> None:
    config = ByteLMConfig(
        vocabulary=11,
        width=4 * heads,
        layers=layers,
        heads=heads,
        hidden=hidden,
        sub_norm=sub_norm,
        fused_qkv=fused,
    )
    with TemporaryDirectory() as root:
        source = reference(ByteLM(config), "byte-lm")
        assert set(read_all(written(source, Path(root) / "p"))) == set(source.infos)


@settings(max_examples=10)
@given(
    width=st.integers(1, 9), hidden=st.integers(1, 9), blocks=st.integers(0, 3), sub=st.booleans()
)
def test_every_digits_model_is_as_its_configuration_says(
    width: int, hidden: int, blocks: int, sub: bool
) -> None:
    config = DigitsConfig(inputs=5, width=width, hidden=hidden, blocks=blocks, sub_norm=sub)
    with TemporaryDirectory() as root:
        source = reference(DigitsModel(config), "digits")
        assert set(read_all(written(source, Path(root) / "p"))) == set(source.infos)


def source_of(family: str) -> MemoryCheckpoint:
    if family == "bitnet":
        return hf_checkpoint()
    if family == "digits":
        return reference(DigitsModel(DigitsConfig(width=8, hidden=4)), family)
    return reference(ByteLM(ByteLMConfig(width=8, heads=2, hidden=4, sub_norm=True)), family)


def rewrite(
    directory: Path,
    change: Callable[[dict[str, torch.Tensor], dict], object],
) -> None:
    """Changes tensors and forge.json together, and vouches for the result."""
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file as save

    stored = load(directory / "model.safetensors")
    config = json.loads((directory / "forge.json").read_bytes())
    change(stored, config)
    save(stored, directory / "model.safetensors")
    (directory / "forge.json").write_text(json.dumps(config))
    vouch(directory)


def drop(name: str) -> Callable[[dict[str, torch.Tensor], dict], object]:
    def change(stored: dict[str, torch.Tensor], config: dict) -> None:
        stored.pop(name)
        stored.pop(f"{name}_scale", None)
        config["quantized"].pop(name, None)

    return change


@pytest.mark.parametrize("family", ["bitnet", "byte-lm", "digits"])
def test_any_missing_or_wrong_tensor_of_a_known_model_is_named(tmp_path: Path, family: str) -> None:
    source = source_of(family)
    for name in source.infos:
        directory = written(source, tmp_path / "p")
        rewrite(directory, drop(name))
        if name in source.tied.values():
            refuse(directory, f"tied to '{name}', which is not stored")
        else:
            refuse(directory, f"'{name}' is missing", tensor=name)
        if name in source.others:
            written(source, directory)
            longer = torch.zeros(*source.others[name].shape, 1)
            rewrite(directory, lambda stored, _: stored.update({name: longer}))  # noqa: B023
            with pytest.raises(DamagedCheckpointError, match=r"has shape"):
                read_all(directory)


@pytest.mark.parametrize("family", ["bitnet", "byte-lm", "digits"])
def test_left_over_tensor_of_a_known_model_is_named(tmp_path: Path, family: str) -> None:
    directory = written(source_of(family), tmp_path / "p")
    rewrite(directory, lambda stored, _: stored.update({"extra.weight": torch.ones(2, 2)}))
    refuse(directory, "is left over", tensor="extra.weight")


def test_tied_head_of_a_byte_lm_must_be_there(tmp_path: Path) -> None:
    directory = written(source_of("byte-lm"), tmp_path / "p")
    rewrite(directory, lambda _, config: config["tied"].clear())
    refuse(directory, "is missing", tensor="head.weight")


@pytest.mark.parametrize(
    ("config", "what"),
    [({"layers": 10**12}, "layers 1000000000000, and only"), ({"width": "8"}, "wrong")],
)
def test_configuration_that_no_model_has_is_refused(
    tmp_path: Path, config: dict, what: str
) -> None:
    directory = written(source_of("byte-lm"), tmp_path / "p")
    rewrite(directory, lambda _, c: c["model"]["config"].update(config))
    with pytest.raises(CheckpointError, match=what):
        read_all(directory)
