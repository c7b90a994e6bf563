"""What `torch.save` writes, looked at before torch reads it: a zip archive around a pickle.

torch maps tensors from wherever a record starts and compares nothing: a compressed, short or
flipped record would be read as other numbers. The pickle is first read as a list of instructions:
what it would import is held against the few names a state dict needs.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from forge_harness.errors import CheckpointError, DamagedCheckpointError

from .pointers import refuse_pointer

_MAX_PICKLE_BYTES = 64 << 20
"""A state dict of 10,000 tensors takes about 1.5 MB of pickle."""
_PICKLE = "data.pkl"
_ALLOWED = frozenset(
    {
        ("collections", "OrderedDict"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_tensor"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("torch.storage", "UntypedStorage"),
        ("torch.storage", "TypedStorage"),
    }
)
_STORAGES = {
    "Float": 4, "Double": 8, "Half": 2, "BFloat16": 2, "Int": 4, "Long": 8, "Short": 2, "Char": 1,
    "Byte": 1, "Bool": 1,
}  # fmt: skip
"""Kind of storage -> bytes of a value."""
_BROKEN_ZIP = (
    zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError, struct.error, zlib.error,
)  # fmt: skip
UNSOUND = (
    pickle.UnpicklingError, RuntimeError, ValueError, EOFError, LookupError, TypeError,
    AttributeError, OverflowError, MemoryError,
)  # fmt: skip
"""What unpicklers raise when a pickle is none of a state dict."""


def check_archive(file: Path) -> None:
    """Refuses an archive torch would read wrongly, or whose pickle imports what it must not.

    The records' content is not read; see `check_content`.

    Raises:
        CheckpointError: It is no archive of `torch.save`, or its pickle must not be opened.
        DamagedCheckpointError: A record is compressed, there twice, or not as long as the pickle
            says.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            _check_records(file, archive)
            name = _pickle_name(file, archive)
            raw = archive.read(name)
            sizes = {info.filename: info.file_size for info in archive.infolist()}
    except _BROKEN_ZIP as error:
        raise _no_archive(file, str(error)) from error
    _check_imports(file, raw)
    prefix = name.removesuffix(_PICKLE)
    for key, (nbytes, size) in _storages(file, raw).items():
        stored = sizes.get(f"{prefix}data/{key}")
        if stored is None or stored // size != nbytes // size:
            holds = "is missing" if stored is None else f"holds {stored} bytes"
            raise _damaged(file, f"record data/{key} {holds}, and its tensors need {nbytes}")


