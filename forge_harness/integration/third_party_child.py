"""The process a reader this package did not write runs in.

    python -m forge_harness.integration.third_party_child {transformers|gguf|llama_cpp} REQUEST OUT

REQUEST is a JSON file, OUT a directory that gets `result.json` and, where there are arrays,
`arrays.safetensors`. A library that is not installed is a result, `{"not_available": reason}`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forge_harness.errors import ForgeError
from forge_harness.integration import lifeline

if TYPE_CHECKING:
    from torch import Tensor, nn

ARRAYS = "arrays.safetensors"
RESULT = "result.json"
_HF_REMEDY = "pip install 'bitnet-forge-harness[hf]'"
_TERNARY_CLASSES = ("BitLinear", "AutoBitLinear")
"""transformers' classes of quantized linear layers (`integrations/bitnet.py`)."""


def with_transformers(request: dict[str, Any], out: Path) -> dict[str, Any]:
    """Loads a directory as transformers does, in fp32, and runs it over token ids.

    Arrays: `logits` (B, T, V) and, with hooks, `<layer>.input` and `<layer>.output` of every
    quantized layer.
    """
    # Offline: a path that is no directory must not become a download. Without compilation: it asks
    # for a C++ compiler and minutes, and changes nothing in fp32.
    os.environ.update(HF_HUB_OFFLINE="1", TORCHDYNAMO_DISABLE="1", TRANSFORMERS_VERBOSITY="error")
    import torch
    from safetensors.torch import save_file

    transformers = import_module("transformers")
    import_module("accelerate")  # without it transformers refuses quantized models
    found: dict[str, Any] = {
        "versions": {name: version(name) for name in ("transformers", "accelerate", "torch")}
    }
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            request["path"], dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
    except Exception as error:
        return found | {"refused": " ".join(f"{type(error).__name__}: {error}".split())}
    arrays: dict[str, Tensor] = {}
    layers = _ternary_layers(model)
    if undecoded := _undecoded(layers):
        return {
            "not_available": f"transformers {transformers.__version__} leaves the codes of "
            f"{undecoded} packed, -1 as 255; expected 5.13 or newer, which decodes them "
            f"({_HF_REMEDY})"
        }
    handles = [_record(layer, name, arrays) for name, layer in layers.items() if request["hooks"]]
    with torch.no_grad():
        # transformers 5.24 leaves an untied bf16 head as stored next to fp32 layers, and then fails
        # (and its own `float()` refuses quantized models).
        for parameter in model.parameters():
            parameter.data = parameter.data.float()
        logits = model.eval()(input_ids=torch.tensor(request["tokens"])).logits
    for handle in handles:
        handle.remove()
    save_file({"logits": logits.contiguous(), **arrays}, out / ARRAYS)
    return found | {
        "class": type(model).__name__,
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "mismatched": sorted(str(entry) for entry in info["mismatched_keys"]),
        "errors": [str(error) for error in info["error_msgs"]],
        "ternary": sorted(layers),
    }


def _ternary_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ in _TERNARY_CLASSES
    }


def _undecoded(layers: Mapping[str, nn.Module]) -> str:
    """Returns the first layer whose weights were to be decoded as it was loaded, and are not.

    `AutoBitLinear` multiplies by them as they are; transformers before 5.13 decodes them to the
    dtype they are stored in (`BitNetDeserialize.convert`).
    """
    for name, layer in layers.items():
        # Of a BitLinear the weight is no parameter, and packed on purpose.
        weight = dict(layer.named_parameters()).get("weight")
        if weight is not None and not weight.is_floating_point():
            return name
    return ""


def _record(layer: nn.Module, name: str, arrays: dict[str, Tensor]) -> Any:  # noqa: ANN401
    def hook(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        # Clones: arrays of one storage cannot be saved, and a layer may write to its input later.
        arrays[f"{name}.input"] = arguments[0].detach().clone().contiguous()
        arrays[f"{name}.output"] = output.detach().clone().contiguous()

    return layer.register_forward_hook(hook)


def with_gguf(request: dict[str, Any], out: Path) -> dict[str, Any]:
    """Decodes every tensor of a GGUF file with `gguf`, one at a time, against this package."""
    gguf = import_module("gguf")
    from forge_harness.integration.third_party_gguf import tensor_results

    return {
        "versions": {"gguf": version("gguf")},
        "tensors": tensor_results(gguf, Path(request["path"])),
    }


def with_llama_cpp(request: dict[str, Any], out: Path) -> dict[str, Any]:
    """Runs a GGUF file through llama.cpp. Arrays: `logits` (B, T, V).

    fp32 keys and values and no flash attention: with its defaults llama.cpp rounds both to fp16.
    """
    import numpy as np
    from safetensors.numpy import save_file

    llama_cpp = import_module("llama_cpp")
    model = llama_cpp.Llama(
        request["path"],
        logits_all=True,
        type_k=0,
        type_v=0,
        flash_attn=False,
        n_ctx=max(256, *(len(row) for row in request["tokens"])),
        verbose=False,
    )
    rows = []
    for row in request["tokens"]:
        model.reset()
        model.eval(row)
        rows.append(np.array(model.scores[: len(row)], dtype=np.float32))
    save_file({"logits": np.stack(rows)}, out / ARRAYS)
    return {"versions": {"llama_cpp_python": version("llama_cpp_python")}}


READERS: dict[str, tuple[Callable[[dict[str, Any], Path], dict[str, Any]], str]] = {
    "transformers": (with_transformers, _HF_REMEDY),
    "gguf": (with_gguf, _HF_REMEDY),
    "llama_cpp": (with_llama_cpp, "pip install llama-cpp-python"),
}
"""Name -> what it does, and how to install what it needs."""


def main(arguments: list[str]) -> int:
    """Runs one reader; the exit status is 0 when the result is in OUT."""
    reader, remedy = READERS[arguments[0]]
    request = json.loads(Path(arguments[1]).read_text(encoding="utf-8"))
    out = Path(arguments[2])
    try:
        result = reader(request, out)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "forge_harness":
            raise
        result = {"not_available": f"{error.name!r} is not installed ({remedy})"}
    except ForgeError as error:
        result = {"refused": str(error)}
    (out / RESULT).write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    lifeline.watch()
    sys.exit(main(sys.argv[1:]))
