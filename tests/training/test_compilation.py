"""Compiled steps: what they need is asked for by name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import torch

from forge_harness.training.compilation import Compiled


def test_the_switch_is_as_it_was_also_after_an_error():
    before = torch.are_deterministic_algorithms_enabled()
    compiled = Compiled()
    compiled.__enter__()
    assert torch.are_deterministic_algorithms_enabled()
    compiled.__exit__(ValueError, ValueError("mine"), None)
    assert torch.are_deterministic_algorithms_enabled() == before


def test_a_missing_compiler_is_a_sentence(tmp_path):
    """It was an internal error, after the data had been read."""
    (tmp_path / "forge.toml").write_text("[train]\ncompile = true\n")
    only_python = tmp_path / "bin"
    only_python.mkdir()
    (only_python / "python").symlink_to(shutil.which(sys.executable))
    environment = {name: value for name, value in os.environ.items() if name != "CXX"}
    environment |= {"PATH": str(only_python), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "forge_harness", "train", "--task", "digits", "--steps", "1"]
    done = subprocess.run(
        [*command, "--out", "run"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 4, done.stderr
    assert "compile needs a C++ compiler" in done.stderr
    assert "install g++" in done.stderr