def check_content(file: Path) -> None:
    """Refuses an archive with a record that does not have its checksum; reads all of it.

    Raises:
        DamagedCheckpointError: Naming the record.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            bad = archive.testzip()
    except _BROKEN_ZIP as error:
        raise _no_archive(file, str(error)) from error
    if bad is not None:
        raise _damaged(file, f"record {bad!r} does not have the CRC-32 the archive says")


def _check_records(file: Path, archive: zipfile.ZipFile) -> None:
    seen = set()
    for info in archive.infolist():
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise _damaged(
                file,
                f"record {info.filename!r} is compressed or encrypted, and torch.save only stores: "
                "the archive was packed again",
            )
        if info.filename in seen:
            raise _damaged(file, f"record {info.filename!r} is there twice")
        seen.add(info.filename)


def _pickle_name(file: Path, archive: zipfile.ZipFile) -> str:
    names = [name for name in archive.namelist() if name.endswith(f"/{_PICKLE}")]
    if len(names) != 1:
        raise CheckpointError(
            f"{file} is a zip archive with {len(names)} {_PICKLE}; expected the one of torch.save."
        )
    size = archive.getinfo(names[0]).file_size
    if size > _MAX_PICKLE_BYTES:
        raise _damaged(
            file, f"{names[0]} claims {size} bytes; at most {_MAX_PICKLE_BYTES} are read"
        )
    return names[0]


def _check_imports(file: Path, raw: bytes) -> None:
    for module, name, position in _imports(file, raw):
        storage = module == "torch" and name.removesuffix("Storage") in _STORAGES
        if (module, name) not in _ALLOWED and not storage:
            raise CheckpointError(
                f"{file}: byte {position} of data.pkl imports {module}.{name}, which no state dict "
                "needs and which could run code; nothing was loaded. Save a state dict of tensors, "
                "better as safetensors."
            )


class _Inert:
    """Stands for everything the pickle would build."""

    def __init__(self, *arguments: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...


class _Storages(pickle.Unpickler):
    """Notes which records a pickle asks for, and how long they must be; builds no tensor."""

    def __init__(self, raw: bytes) -> None:
        super().__init__(io.BytesIO(raw))
        self.needed: dict[str, tuple[int, int]] = {}

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401 - as pickle has it
        if name.endswith("Storage"):
            return _STORAGES.get(name.removesuffix("Storage"), 1)
        return OrderedDict if name == "OrderedDict" else _Inert

    def persistent_load(self, pid: Any) -> Any:  # noqa: ANN401 - as pickle has it
        _, size, key, _, count = pid
        if type(size) is not int or type(key) is not str or type(count) is not int or count < 0:
            raise ValueError(f"it asks for a storage {key!r:.80} of {count!r:.80} values")
        if self.needed.setdefault(key, (size * count, size)) != (size * count, size):
            raise ValueError(f"it asks for two sizes of storage {key!r:.80}")
        return _Inert()


def _storages(file: Path, raw: bytes) -> dict[str, tuple[int, int]]:
    """Returns record -> bytes its tensors need, and bytes of a value."""
    unpickler = _Storages(raw)
    try:
        unpickler.load()
    except UNSOUND as error:
        raise _damaged(file, f"data.pkl is no sound pickle of tensors ({error})") from error
    return unpickler.needed


def _no_archive(file: Path, why: str) -> CheckpointError:
    refuse_pointer(file)
    with file.open("rb") as stream:
        start = stream.read(4)
    if start == b"PK\x03\x04":
        return _damaged(file, f"the zip archive is broken ({why})")
    return CheckpointError(
        f"{file} is a bare pickle or another format of old, which is not opened since loading one "
        "runs code; save a state dict with torch.save of torch 1.6 or later, or as safetensors."
    )


def _imports(file: Path, raw: bytes) -> Iterator[tuple[str, str, int]]:
    """Yields (module, name, byte) of everything a pickle imports."""
    strings: list[str] = []
    memo: dict[int, str] = {}
    try:
        for opcode, argument, position in pickletools.genops(raw):
            if opcode.name == "GLOBAL":
                module, _, name = str(argument).partition(" ")
                yield module, name, position or 0
            elif opcode.name == "STACK_GLOBAL":
                module, name = (["?", "?", *strings])[-2:]
                yield module, name, position or 0
            elif opcode.name in ("INST", "EXT1", "EXT2", "EXT4"):
                yield opcode.name, str(argument), position or 0
            elif opcode.name in ("LONG_BINPUT", "PUT") and int(argument or 0) > len(raw):
                # Unpicklers make room up to the number, whatever it is.
                raise ValueError(f"memo {argument} of {len(raw)} bytes")
            _follow(opcode.name, argument, strings, memo)
    except (ValueError, IndexError, UnicodeDecodeError) as error:
        raise _damaged(file, f"data.pkl is no sound pickle ({error})") from error


def _follow(opcode: str, argument: Any, strings: list[str], memo: dict[int, str]) -> None:  # noqa: ANN401
    """Keeps the strings STACK_GLOBAL may take, including those that come back from the memo."""
    if isinstance(argument, str) and opcode not in ("GLOBAL", "INST"):
        strings.append(argument)
    elif opcode == "MEMOIZE" and strings:
        memo[len(memo)] = strings[-1]
    elif opcode in ("BINPUT", "LONG_BINPUT", "PUT") and strings:
        memo[int(argument)] = strings[-1]
    elif opcode in ("BINGET", "LONG_BINGET", "GET") and int(argument) in memo:
        strings.append(memo[int(argument)])


def _damaged(file: Path, what: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"{file} is no sound torch archive: {what}. Save it again.", path=str(file)
    )
