"""GPU kernels: exactness, then speed against cuBLAS and the memory, as two JSON files of evidence.

    PYTHONPATH=kernels python kernels/bench/gpu.py --out DIR --commit $(git rev-parse HEAD)

Needs torch with a GPU; imports nothing else of the harness. Every time is a median over replays of
a CUDA graph of many calls; candidates of a row take turns. Cold: the calls rotate through copies of
the weights that exceed the second-level cache twice, which is what decoding a model sees.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from forge_kernels import cuda, layout, reference
from forge_kernels.triton import ops

DECODE = [
    (2560, 2560), (3840, 2560), (13824, 2560), (2560, 6912),
    (3200, 3200), (4800, 3200), (3200, 10240), (20480, 3200),
]  # fmt: skip
PREFILL = [(512, 4096, 4096), (2048, 4096, 4096), (2048, 14336, 4096)]
DEVICE = "cuda"
Call = Callable[[], Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", default="unknown")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    about = environment(arguments.commit)
    print(about, flush=True)
    failed = 0
    for name, sections in (
        ("gpu-correctness", (exactness, extremes, linears, guards, graphs)),
        ("gpu-bench", (copy_bandwidth, decode, prefill, training)),
    ):
        found: dict[str, Any] = {"environment": about}
        for section in sections:
            try:
                found[section.__name__] = section()
            except Exception:
                found[section.__name__] = {"error": traceback.format_exc()}
                failed += 1
            print(section.__name__, json.dumps(found[section.__name__])[:3000], flush=True)
            content = json.dumps(found, indent=1, sort_keys=True)
            (arguments.out / f"{name}.json").write_text(content, encoding="utf-8")
    return 1 if failed else 0


def environment(commit: str) -> dict[str, Any]:
    import triton

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": torch.cuda.get_device_name(0),
        "driver": subprocess.run(query, capture_output=True, text=True).stdout.strip(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "commit": commit,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def weight(n: int, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, 2, (n, k), dtype=torch.int8, generator=generator)
    return codes, layout.pack_blocks(codes).to(DEVICE)


def backends(tokens: int) -> list[tuple[str, Any]]:
    few = [("cuda", cuda)] if tokens <= cuda.MOST_TOKENS else []
    return [*few, ("triton", ops)]


def exactness() -> dict[str, int]:
    """int32 sums against float64 on the CPU, which is exact here."""
    sizes = [(1, 1), (7, 5), (63, 16), (64, 17), (65, 64), (130, 129), (127, 1000), (640, 2560)]
    shapes = [(m, n, k) for m in (1, 2, 3, 8, 17, 64) for n, k in (*sizes, (2560, 6912))]
    wrong = compared = 0
    for m, n, k in shapes:
        codes, data = weight(n, k, seed=m)
        q = torch.randint(-128, 128, (m, k), dtype=torch.int8)
        expected = (q.double() @ codes.double().t()).to(torch.int32)
        for _, module in backends(m):
            found = module.ternary_matmul(q.to(DEVICE), data, n).cpu()
            wrong += int((found != expected).sum())
            compared += expected.numel()
    return {"shapes": len(shapes), "sums": compared, "wrong": wrong}


def extremes() -> dict[str, int]:
    """The largest sums, where a narrow accumulator overflows."""
    wrong = compared = 0
    for k in (2176, 4096, 16384):
        for value, code in ((127, 1), (-128, 1), (-128, -1), (127, 0)):
            data = layout.pack_blocks(torch.full((65, k), code, dtype=torch.int8)).to(DEVICE)
            for m in (1, 4, 33):
                q = torch.full((m, k), value, dtype=torch.int8, device=DEVICE)
                for _, module in backends(m):
                    found = module.ternary_matmul(q, data, 65)
                    wrong += int((found != k * value * code).sum())
                    compared += found.numel()
    return {"sums": compared, "wrong": wrong}


def linears() -> dict[str, Any]:
    """Outputs against the reference on the CPU, bit for bit."""
    rows = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        wrong = compared = 0
        for m, n, k in (
            (1, 65, 17),
            (1, 2560, 2560),
            (3, 130, 129),
            (8, 640, 6912),
            (33, 640, 2560),
        ):
            for rowwise in (False, True):
                codes, data = weight(n, k, seed=m)
                x = torch.randn(m, k) * torch.logspace(-4, 3, m)[:, None]
                x = x.to(dtype)
                scale = torch.rand(n if rowwise else 1) + 0.01
                bias = torch.randn(n) if rowwise else None
                y = reference.ternary_linear(x, codes, scale)
                expected = (y if bias is None else y + bias).to(dtype)
                for _, module in backends(m):
                    found = module.ternary_linear(
                        x.to(DEVICE),
                        data,
                        n,
                        scale.to(DEVICE),
                        None if bias is None else bias.to(DEVICE),
                    ).cpu()
                    wrong += int((found != expected).sum())
                    compared += expected.numel()
        rows[str(dtype)] = {"outputs": compared, "wrong": wrong}
    x = torch.randn(4, 64)
    x[1, 3], x[2, 5], x[3] = torch.nan, torch.inf, 0.0
    _, data = weight(65, 64)
    for name, module in backends(4):
        y = module.ternary_linear(x.to(DEVICE), data, 65, torch.ones(1, device=DEVICE)).cpu()
        rows[f"{name} not finite"] = [bool(y[i].isfinite().all()) for i in range(4)]
    return rows


def guards() -> dict[str, int]:
    """Nothing is written beside the output; what was in it does not show."""
    touched = wrong = 0
    for m, n, k in ((1, 1, 1), (1, 65, 17), (3, 63, 130), (17, 130, 33)):
        codes, data = weight(n, k)
        x = torch.randn(m, k)
        expected = reference.ternary_linear(x, codes, torch.ones(1))
        for _, module in backends(m):
            memory = torch.full((512 + m * n + 512,), float("nan"), device=DEVICE)
            memory[:512] = memory[-512:] = 77.0
            out = memory[512 : 512 + m * n].view(m, n)
            module.ternary_linear(x.to(DEVICE), data, n, torch.ones(1, device=DEVICE), out=out)
            touched += int((memory[:512] != 77.0).sum() + (memory[-512:] != 77.0).sum())
            wrong += int((out.cpu() != expected).sum())
    return {"touched": touched, "wrong": wrong}


def graphs() -> dict[str, int]:
    """A captured call, replayed on new activations, equals the call."""
    wrong = 0
    codes, data = weight(2560, 2560)
    scale = torch.ones(1, device=DEVICE)
    for m in (1, 8, 64):
        for _, module in backends(m):
            x = torch.randn(m, 2560, device=DEVICE, dtype=torch.bfloat16)
            y = torch.empty(m, 2560, device=DEVICE, dtype=torch.bfloat16)
            graph = captured(
                [lambda module=module, x=x, y=y: module.ternary_linear(x, data, 2560, scale, out=y)]
            )
            for _ in range(3):
                x.normal_()
                graph.replay()
                torch.cuda.synchronize()
                expected = reference.ternary_linear(x.cpu(), codes, torch.ones(1)).bfloat16()
                wrong += int((y.cpu() != expected).sum())
    return {"wrong": wrong}


def captured(calls: list[Call]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return graph


def timed(candidates: dict[str, list[Call]], replays: int = 25) -> dict[str, float]:
    """Median microseconds a call of each candidate; replays take turns."""
    graphs = {name: (captured(calls), len(calls)) for name, calls in candidates.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(replays):
        for name, (graph, count) in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times[name].append(1000 * start.elapsed_time(end) / count)
    return {name: statistics.median(values[3:]) for name, values in times.items()}


def copy_bandwidth() -> dict[str, float]:
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    took = timed({"copy": [lambda: target.copy_(source)]})["copy"]
    return {"microseconds": took, "gigabytes_per_second": 2 * source.nbytes / took / 1e3}


def copies(tensor: torch.Tensor) -> list[torch.Tensor]:
    wanted = 2 * torch.cuda.get_device_properties(0).L2_cache_size
    return [tensor.clone() for _ in range(min(64, max(2, -(-wanted // tensor.nbytes) + 1)))]


def decode() -> list[dict[str, Any]]:
    bandwidth = copy_bandwidth()["gigabytes_per_second"]
    return [decode_row(n, k, bandwidth) for n, k in DECODE]


def decode_row(n: int, k: int, bandwidth: float) -> dict[str, Any]:
    _, data = weight(n, k)
    scale = torch.ones(1, device=DEVICE)
    x = torch.randn(1, k, device=DEVICE, dtype=torch.bfloat16)
    q = torch.randint(-127, 128, (1, k), dtype=torch.int8, device=DEVICE)
    dense = torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16)
    y = torch.empty(1, n, device=DEVICE, dtype=torch.bfloat16)
    row: dict[str, Any] = {"n": n, "k": k, "packed_bytes": data.nbytes}
    for kind in ("cold", "hot"):
        packed = copies(data) if kind == "cold" else [data] * 8
        wide = copies(dense) if kind == "cold" else [dense] * 8
        wide *= -(-8 // len(wide))
        took = timed(
            {
                "cuda": [lambda d=d: cuda.ternary_linear(x, d, n, scale, out=y) for d in packed],
                "cuda int8 in": [lambda d=d: cuda.ternary_matmul(q, d, n) for d in packed],
                "triton": [lambda d=d: ops.ternary_linear(x, d, n, scale, out=y) for d in packed],
                "cublas bf16": [lambda w=w: F.linear(x, w) for w in wide],
            }
        )
        ours = [c for c in took if c != "cublas bf16"]
        row[kind] = {
            "microseconds": took,
            "times_cublas_bf16": {c: took["cublas bf16"] / took[c] for c in ours},
            "share_of_copy_bandwidth": {c: data.nbytes / took[c] / 1e3 / bandwidth for c in ours},
        }
    return row


def prefill() -> list[dict[str, Any]]:
    return [prefill_row(m, n, k) for m, n, k in PREFILL]


def prefill_row(m: int, n: int, k: int) -> dict[str, Any]:
    _, data = weight(n, k)
    scale = torch.ones(1, device=DEVICE)
    x = torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16)
    dense = torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16)
    int8 = torch.randint(-1, 2, (n, k), dtype=torch.int8, device=DEVICE)
    q = torch.randint(-127, 128, (m, k), dtype=torch.int8, device=DEVICE)
    y = torch.empty(m, n, device=DEVICE, dtype=torch.bfloat16)
    took = timed(
        {
            "triton": [lambda: ops.ternary_linear(x, data, n, scale, out=y)] * 4,
            "cublas bf16": [lambda: F.linear(x, dense)] * 4,
            "cublas int8, product only": [lambda: torch._int_mm(q, int8.t())] * 4,
        }
    )
    return {
        "m": m,
        "n": n,
        "k": k,
        "microseconds": took,
        "times_cublas_bf16": {c: took["cublas bf16"] / took[c] for c in took},
        "teraops": {c: 2 * m * n * k / took[c] / 1e6 for c in took},
        "config": str(ops._tuned().best_config),
    }


def training() -> dict[str, Any]:
    """One linear layer, forward and backward: quantized products against bf16 ones."""
    m, n, k = 4096, 4096, 4096
    x = torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16)
    w = torch.randn(n, k, device=DEVICE)
    grad = torch.randn(m, n, device=DEVICE, dtype=torch.bfloat16)

    def quantized() -> None:
        codes, beta = ops.quantize_weight(w)
        q, scale, _ = ops.quantize_activation(x)
        y = torch._int_mm(q, codes.t()).float() * (scale[:, None] * beta)
        y.bfloat16()
        (grad.float() * beta).bfloat16() @ codes.bfloat16()
        ((grad.float() * scale[:, None]).bfloat16().t() @ q.bfloat16()).float()

    def dense() -> None:
        weight = w.bfloat16()
        x @ weight.t()
        grad @ weight
        (grad.t() @ x).float()

    took = timed({"quantized": [quantized], "bf16": [dense]}, replays=15)
    return {
        "m": m,
        "n": n,
        "k": k,
        "microseconds": took,
        "times_bf16": took["bf16"] / took["quantized"],
    }


if __name__ == "__main__":
    sys.exit(main())
