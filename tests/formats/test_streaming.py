"""Conversion holds one tensor and its output: the peak of a child process over one big tensor."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from forge_harness.formats.safetensors_file import SafetensorsWriter, TensorSpec

ROWS, COLUMNS, COUNT = 16384, 4096, 4
PACKED_BYTES = ROWS // 4 * COLUMNS
LIMIT = 3
"""Times the largest tensor: itself, its output, and what is unpacked at a time."""
CHILD = """
import resource, sys
from pathlib import Path
from forge_harness.formats.convert import convert
small, big, out, to = sys.argv[1:]
convert(Path(small), Path(out + "-small"), to, compare=False)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(Path(big), Path(out), to, compare=False)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def make(directory, rows, columns, count):
    directory.mkdir()
    names = [f"layers.{index}.weight" for index in range(count)]
    specs = [TensorSpec(name, "U8", (rows // 4, columns)) for name in names]
    specs += [TensorSpec(f"{name}_scale", "F32", (1,)) for name in names]
    # 0b10010010: fields 2, 0, 1, 2.
    packed = torch.full((rows // 4, columns), 0b10010010, dtype=torch.uint8)
    with SafetensorsWriter(directory / "model.safetensors", specs) as writer:
        for name in writer.order:
            scale = name.endswith("_scale")
            writer.write(name, torch.tensor([0.05]) if scale else packed)
    quantization = {"quant_method": "bitnet", "linear_class": "autobitlinear"}
    config = {"model_type": "forge-unknown", "quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    return make(root / "small", 256, 256, 2), make(root / "big", ROWS, COLUMNS, COUNT)


@pytest.mark.parametrize("to", ["native", "hf-packed", "gguf-tq1_0", "gguf-tq2_0"])
def test_the_peak_is_a_few_times_the_largest_tensor(to, sources, tmp_path):
    command = [sys.executable, "-c", CHILD, *map(str, sources), str(tmp_path / "out"), to]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    assert int(done.stdout) <= LIMIT * PACKED_BYTES
