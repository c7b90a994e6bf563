"""Each environment check goes red for its own reason, and is green (or says why not) otherwise."""

import errno
import os
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from forge_harness import kernels
from forge_harness.drill.defects import all_benign, defects_of
from forge_harness.probes import accelerator, cgroup, clock, distributions, filesystem, memory

SOUND = [
    "python_version",
    "cpu_isa",
    "memory_headroom",
    "disk_headroom",
    "durable_filesystem",
    "monotonic_clock",
    "thread_budget",
    "deterministic_run",
    "text_encoding",
    "writable_paths",
]


@pytest.mark.parametrize("name", SOUND)
def test_this_machine_is_sound(run_check, name):
    run = run_check(f"environment.{name}")
    assert run.outcome == "pass", run.reason


def old_interpreter(patch):
    patch.setattr("platform.python_version", lambda: "3.9.2")


def slow_backend_selected(patch):
    patch.setattr(kernels, "which", lambda op, backend="auto", device="cpu": "reference")


def backend_with_other_bytes(patch):
    true = kernels.pack_i2

    def negated(codes, backend="auto"):
        return true(-codes if backend == "reference" else codes, backend=backend)

    patch.setattr(kernels, "pack_i2", negated)


def backend_that_ignores_strides(patch):
    true = kernels.pack_i2

    def flat(codes, backend="auto"):
        if backend == "native" and not codes.is_contiguous():
            codes = codes.T.reshape(codes.shape)
        return true(codes, backend=backend)

    patch.setattr(kernels, "pack_i2", flat)


def unpacking_that_loses_a_row(patch):
    true = kernels.unpack_i2

    def short(packed, rows, backend="auto"):
        codes = true(packed, rows, backend=backend)
        codes[-1] = 0
        return codes

    patch.setattr(kernels, "unpack_i2", short)


def little_memory(patch):
    patch.setattr(memory, "available_bytes", lambda: 100 << 20)


def full_disk(patch):
    patch.setattr(filesystem, "free_bytes", lambda path: 10 << 20)


def full_temporary_directory(patch):
    answers = iter([1 << 40, 10 << 20])
    patch.setattr(filesystem, "free_bytes", lambda path: next(answers))


def network_mount(patch):
    patch.setattr(filesystem, "file_system_type", lambda path: "nfs4")


def bucket_mount(patch):
    patch.setattr(filesystem, "file_system_type", lambda path: "fuse.s3fs")


def directory_that_cannot_be_synced(patch):
    def fail(path):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    patch.setattr(filesystem, "_sync_directory", fail)


def fsync_that_fails(patch):
    def fail(descriptor):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    patch.setattr(os, "fsync", fail)


def locks_that_do_not_exclude(patch):
    patch.setattr("fcntl.flock", lambda stream, operation: None)


def rename_that_copies(patch):
    import shutil

    patch.setattr(os, "replace", lambda source, target: shutil.copyfile(source, target))


def settable_clock(patch):
    patch.setattr(
        time, "get_clock_info", lambda name: SimpleNamespace(monotonic=True, adjustable=True)
    )


def wall_clock_for_deadlines(patch):
    patch.setattr(
        time, "get_clock_info", lambda name: SimpleNamespace(monotonic=False, adjustable=False)
    )


def clock_standing_still(patch):
    true = clock.read_clock
    patch.setattr(clock, "read_clock", lambda: true(lambda: 1.0))


def clock_going_back(patch):
    ticks = iter(range(10**6))
    true = clock.read_clock

    def unsteady():
        tick = next(ticks)
        return tick * 1e-6 - (tick % 100 == 99) * 1e-3

    patch.setattr(clock, "read_clock", lambda: true(unsteady))


