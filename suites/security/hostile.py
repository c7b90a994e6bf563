"""Model files made to run code, to overrun a reader, or to reach beyond their directory.

Sources: GHSA-53q9-r3pm-6pq6 (weights_only bypassed), Trail of Bits "Never a dill moment" (2021) and
CVE-2019-6446 (pickles), Databricks "GGML GGUF file format vulnerabilities" (2024) (counts and
lengths), the safetensors security audit (Trail of Bits, 2023) (headers), Zip Slip (2018) (paths).
"""

import io
import json
import pickle
import struct
import zipfile

HUGE = 1 << 60
_BOMB_BYTES = 192 << 20


def files(folder, canary, outside):
    """Yields (name, path) of each hostile file below a folder.

    Args:
        folder: Empty directory.
        canary: File that appears if a payload runs.
        outside: File that no reader may be led to.
    """
    makers = {**_pickles(canary), **_safetensors(), **_gguf(), **_directories(outside)}
    for number, (name, make) in enumerate(makers.items()):
        place = folder / f"{number:03}"
        place.mkdir()
        yield name, make(place)


class _Calls:
    """Pickles as the call of a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def _imports(module, name, argument):
    """A pickle that calls module.name(argument), whether or not it can be imported here."""
    return (
        b"\x80\x02c"
        + f"{module}\n{name}\n".encode()
        + b"q\x00X"
        + struct.pack("<I", len(argument))
        + argument.encode()
        + b"q\x01\x85q\x02Rq\x03."
    )


def _pickles(canary):
    touch = f"touch {canary}"
    code = f"open({str(canary)!r}, 'w').close()"
    payloads = {
        "os.system": _imports("os", "system", touch),
        "posix.system": _imports("posix", "system", touch),
        "builtins.exec": _imports("builtins", "exec", code),
        "builtins.eval": _imports("builtins", "eval", code),
        "collect_env.run": _imports("torch.utils.collect_env", "run", touch),
        "subprocess.getoutput": _imports("subprocess", "getoutput", touch),
        "runpy.run_path": _imports("runpy", "run_path", str(canary)),
        "pip.main": _imports("pip", "main", str(canary)),
        "torch.hub": _imports("torch.hub", "load", str(canary)),
        "torch.load": _imports("torch", "load", str(canary)),
        "protocol 4": pickle.dumps(_Calls(exec, code), protocol=4),
        "protocol 0": pickle.dumps(_Calls(exec, code), protocol=0),
        "INST": b"(S'" + touch.encode() + b"'\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nS'" + touch.encode() + b"'\no.",
        "a state dict first": pickle.dumps({"w": _Calls(exec, code)}, protocol=2),
    }
    makers = {}
    for name, payload in payloads.items():
        makers[f"raw pickle, {name}"] = _writer("pytorch_model.bin", payload)
        makers[f"archive, {name}"] = _archive(payload)
    makers["archive with a bomb"] = _bomb
    makers["archive with a name above it"] = _archive(payloads["os.system"], prefix="../../m")
    return makers


def _writer(name, content):
    def make(folder):
        path = folder / name
        path.write_bytes(content)
        return path

    return make


def _archive(payload, prefix="archive"):
    def make(folder):
        path = folder / "model.pt"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{prefix}/data.pkl", payload)
            archive.writestr(f"{prefix}/byteorder", b"little")
            archive.writestr(f"{prefix}/version", b"3\n")
        return path

    return make


def _bomb(folder):
    path = folder / "model.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("archive/version", b"3\n")
        with archive.open("archive/data.pkl", "w", force_zip64=True) as stream:
            for _ in range(_BOMB_BYTES >> 20):
                stream.write(bytes(1 << 20))
    return path


def _safetensors():
    def entry(begin=0, end=16, shape=(2, 2), dtype="F32"):
        return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}

    headers = {
        "offsets beyond the file": {"w": entry(0, 1 << 40, (1 << 19, 1 << 19))},
        "offsets reversed": {"w": entry(16, 0)},
        "offsets negative": {"w": entry(-16, 0)},
        "tensors that overlap": {"a": entry(0, 16), "b": entry(8, 24)},
        "a gap between tensors": {"a": entry(0, 16), "b": entry(20, 36)},
        "a shape of another size": {"w": entry(0, 16, (3, 3))},
        "a shape that overflows": {"w": entry(0, 16, (1 << 62, 1 << 62))},
        "a negative dimension": {"w": entry(0, 16, (-2, -2))},
        "an unknown dtype": {"w": entry(dtype="PICKLE")},
        "a header that is a list": [entry()],
        "an entry that is text": {"w": "rm -rf"},
    }
    makers = {}
    for name, header in headers.items():
        text = json.dumps(header).encode()
        makers[f"safetensors, {name}"] = _model(struct.pack("<Q", len(text)) + text + bytes(40))
    deep = b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    twice = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"w":{"dtype":"F32","shape":[1],'
    twice += b'"data_offsets":[4,8]}}'
    makers |= {
        "safetensors, a header of 2**60 bytes": _model(struct.pack("<Q", HUGE) + b"{}"),
        "safetensors, a header longer than the file": _model(struct.pack("<Q", 4096) + b"{}"),
        "safetensors, a header nested 100,000 deep": _model(struct.pack("<Q", len(deep)) + deep),
        "safetensors, a name twice": _model(struct.pack("<Q", len(twice)) + twice + bytes(8)),
        "safetensors, no header": _model(b"\1\2"),
        "safetensors, empty": _model(b""),
    }
    return makers


def _model(content):
    return _writer("model.safetensors", content)


def _gguf():
    def head(version=3, tensors=0, values=0):
        return b"GGUF" + struct.pack("<IQQ", version, tensors, values)

    def text(content, length=None):
        return struct.pack("<Q", len(content) if length is None else length) + content

    def value(key, kind, body):
        return text(key) + struct.pack("<I", kind) + body

    deep = b"".join(struct.pack("<IQ", 9, 1) for _ in range(50_000))
    contents = {
        "2**60 tensors": head(tensors=HUGE),
        "2**60 values": head(values=HUGE),
        "a key of 2**60 bytes": head(values=1) + text(b"k", HUGE),
        "a text of 2**60 bytes": head(values=1) + value(b"k", 8, text(b"v", HUGE)),
        "an array of 2**60 items": head(values=1) + value(b"k", 9, struct.pack("<IQ", 4, HUGE)),
        "an array nested 50,000 deep": head(values=1) + value(b"k", 9, deep),
        "an unknown kind of value": head(values=1) + value(b"k", 99, bytes(8)),
        "a tensor of 99 dimensions": head(tensors=1) + text(b"w") + struct.pack("<I", 99),
        "dimensions that overflow": head(tensors=1)
        + text(b"w")
        + struct.pack("<IQQIQ", 2, 1 << 62, 1 << 62, 0, 0),
        "an offset beyond the file": head(tensors=1)
        + text(b"w")
        + struct.pack("<IQQIQ", 2, 64, 64, 0, 1 << 50),
        "an alignment of zero": head(values=1)
        + value(b"general.alignment", 4, struct.pack("<I", 0)),
        "version 99": head(version=99),
        "cut off": b"GGUF\3",
    }
    return {f"gguf, {name}": _writer("model.gguf", content) for name, content in contents.items()}


def _directories(outside):
    tensor = io.BytesIO()
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    tensor.write(struct.pack("<Q", len(header)) + header + bytes(4))

    def directory(config, index=None, link=None):
        def make(folder):
            (folder / "config.json").write_bytes(config)
            if index is None:
                (folder / "model.safetensors").write_bytes(tensor.getvalue())
            else:
                names = {"weight_map": {"w": index}, "metadata": {}}
                (folder / "model.safetensors.index.json").write_text(json.dumps(names))
            if link is not None:
                (folder / "model.safetensors").unlink(missing_ok=True)
                (folder / "model.safetensors").symlink_to(link)
            return folder

        return make

    good = json.dumps({"model_type": "bitnet"}).encode()
    return {
        "directory, a shard above it": directory(good, index=f"../../../{outside.name}"),
        "directory, a shard elsewhere": directory(good, index=str(outside)),
        "directory, a link out of it": directory(good, link=outside),
        "directory, a configuration nested 100,000 deep": directory(b"[" * 100_000),
        "directory, a configuration that is no JSON": directory(b"{'a': 1}"),
    }
