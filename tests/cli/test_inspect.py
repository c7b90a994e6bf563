"""inspect: what a stranger's names may do to a terminal, which is nothing."""

import json
import struct

import numpy as np


def checkpoint(path, names):
    entries, position = {}, 0
    for name in names:
        entries[name] = {
            "dtype": "F32",
            "shape": [4, 300],
            "data_offsets": [position, position + 4800],
        }
        position += 4800
    raw = json.dumps(entries).encode()
    values = np.zeros(position // 4, "f4")
    values[:3] = 1  # A density no trained weight has: each is named as odd.
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + values.tobytes())
    return path


def test_names_move_no_cursor_and_make_no_lines(invoke, tmp_path):
    names = ["a\x1b[2J.weight", "b\nSound: all is well.weight", "c\u202e.weight"]
    plain = invoke(
        "inspect", checkpoint(tmp_path / "plain.safetensors", ["a.weight", "b.weight", "c.weight"])
    )
    result = invoke("inspect", checkpoint(tmp_path / "model\x1b[2J.safetensors", names))
    assert result.exit_code == plain.exit_code == 0
    assert "Odd: " in plain.stdout
    assert all(line.isprintable() for line in result.stdout.splitlines())
    assert len(result.stdout.splitlines()) == len(plain.stdout.splitlines())
    assert r"Odd: a\x1b[2J.weight: density" in result.stdout
