"""Decoders written from docs/formats.md and ggml's layouts alone, one field at a time, in numpy.

Slow and obvious on purpose; nothing here is shared with the package or with the fixtures' maker.
"""

from __future__ import annotations

import json
import struct

import numpy as np

FLOATS = {"F32": "<f4", "F16": "<f2"}


def safetensors(path):
    """Name -> (dtype, shape, bytes)."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    data = raw[8 + length :]
    return {
        name: (e["dtype"], tuple(e["shape"]), data[slice(*e["data_offsets"])])
        for name, e in header.items()
    }


def floating(entry):
    """A float tensor as float32."""
    dtype, shape, data = entry
    if dtype == "BF16":
        wide = np.frombuffer(data, "<u2").astype("<u4") << 16
        return wide.view("<f4").reshape(shape)
    return np.frombuffer(data, FLOATS[dtype]).astype(np.float32).reshape(shape)


def row_blocks(entry, rows):
    """Row-block bytes -> codes (rows, K)."""
    _, (quarter, columns), data = entry
    codes = np.empty((rows, columns), np.int8)
    for row in range(rows):
        for column in range(columns):
            byte = data[(row % quarter) * columns + column]
            codes[row, column] = (byte // 4 ** (row // quarter)) % 4 - 1
    return codes


def native(directory):
    """Weight name -> (codes, scales, parts)."""
    description = json.loads((directory / "forge.json").read_text())
    stored = safetensors(directory / "model.safetensors")
    return {
        name: (
            row_blocks(stored[name], shape["shape"][0]),
            floating(stored[f"{name}_scale"]),
            shape["parts"],
        )
        for name, shape in description["quantized"].items()
    }


def native_09(directory):
    """Weight name -> (codes, scales, parts) of the predecessor."""
    description = json.loads((directory / "config.json").read_text())
    stored = safetensors(directory / "weights.safetensors")
    found = {}
    for module, (rows, columns) in description["layers"].items():
        _, (_, width), data = stored[f"{module}.codes"]
        codes = np.empty((rows, columns), np.int8)
        for row in range(rows):
            for column in range(columns):
                byte = data[row * width + column // 4]
                codes[row, column] = (byte >> (6 - 2 * (column % 4))) % 4 - 1
        scale = np.float32(1) / floating(stored[f"{module}.inv_scale"])
        found[f"{module}.weight"] = (codes, scale, [rows])
    return found


def hf_packed(directory, *, divide):
    """Weight name -> (codes, scales, parts)."""
    stored = {}
    for path in directory.glob("*.safetensors"):
        stored |= safetensors(path)
    found = {}
    for name, entry in stored.items():
        if entry[0] == "U8":
            scale = floating(stored[f"{name}_scale"])
            rows = 4 * entry[1][0]
            found[name] = (row_blocks(entry, rows), 1 / scale if divide else scale, [rows])
    return found


def tq2_0(data, rows, columns):
    """66-byte blocks of 256 values -> codes, and the d of every block."""
    codes = np.empty((rows, columns), np.int8)
    d = np.empty((rows, columns // 256), np.float16)
    for row in range(rows):
        for block in range(columns // 256):
            start = (row * (columns // 256) + block) * 66
            for value in range(256):
                half, within = divmod(value, 128)
                shift, byte = divmod(within, 32)
                field = data[start + 32 * half + byte] >> (2 * shift) & 3
                codes[row, 256 * block + value] = field - 1
            d[row, block] = np.frombuffer(data[start + 64 : start + 66], "<f2")[0]
    return codes, d


def tq1_0(data, rows, columns):
    """54-byte blocks of 256 values -> codes, and the d of every block."""
    codes = np.empty((rows, columns), np.int8)
    d = np.empty((rows, columns // 256), np.float16)
    for row in range(rows):
        for block in range(columns // 256):
            start = (row * (columns // 256) + block) * 54
            for value in range(256):
                if value < 160:
                    digit, byte = divmod(value, 32)
                elif value < 240:
                    digit, byte = divmod(value - 160, 16)
                    byte += 32
                else:
                    digit, byte = divmod(value - 240, 4)
                    byte += 48
                shifted = data[start + byte] * 3**digit % 256
                codes[row, 256 * block + value] = (shifted * 3 >> 8) - 1
            d[row, block] = np.frombuffer(data[start + 52 : start + 54], "<f2")[0]
    return codes, d


def dense(directory, kind):
    """Weight name -> (codes, scales, parts) of float weights: "codes", "fake" or "masters"."""
    stored = safetensors(directory / "model.safetensors")
    found = {}
    for name, entry in stored.items():
        if not name.endswith("_proj.weight"):
            continue
        values = floating(entry).astype(np.float64)
        if kind == "codes":
            codes, scale = values, floating(stored[f"{name}_scale"])[0]
        elif kind == "fake":
            scale = np.abs(values).max()
            codes = values / scale
        else:
            scale = np.abs(values).mean()
            codes = np.clip(np.rint(values / scale), -1, 1)
        found[name] = (codes.astype(np.int8), np.array([scale], np.float32), [len(codes)])
    return found


def i2_s(data, rows, columns, layout):
    """Code bytes and a 32-byte tail -> codes and scale."""
    codes = np.empty(rows * columns, np.int8)
    for value in range(rows * columns):
        row, column = divmod(value, columns)
        if layout == "x86-rows":
            byte, shift = (row // 4) * columns + column, 6 - 2 * (row % 4)
        else:
            group = 128 if layout == "x86-act" else 64
            block, within = divmod(value, group)
            byte = block * group // 4 + within % (group // 4)
            shift = 6 - 2 * (within // (group // 4))
        codes[value] = (data[byte] >> shift) % 4 - 1
    scale = np.frombuffer(data[rows * columns // 4 :][:4], "<f4")
    return codes.reshape(rows, columns), scale