def coarse_clock(patch):
    ticks = iter(range(10**6))
    true = clock.read_clock
    patch.setattr(clock, "read_clock", lambda: true(lambda: next(ticks) // 100 * 0.015))


def more_threads_than_processors(patch):
    patch.setattr(torch, "get_num_threads", lambda: 1000)


def more_threads_than_quota(patch):
    patch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    patch.setattr(cgroup, "cpu_quota", lambda: 2.5)
    patch.setattr(torch, "get_num_threads", lambda: 3)


def ascii_text(patch):
    patch.setattr(
        filesystem, "text_round_trip", lambda path, text: text.encode("ascii", "replace").decode()
    )


def read_only_mount(patch):
    patch.setattr(
        filesystem, "unwritable", lambda directories: [(directories[0], "Read-only file system")]
    )


@pytest.mark.parametrize(
    ("name", "defect", "reason"),
    [
        ("python_version", old_interpreter, "supported is False"),
        ("cpu_isa", slow_backend_selected, "pack_i2_selected is reference, expected native"),
        ("cpu_isa", backend_with_other_bytes, "bytes_that_differ is"),
        ("cpu_isa", backend_that_ignores_strides, "bytes_that_differ is"),
        ("cpu_isa", unpacking_that_loses_a_row, "bytes_that_differ is"),
        ("memory_headroom", little_memory, "available is 104857600 B, under its limit"),
        ("disk_headroom", full_disk, "run_directory_free is 10485760 B, under its limit"),
        ("disk_headroom", full_temporary_directory, "temporary_free is 10485760 B, under"),
        ("durable_filesystem", network_mount, "network_file_system is True"),
        ("durable_filesystem", bucket_mount, "network_file_system is True"),
        ("durable_filesystem", directory_that_cannot_be_synced, "fsync_directory is False"),
        ("durable_filesystem", fsync_that_fails, "fsync_file is False.*Invalid argument"),
        ("durable_filesystem", locks_that_do_not_exclude, "lock_excludes is False"),
        ("durable_filesystem", rename_that_copies, "rename_replaces is False"),
        ("monotonic_clock", wall_clock_for_deadlines, "declared_monotonic is False"),
        ("monotonic_clock", clock_standing_still, "smallest_step is 0 s, outside"),
        ("monotonic_clock", settable_clock, "moved_by_the_wall_clock is True"),
        ("monotonic_clock", clock_going_back, "backward_steps is"),
        ("monotonic_clock", coarse_clock, "smallest_step is 0.015 s, outside"),
        ("thread_budget", more_threads_than_processors, "compute_threads is 1000 threads, over"),
        ("thread_budget", more_threads_than_quota, "is 3 threads, over its limit of 2 .*quota 2.5"),
        ("text_encoding", ascii_text, "round_trip is"),
        ("writable_paths", read_only_mount, "unwritable is 1 .*Read-only file system"),
    ],
)
def test_a_defect_turns_its_check_red(run_check, monkeypatch, name, defect, reason):
    import re

    with monkeypatch.context() as patch:
        defect(patch)
        run = run_check(f"environment.{name}")
    assert run.outcome == "fail", run.reason
    assert re.search(reason, run.reason, re.DOTALL), run.reason


@pytest.mark.parametrize("defect", defects_of("environment"), ids=lambda defect: defect.id)
def test_an_unseeded_run_is_found(run_check, defect):
    run = run_check(defect.check, defect.subject())
    assert run.outcome == "fail", run.reason
    assert defect.shows in run.reason


def test_a_bfloat16_state_is_compared(run_check):
    kind = all_benign()["keeps_bfloat16"]
    assert [run_check(check, kind.subject()).outcome for check in kind.checks] == ["pass"]


GPU = accelerator.AcceleratorReading("cuda", "H", "9.0", "580.1")


@pytest.mark.parametrize(
    ("declared", "reading", "outcome", "reason"),
    [
        (None, accelerator.AcceleratorReading("none"), "not_measured", "set [declared] accel"),
        (None, GPU, "pass", ""),
        ("cuda", GPU, "pass", ""),
        ("rocm", GPU, "fail", "accelerator is cuda, expected rocm"),
        ("cuda", accelerator.AcceleratorReading("none"), "fail", "accelerator is none, expected"),
        (
            None,
            replace(GPU, problem="CUDA error: no kernel image is available"),
            "fail",
            "problem is CUDA error: no kernel image",
        ),
        ("none", accelerator.AcceleratorReading("none"), "not_applicable", "accelerator"),
    ],
)
def test_accelerator(run_check, monkeypatch, declared, reading, outcome, reason):
    from forge_harness.config import load_config

    monkeypatch.setattr(accelerator, "read_accelerator", lambda: reading)
    flags = {} if declared is None else {"declared.accelerator": declared}
    run = run_check("environment.accelerator", config=load_config(flags=flags).config)
    assert run.outcome == outcome, run.reason
    assert reason in run.reason


def test_no_device_is_read_as_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert accelerator.read_accelerator().kind == "none"


def test_a_device_that_cannot_compute_says_why(monkeypatch):
    # A build without CUDA answers as one without kernels for the architecture: by RuntimeError
    # at the first tensor (AssertionError in CPU builds, hence the replacement).
    def no_image(*args, **kwargs):
        raise RuntimeError("CUDA error: no kernel image is available\nfor execution")

    properties = SimpleNamespace(name="H", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch, "arange", no_image)
    reading = accelerator.read_accelerator()
    assert (reading.kind, reading.architecture) == ("cuda", "9.0")
    assert reading.problem == "CUDA error: no kernel image is available"


def test_a_device_that_computes_wrong_says_what(monkeypatch):
    monkeypatch.setattr(torch, "arange", lambda *args, **kwargs: torch.zeros(3))
    assert accelerator._problem() == "the sum of squares 0 to 999 came out as 0"


def timings(monkeypatch, second):
    monkeypatch.setattr(clock, "paired_seconds", lambda work, pairs: ([1.0] * pairs, second(pairs)))


@pytest.mark.parametrize(
    ("level", "reason"), [(1.3, "bound_high is 0.7"), (0.7, "bound_low is 1.4")]
)
def test_a_biased_timer_fails_the_calibration(run_check, monkeypatch, level, reason):
    timings(monkeypatch, lambda pairs: [level + 0.001 * i / pairs for i in range(pairs)])
    run = run_check("environment.timing_noise")
    assert run.outcome == "fail"
    assert reason in run.reason


def test_a_noisy_timer_is_warned_about(run_check, monkeypatch):
    timings(monkeypatch, lambda pairs: [0.5 + i / (pairs - 1) for i in range(pairs)])
    run = run_check("environment.timing_noise")
    assert run.outcome == "warn", run.reason
    assert run.evidence("noise") > 0.10


def test_equal_timings_pass(run_check, monkeypatch):
    timings(monkeypatch, lambda pairs: [1.0 + 0.01 * (-1) ** i for i in range(pairs)])
    assert run_check("environment.timing_noise").outcome == "pass"


def test_the_type_of_the_innermost_mount_counts(tmp_path):
    mounts = f"/dev/sda / ext4 rw 0 0\nserver:/x {tmp_path} nfs4 rw 0 0\n"
    assert filesystem.file_system_type(tmp_path / "a", mounts) == "nfs4"
    assert filesystem.file_system_type(tmp_path.parent, mounts) == "ext4"


@pytest.mark.parametrize(("name", "written"), [("a b", "a\\040b"), ("a\tb\\c", "a\\011b\\134c")])
def test_a_mount_point_is_read_as_the_kernel_writes_it(name, written):
    mounts = f"/dev/sda / ext4 rw 0 0\nserver:/x /mnt/{written} nfs4 rw 0 0\n"
    assert filesystem.file_system_type(Path("/mnt") / name / "x", mounts) == "nfs4"


@pytest.mark.parametrize(
    ("kind", "network"),
    [
        ("ext4", False),
        ("overlay", False),
        ("fuseblk", False),
        ("fuse.overlayfs", False),
        ("cifs", True),
        ("fuse.sshfs", True),
        ("fuse.gcsfuse", True),
        ("beegfs", True),
        ("gfs2", True),
        ("wekafs", True),
    ],
)
def test_network_file_systems_are_known(kind, network):
    assert filesystem.is_network(kind) is network


def write_group(directory, **files):
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(f"{text}\n")


def test_the_tightest_group_above_the_process_counts(tmp_path):
    (tmp_path / "membership").write_text("0::/outer/inner\n")
    root = tmp_path / "fs"
    write_group(root, cpu__max="max 100000")
    write_group(root / "outer", cpu__max="150000 100000", memory__max=1000, memory__current=400)
    write_group(root / "outer/inner", cpu__max="400000 100000", memory__max="max")
    assert cgroup.cpu_quota(root, tmp_path / "membership") == 1.5
    assert cgroup.memory_left(root, tmp_path / "membership") == 600
    assert memory.available_bytes(root, tmp_path / "membership") == 600


def test_version_1_groups(tmp_path):
    (tmp_path / "membership").write_text("3:cpuacct:/b\n2:cpu,x:/a\n1:memory:/job\n0::/\n")
    root = tmp_path / "fs"
    write_group(root / "cpu", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000)
    write_group(root / "cpu/a", cpu__cfs_quota_us=50000, cpu__cfs_period_us=100000)
    write_group(root / "cpu/b", cpu__cfs_quota_us=10000, cpu__cfs_period_us=100000)
    write_group(root / "memory/job", memory__limit_in_bytes=900, memory__usage_in_bytes=500)
    (root / "memory/job/memory.stat").write_text("cache 450\ntotal_inactive_file 300\n")
    assert cgroup.cpu_quota(root, tmp_path / "membership") == 0.5
    # 500 used, of which 300 are cache the kernel gives back.
    assert cgroup.memory_left(root, tmp_path / "membership") == 700


def test_no_groups_no_limit(tmp_path):
    assert cgroup.cpu_quota(tmp_path / "fs", tmp_path / "none") is None
    assert cgroup.memory_left(tmp_path / "fs", tmp_path / "none") is None


def test_distribution_name_is_ours():
    assert distributions.installed_version(distributions.DISTRIBUTION) is not None
