"""The machine and the interpreter: versions, processors, memory, accelerator, clocks."""

import hashlib
import math
import os
import platform
from importlib import metadata

import pytest
from packaging.specifiers import SpecifierSet

from forge_harness.evidence import largest
from forge_harness.probes import accelerator, cgroup, clock, distributions, memory
from forge_harness.protocols import BuildsModel, TrainOptions, Trains

UNDECLARED = "auto"
"""What `[declared] accelerator` is by default: nothing was declared."""


@pytest.mark.forge_check("environment.python_version")
def test_python_version(evidence):
    """The interpreter satisfies Requires-Python of the installed distribution.

    Oracle: the metadata pip itself installed by.
    """
    wanted = metadata.metadata(distributions.DISTRIBUTION)["Requires-Python"]
    running = platform.python_version()
    evidence.record("requires_python", wanted, reason="metadata of the installed distribution")
    evidence.equal(
        "supported",
        SpecifierSet(wanted).contains(running, prereleases=True),
        expected=True,
        reason=f"Python {running} against {wanted}",
    )


@pytest.mark.forge_check("environment.cpu_isa")
def test_cpu_isa(evidence):
    """The backend picked by itself is the best one built, and all give the same bytes.

    Oracle: the byte layout written out by definition (`oracles`), on odd shapes up to 130 rows.
    Tolerance: none, these are integers.
    """
    import torch

    from forge_harness import kernels, oracles

    problem = kernels.native_problem()
    # Asked of the extension, not of the selector under test.
    offered = {
        op: [b for b in kernels.OPS[op] if not (b == "native" and problem)]
        for op in ("pack_i2", "unpack_i2")
    }
    for op, backends in offered.items():
        evidence.equal(
            f"{op}_selected",
            kernels.which(op),
            expected=backends[0],
            reason=problem or "the fastest that is built is what `auto` must pick",
        )
    different = 0
    shapes = [(1, 1), (2, 3), (3, 130), (5, 7), (64, 65), (127, 4), (130, 33)]
    for rows, columns in shapes:
        codes = (torch.arange(rows * columns).reshape(rows, columns) % 3 - 1).to(torch.int8)
        # Rows past the end are packed as code 0.
        padded = torch.nn.functional.pad(codes, (0, 0, 0, -rows % 4))
        expected = torch.as_tensor(oracles.pack_row_blocks(padded))
        for backend in offered["pack_i2"]:
            # A transposed view: the same codes, another stride.
            for operand in (codes, codes.T.contiguous().T):
                different += int((kernels.pack_i2(operand, backend=backend) != expected).sum())
        for backend in offered["unpack_i2"]:
            for operand in (expected, expected.T.contiguous().T):
                restored = kernels.unpack_i2(operand, rows, backend=backend)
                different += int((restored != codes).sum())
    backends = offered["pack_i2"]
    evidence.record("backends_forced", ", ".join(backends), reason=problem or "all that are built")
    evidence.equal(
        "bytes_that_differ",
        different,
        expected=0,
        unit="bytes",
        reason=f"pack and unpack over {len(shapes)} shapes and two strides, every backend forced",
    )


@pytest.mark.forge_check("environment.memory_headroom")
def test_memory_headroom(subject, evidence):
    """Free memory exceeds the peak of a process that trained the subject's largest model.

    Measured, not estimated: the peak resident size after real steps, held against what the
    machine (or the container's limit) still has to give.
    """
    if not isinstance(subject, Trains) or not isinstance(subject, BuildsModel):
        pytest.skip("the subject offers no training (Trains, BuildsModel): there is no peak")
    largest = max(subject.tasks(), key=lambda task: subject.model_spec(task).parameters)
    session = subject.session(largest, TrainOptions(seed=0, steps=2))
    for _ in range(2):
        session.step()
    peak = memory.peak_resident_bytes()
    evidence.record(
        "peak_resident", peak, unit="B", reason=f"this process after training {largest}"
    )
    evidence.at_least(
        "available",
        memory.available_bytes(),
        limit=peak,
        unit="B",
        reason="a second process of the same size must fit, or the run ends in swap",
    )


@pytest.mark.forge_check("environment.monotonic_clock")
def test_monotonic_clock(evidence):
    """Durations and deadlines use a clock that never goes back and that no one can set.

    Limit: 1 ms steps, a tenth of the shortest thing the suites time.
    """
    reading = clock.read_clock()
    evidence.equal(
        "declared_monotonic", reading.declared_monotonic, expected=True, reason="time.monotonic"
    )
    evidence.equal(
        "moved_by_the_wall_clock",
        reading.declared_adjustable,
        expected=False,
        reason="a deadline must survive a step of the wall clock",
    )
    evidence.equal(
        "backward_steps", reading.backward_steps, expected=0, reason="20,000 readings in a row"
    )
    evidence.within(
        "smallest_step",
        reading.smallest_step_s,
        low=1e-12,
        high=1e-3,
        unit="s",
        reason="a clock that stands still, or ticks coarser than 1 ms, times nothing here",
    )


