"""The quantization a configuration states, held against the weights in memory and in files."""

import copy
from urllib.parse import quote

import pytest

from forge_harness import oracles
from forge_harness.probes.wrapped import inner_model
from forge_harness.protocols import ExportsWeights, Packs, TrainOptions, Trains

PACKING = "i2-rowblock"
"""The one layout that `oracles.pack_row_blocks` defines."""


@pytest.mark.forge_check("configuration.quantization_consistent")
def test_quantization_consistent(subject, evidence, tmp_path):
    """The quantization the configuration states is that of the weights: modules, scale, packing.

    The two scale conventions differ by a factor of absmean squared and load alike; a swapped
    packing order keeps every statistic. Oracles: the weights the forward uses; a column of eight
    codes whose packed bytes are written down; the exported files, read by the safetensors
    library and packed again by the layout's definition. Codes and scale of every quantized module
    must be found in them; a layout without a definition here is not measured.
    """
    unknown = set()
    before = {task: copy.deepcopy(subject.quantization_info(task)) for task in subject.tasks()}
    for task in subject.tasks():
        info = subject.quantization_info(task)
        evidence.equal(
            f"{task}_stated_again",
            _stated(info) == _stated(before[task]),
            expected=True,
            reason="what is stated of a task does not depend on what was asked before",
        )
        model = subject.build_model(task, seed=0)
        effective = subject.effective_weights(model)
        _modules(task, info, model, effective, evidence)
        if isinstance(subject, Packs) and info.packing == PACKING:
            _packing(subject, task, evidence)
        if isinstance(subject, Trains) and isinstance(subject, ExportsWeights):
            session = subject.session(task, TrainOptions(seed=0, steps=1))
            path = tmp_path / f"export-{quote(task, safe='')}"
            subject.export_package(session, path)
            effective = subject.effective_weights(inner_model(session.model, model))
            if info.packing == PACKING:
                _files(task, info, effective, path, evidence)
            else:
                unknown.add(info.packing)
    if unknown:
        pytest.skip(f"packing {', '.join(sorted(unknown))}; only {PACKING} can be read here")


def _stated(info):
    fields = (info.scale_convention, info.packing, info.granularity)
    return (*fields, tuple(info.excluded))


def _modules(task, info, model, effective, evidence):
    stated = set(info.excluded)
    quantized = {name for name, values in effective.items() if _is_ternary(info, values)}
    matrices = {name for name, module in model.named_modules() if _has_matrix(module)}
    for name, found, reason in (
        ("excluded_but_ternary", quantized & stated, "modules the configuration excludes"),
        (
            "stated_but_not_ternary",
            set(effective) - quantized,
            f"modules with more levels than granularity {info.granularity!r} allows",
        ),
        (
            "unaccounted",
            matrices - set(effective) - stated,
            "every module with a matrix is quantized or excluded by name",
        ),
    ):
        evidence.equal(
            f"{task}_{name}", ", ".join(sorted(found)) or "none", expected="none", reason=reason
        )


def _is_ternary(info, values):
    """At most three levels in each scale group; a part is made of whole rows."""
    groups = [values] if info.granularity == "tensor" else list(values)
    return all(len(group.unique()) <= 3 for group in groups)


def _has_matrix(module):
    return any(p.dim() >= 2 for p in module.parameters(recurse=False))


def _packing(subject, task, evidence):
    import numpy as np
    import torch

    codes = torch.as_tensor(np.asarray(oracles.KNOWN_CODES, dtype=np.int8)).reshape(-1, 1)
    packed = subject.pack(codes).flatten().tolist()
    evidence.equal(
        f"{task}_packed_bytes",
        " ".join(f"{byte:02x}" for byte in packed),
        expected=" ".join(f"{int(byte):02x}" for byte in np.ravel(oracles.KNOWN_BYTES)),
        reason="eight codes whose bytes are written down",
    )


def _files(task, info, effective, directory, evidence):
    """Stored codes and scales, found by module name, shape and dtype: names differ by project."""
    import torch

    stored = _by_module(_read(directory), effective)
    codes_found, scales_found, other_codes, other_scales = 0, 0, [], []
    for module, values in effective.items():
        own = stored[module]
        rows, columns = values.shape
        shape = (-(-rows // 4), columns)
        packed = [t for t in own if t.dtype is torch.uint8 and tuple(t.shape) == shape]
        if packed:
            codes_found += 1
            if not _same_bytes(packed[0], values):
                other_codes.append(module)
        scales = _group_scales(info, values)
        kept = [t for t in own if t.is_floating_point() and t.numel() == len(scales)]
        if kept:
            scales_found += 1
            expected = scales if info.scale_convention == "multiply" else 1 / scales
            if not torch.allclose(kept[0].double().flatten(), expected, oracles.SCALE_RTOL, 0):
                other_scales.append(f"{module}: {float(kept[0].flatten()[0]):.6g}")
    for name, count, found in (
        ("codes", codes_found, other_codes),
        ("scales", scales_found, other_scales),
    ):
        evidence.equal(
            f"{task}_stored_{name}",
            count,
            expected=len(effective),
            unit="modules",
            reason="quantized modules found in the export, by name, dtype and shape",
        )
        evidence.equal(
            f"{task}_stored_{name}_that_differ",
            len(found),
            expected=0,
            unit="modules",
            reason="; ".join(found[:3]) or f"{info.packing}, convention {info.scale_convention}",
        )


def _by_module(tensors, modules):
    """The tensors of each module; a writer may put a prefix of its own in front of the names."""
    stored = {module: [] for module in modules}
    for key, tensor in tensors.items():
        named = [module for module in modules if f".{module}." in f".{key}."]
        if named:
            stored[max(named, key=len)].append(tensor)
    return stored


def _read(directory):
    from safetensors.torch import load_file

    tensors = {}
    for path in sorted(directory.rglob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def _group_scales(info, values):
    """The scale of each group, off the values the forward uses: the largest magnitude."""
    import torch

    magnitudes = values.detach().double().abs()
    if info.granularity == "tensor":
        return magnitudes.max().reshape(1)
    rows = magnitudes.amax(1)
    return rows if info.granularity == "row" else torch.unique_consecutive(rows)


def _same_bytes(packed, values):
    import torch

    codes = values.detach().sign().to(torch.int8)
    padded = torch.nn.functional.pad(codes, (0, 0, 0, -codes.shape[0] % 4))
    return torch.equal(packed, torch.as_tensor(oracles.pack_row_blocks(padded)))
