"""The C++ kernels on their own: under sanitizers, and for another processor in an emulator."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CPU = ROOT / "kernels" / "csrc" / "cpu"
DRIVER = Path(__file__).with_name("cpp") / "driver.cpp"
COMMON = (
    "buffer",
    "linear",
    "openmp",
    "pack_blocks",
    "pack_i2",
    "pack_tq",
    "path_scalar",
    "threads",
)
FLAGS = ("-std=c++17", "-ffp-contract=off", "-w", f"-I{ROOT / 'kernels' / 'csrc'}")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni")
X86 = {
    "path_vnni": AVX512,
    "path_amx": (*AVX512, "-mgfni"),
    "path_avxvnni": ("-mavx2",),
    "path_avx2": ("-mavx2",),
}
NEON = {"path_neon": ("-march=armv8.2-a+dotprod",)}


def build(folder, compiler, options, paths, *defines):
    """Compiles the driver with its paths, each with its own flags; returns the program."""
    units = {CPU / f"{name}.cpp": () for name in COMMON} | {DRIVER: ()}
    units |= {CPU / f"{name}.cpp": flags for name, flags in paths.items()}
    command = [compiler, *FLAGS, *options, *(f"-D{define}" for define in defines)]
    running = []
    for source, flags in units.items():
        target = folder / f"{source.stem}.o"
        # What it compares with is no kernel: instrumented, it would be most of the time.
        plain = ("-fno-sanitize=all", "-O2") if source is DRIVER else ()
        call = [*command, *flags, *plain, "-c", str(source), "-o", str(target)]
        running.append((target, subprocess.Popen(call, stderr=subprocess.PIPE, text=True)))
    for target, process in running:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, f"{target.name}: {errors[-2000:]}"
    program = folder / "driver"
    objects = [str(target) for target, _ in running]
    link = [compiler, *options, *objects, "-o", str(program), "-lpthread", "-ldl"]
    subprocess.run(link, check=True, capture_output=True, timeout=120)
    return program


needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@needs_gxx
@pytest.mark.parametrize(
    "sanitizer", ["address,undefined", "thread"], ids=["address-undefined", "thread"]
)
def test_the_kernels_are_clean_under_sanitizers(sanitizer, tmp_path):
    options = ("-O1", "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all")
    program = build(tmp_path, "g++", options, X86, "FORGE_X86", "FORGE_AVXVNNI", "FORGE_AMX")
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert done.stdout.endswith("wrong: 0\n")
    assert "scalar: 0 wrong" in done.stdout


@needs_gxx
@pytest.mark.parametrize(
    ("sound", "beyond"),
    [("b < w.kblocks", "b <= w.kblocks"), ("float_of(narrow[c])", "float_of(narrow[c + 1])")],
    ids=["block", "bf16"],
)
def test_the_sanitizer_sees_what_it_is_there_for(sound, beyond, tmp_path):
    """A path that reads one block, or one value, too many must not pass."""
    broken = tmp_path / "path_scalar.cpp"
    source = (CPU / "path_scalar.cpp").read_text()
    assert sound in source
    broken.write_text(
        source.replace(sound, beyond).replace(
            '#include "tile.inl"', f'#include "{CPU / "tile.inl"}"'
        )
    )
    options = ("-O1", "-g", "-fsanitize=address", f"-I{CPU}", *FLAGS)
    names = [n for n in COMMON if n != "path_scalar"]
    units = [str(broken), str(DRIVER), *(str(CPU / f"{n}.cpp") for n in names)]
    program = tmp_path / "driver"
    command = ["g++", *options, *units, "-o", str(program), "-lpthread", "-ldl"]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


@pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-g++") is None or shutil.which("qemu-aarch64") is None,
    reason="no AArch64 compiler and emulator (g++-aarch64-linux-gnu, qemu-user)",
)
def test_the_neon_path_is_exact_in_an_emulator(tmp_path):
    options = ("-O2", "-static")
    program = build(tmp_path, "aarch64-linux-gnu-g++", options, NEON, "FORGE_NEON")
    done = subprocess.run(
        ["qemu-aarch64", str(program)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "neon-dotprod: 0 wrong" in done.stdout