@pytest.mark.forge_check("environment.thread_budget")
def test_thread_budget(subject, evidence):
    """No more compute threads than processors the scheduler or the container grants.

    More threads than quota are throttled together: every one waits for the slowest.
    """
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = cgroup.cpu_quota()
    granted = usable if quota is None else min(usable, max(1, math.floor(quota)))
    evidence.at_most(
        "compute_threads",
        torch.get_num_threads(),
        limit=granted,
        unit="threads",
        reason=f"{usable} usable processors, quota {'none' if quota is None else quota}",
    )


@pytest.mark.forge_check("environment.accelerator")
def test_accelerator(forge_config, evidence):
    """The declared accelerator is there, with driver and architecture, and computes.

    Oracle: an integer sum with a known result; a build without kernels for the architecture is
    found only by running one. Not applicable only where `accelerator = "none"` is declared.
    """
    declared = dict(forge_config.declared).get("accelerator", UNDECLARED)
    found = accelerator.read_accelerator()
    if declared == UNDECLARED and found.kind == "none":
        pytest.skip(
            "no accelerator found and none declared: set [declared] accelerator to 'none' if "
            "none is meant to be here, or to 'cuda' to require one"
        )
    evidence.equal(
        "accelerator",
        found.kind,
        expected=found.kind if declared == UNDECLARED else declared,
        reason="visible to torch, against [declared] accelerator",
    )
    for name in ("name", "architecture", "driver"):
        evidence.record(name, getattr(found, name), reason="first visible device")
    evidence.equal(
        "problem",
        found.problem or "none",
        expected="none",
        reason=f"an integer sum on the device, driver {found.driver}",
    )


@pytest.mark.forge_check("environment.timing_noise")
def test_timing_noise(evidence):
    """An A/A comparison on this machine: the same work, twice a pair, must look the same.

    The median ratio of 40 interleaved pairs has exact order-statistic bounds (error 1 % a side,
    rank 13 of 40). They must enclose 1, or comparisons here raise false alarms; their width is
    the smallest change a timing check can see, warned about above 10 %.
    """
    import torch

    from forge_harness.scoring.statistics import paired_median_bounds

    a = torch.ones(192, 192)

    def work():
        for _ in range(20):
            torch.mm(a, a)

    for _ in range(5):
        work()
    first, second = clock.paired_seconds(work, pairs=40)
    bounds = paired_median_bounds(first, second, error=0.01)
    evidence.record(
        "median_ratio",
        bounds.estimate,
        reason="A over A, processor time, 40 interleaved pairs",
        samples=[x / y for x, y in zip(first, second, strict=True)],
    )
    evidence.at_most(
        "bound_low", bounds.low, limit=1.05, reason="an A/A comparison must not show a change"
    )
    evidence.at_least(
        "bound_high", bounds.high, limit=0.95, reason="an A/A comparison must not show a change"
    )
    evidence.at_most(
        "noise",
        largest((bounds.high - 1, 1 - bounds.low)),
        limit=0.10,
        reason="half width of the interval: changes below it are not seen by 40 pairs",
        level="warn",
    )


@pytest.mark.forge_check("environment.deterministic_run")
def test_deterministic_run(subject, evidence):
    """Two short runs with one seed end in bit-identical state, and another seed does not.

    Oracle: SHA-256 over every tensor the run's future depends on.
    """
    task = subject.tasks()[0] if isinstance(subject, BuildsModel) else "default"
    first, second, other = (_final_digest(subject, task, seed) for seed in (7, 7, 8))
    evidence.record("state_digest", first, reason=f"{task}, seed 7, 4 steps")
    evidence.equal("repeated_digest", second, expected=first, reason="same seed, same state")
    evidence.equal(
        "seed_has_effect", other != first, expected=True, reason="seed 8 must differ from seed 7"
    )


def _final_digest(subject, task, seed):
    import torch

    session = subject.session(task, TrainOptions(seed=seed, steps=4))
    for _ in range(4):
        session.step()
    digest = hashlib.sha256()
    for name, tensor in sorted(session.state_tensors().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        # As bytes: NumPy has no bfloat16.
        flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(flat.numpy().tobytes())
    return digest.hexdigest()
