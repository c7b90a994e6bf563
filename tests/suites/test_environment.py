"""Each environment check goes red for its own reason, and is green (or says why not) otherwise."""

import errno
import os
import time
from types import SimpleNamespace

import pytest
import torch

from forge_harness import kernels
from forge_harness.probes import clock, distributions, filesystem, memory
from forge_harness.subject.reference import ReferenceSubject

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


def little_memory(patch):
    patch.setattr(memory, "available_bytes", lambda: 100 << 20)


def full_disk(patch):
    patch.setattr(filesystem, "free_bytes", lambda path: 10 << 20)


def network_mount(patch):
    patch.setattr(filesystem, "file_system_type", lambda path: "nfs4")


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


def more_threads_than_granted(patch):
    patch.setattr(torch, "get_num_threads", lambda: 1000)


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
        ("cpu_isa", slow_backend_selected, "selected_backend is reference, expected native"),
        ("cpu_isa", backend_with_other_bytes, "bytes_that_differ is"),
        ("memory_headroom", little_memory, "available is 104857600 B, under its limit"),
        ("disk_headroom", full_disk, "free is 10485760 B, under its limit"),
        ("durable_filesystem", network_mount, "network_file_system is True"),
        ("durable_filesystem", fsync_that_fails, "fsync_file is False.*Invalid argument"),
        ("durable_filesystem", locks_that_do_not_exclude, "lock_excludes is False"),
        ("durable_filesystem", rename_that_copies, "rename_replaces is False"),
        ("monotonic_clock", settable_clock, "moved_by_the_wall_clock is True"),
        ("monotonic_clock", clock_going_back, "backward_steps is"),
        ("monotonic_clock", coarse_clock, "smallest_step is 0.015 s, outside"),
        ("thread_budget", more_threads_than_granted, "compute_threads is 1000 threads, over"),
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


class Unseeded(ReferenceSubject):
    def build_model(self, task, *, seed):
        return super().build_model(task, seed=torch.seed() % 2**31)


class DeafToSeeds(ReferenceSubject):
    def session(self, task, options):
        from dataclasses import replace

        return super().session(task, replace(options, seed=0))


@pytest.mark.parametrize(
    ("subject", "reason"),
    [(Unseeded, "repeated_digest"), (DeafToSeeds, "seed_has_effect is False")],
)
def test_an_unseeded_run_is_found(run_check, subject, reason):
    run = run_check("environment.deterministic_run", subject())
    assert run.outcome == "fail"
    assert reason in run.reason


def test_no_accelerator_is_not_measured_until_one_is_declared(run_check, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = run_check("environment.accelerator")
    assert run.outcome == "not_measured"
    assert "set [declared] accelerator" in run.reason


def test_a_declared_accelerator_that_is_missing_fails(run_check, monkeypatch):
    from forge_harness.config import load_config

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = load_config(flags={"declared.accelerator": "cuda"}).config
    run = run_check("environment.accelerator", config=config)
    assert run.outcome == "fail"
    assert "accelerator is none, expected cuda" in run.reason


def timings(monkeypatch, second):
    monkeypatch.setattr(clock, "paired_seconds", lambda work, pairs: ([1.0] * pairs, second(pairs)))


def test_a_biased_timer_fails_the_calibration(run_check, monkeypatch):
    timings(monkeypatch, lambda pairs: [1.3 + 0.001 * i for i in range(pairs)])
    run = run_check("environment.timing_noise")
    assert run.outcome == "fail"
    assert "bound_high is 0.7" in run.reason


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


def test_a_container_limit_is_less_than_the_machine(tmp_path):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    assert memory.available_bytes(tmp_path) == 600


def test_distribution_name_is_ours():
    assert distributions.installed_version(distributions.DISTRIBUTION) is not None
