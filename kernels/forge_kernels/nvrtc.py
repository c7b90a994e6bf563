"""CUDA C++ compiled at first use and launched through the driver, by ctypes over both libraries.

A GPU build of torch brings NVRTC and needs the driver, so nothing has to be installed, no binary is
shipped, and no nvcc is looked for. Compiled code is kept in `$FORGE_KERNELS_CACHE`, or
`~/.cache/forge-harness/kernels`, under the digest of all that went into it.
"""

from __future__ import annotations

import ctypes
import glob
import hashlib
import os
import sysconfig
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

CACHE_VARIABLE = "FORGE_KERNELS_CACHE"


class CompileError(RuntimeError):
    """NVRTC refused the source, or a library call failed; the message holds its log."""


def problem() -> str:
    """Returns why kernels cannot be built and launched, or "" when they can."""
    try:
        _nvrtc()
        _driver()
    except OSError as error:
        return f"{error}; it comes with a CUDA build of torch and the NVIDIA driver"
    return ""


def cache_directory() -> Path | None:
    """Returns where compiled kernels are kept; None for nowhere, where a user has no home."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    try:
        home = Path.home()
    except RuntimeError:  # No $HOME and no entry of the user, as in many containers.
        return None
    return home / ".cache" / "forge-harness" / "kernels"


def version() -> tuple[int, int]:
    """Returns NVRTC's version."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check_nvrtc(_nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


def compiled(source: str, options: tuple[str, ...], architecture: str) -> bytes:
    """Returns the cubin of a source, compiled now or on an earlier day.

    Args:
        source: CUDA C++ that includes nothing.
        options: Of NVRTC, without the architecture.
        architecture: For example "sm_90".

    Raises:
        CompileError: NVRTC refused; with its log.
        OSError: NVRTC is not there.
    """
    content = "\n".join((source, *options, architecture, repr(version())))
    digest = hashlib.sha256(content.encode()).hexdigest()
    directory = cache_directory()
    if directory is not None:
        try:
            return (directory / f"{digest}.cubin").read_bytes()
        except OSError:
            pass
    cubin = _compile(source, (*options, f"--gpu-architecture={architecture}"))
    if directory is not None:
        _keep(directory / f"{digest}.cubin", cubin)
    return cubin


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: an id, and a union of 64 bytes."""

    _fields_: ClassVar = [("id", ctypes.c_int), ("_", ctypes.c_int), ("value", ctypes.c_int * 16)]


class _Launch(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_: ClassVar = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


_PROGRAMMATIC_SERIALIZATION = 6
_MOST_DYNAMIC_SHARED = 8
_MOST_SHARED_OPT_IN = 97


@lru_cache
def most_shared(device: int) -> int:
    """Returns the bytes of shared memory a thread block of a device can have.

    Raises:
        CompileError: The driver knows no such device.
    """
    driver, handle, found = _driver(), ctypes.c_int(), ctypes.c_int()
    _check_driver(driver.cuInit(0))
    _check_driver(driver.cuDeviceGet(ctypes.byref(handle), device))
    _check_driver(driver.cuDeviceGetAttribute(ctypes.byref(found), _MOST_SHARED_OPT_IN, handle))
    return found.value


class Kernel:
    """A function of a compiled module, in the primary context of the current device.

    Args:
        cubin: What `compiled` returned.
        name: The function, declared extern "C".
        overlapped: Whether it may start before the kernel in front of it has ended; it must then
            wait for it (griddepcontrol.wait) before it reads what that one wrote.
        shared: Most dynamic shared memory it will be launched with, in bytes.
    """

    def __init__(self, cubin: bytes, name: str, *, overlapped: bool, shared: int) -> None:
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        driver = _driver()
        _check_driver(driver.cuModuleLoadData(ctypes.byref(self._module), cubin))
        _check_driver(
            driver.cuModuleGetFunction(ctypes.byref(self._function), self._module, name.encode())
        )
        # Refused with more than the device has beside what the function declares itself; then only
        # launches that need it fail.
        driver.cuFuncSetAttribute(self._function, _MOST_DYNAMIC_SHARED, shared)
        self._attribute = _Attribute(_PROGRAMMATIC_SERIALIZATION)
        self._attribute.value[0] = 1
        self._attributes = int(overlapped)
        self._launch = driver.cuLaunchKernelEx

    def __call__(
        self,
        blocks: int,
        threads: int,
        shared: int,
        stream: int,
        argument: ctypes.Structure,
    ) -> None:
        """Launches the function with one argument, a structure, on a CUDA stream's handle.

        Raises:
            CompileError: The driver refused the launch.
        """
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        launch = _Launch(
            (blocks, 1, 1),
            (threads, 1, 1),
            shared,
            stream,
            ctypes.pointer(self._attribute),
            self._attributes,
        )
        _check_driver(self._launch(ctypes.byref(launch), self._function, arguments, None))


def _compile(source: str, options: tuple[str, ...]) -> bytes:
    library, program = _nvrtc(), ctypes.c_void_p()
    _check_nvrtc(
        library.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None
        )
    )
    try:
        encoded = [option.encode() for option in options]
        result = library.nvrtcCompileProgram(
            program, len(encoded), (ctypes.c_char_p * len(encoded))(*encoded)
        )
        if result:
            size = ctypes.c_size_t()
            library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            library.nvrtcGetProgramLog(program, log)
            raise CompileError(f"NVRTC refused the kernel: {log.value.decode()}")
        size = ctypes.c_size_t()
        _check_nvrtc(library.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        cubin = ctypes.create_string_buffer(size.value)
        _check_nvrtc(library.nvrtcGetCUBIN(program, cubin))
        return cubin.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _keep(path: Path, content: bytes) -> None:
    """Whole or not at all; a cache that cannot be written only costs the next compilation."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as stream:
            stream.write(content)
        os.replace(stream.name, path)
    except OSError:
        return


@lru_cache
def _nvrtc() -> ctypes.CDLL:
    wheels = sysconfig.get_paths()["purelib"]
    patterns = (f"{wheels}/nvidia/*/lib/libnvrtc.so*", "/usr/local/cuda*/lib64/libnvrtc.so*")
    found = [
        name
        for pattern in patterns
        for name in sorted(glob.glob(pattern))
        if "builtins" not in name
    ]
    for name in ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so", *found):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise OSError("libnvrtc is not there")


@lru_cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise OSError("libcuda.so.1 is not there") from None


def _check_nvrtc(result: int) -> None:
    if result:
        raise CompileError(f"NVRTC returned error {result}")


def _check_driver(result: int) -> None:
    if result:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(result, ctypes.byref(text))
        raise CompileError(f"CUDA driver: {(text.value or b'error').decode()} ({result})")
