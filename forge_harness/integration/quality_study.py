"""Trains the arms of the quality comparison side by side, one single-threaded process a core."""

from __future__ import annotations

import json
import multiprocessing
import os
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, is_dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, cast

from forge_harness.durable import write_durably
from forge_harness.errors import ForgeError
from forge_harness.subject.loader import load_subject
from forge_harness.subject.protocols import Arm, MeasuresQuality, QualityRun

Progress = Callable[[str, int, int], None]
"""Called with (label of the run that ended, runs ended, runs in all)."""


_ENTRY = (str, str, Integral)
"""Types of an entry of the plan."""


class StudyError(ForgeError):
    """A run of the quality comparison raised; the message names the run."""


def obtain_study(
    spec: str | None,
    profile: str,
    out: Path,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[QualityRun]:
    """Returns the study in `out`, or trains it and writes it there.

    Args:
        spec: Subject, as `load_subject` takes it. Each process loads it anew, so that no state
            of this process can leak into a measurement.
        profile: Size of the study.
        out: JSON file; written atomically, with the runs in the order of the plan.
        workers: Processes; the number of usable cores when None.
        progress: Told of each run that ends.

    Raises:
        StudyError: The plan is none, a run raised or returned something else, or its process died.
            Nothing is written.
    """
    if out.is_file():
        return read_study(out)
    subject = load_subject(spec).subject
    if not isinstance(subject, MeasuresQuality):
        raise StudyError("The subject does not offer MeasuresQuality (quality_plan, quality_run).")
    plan = _checked(list(subject.quality_plan(profile)), profile)
    runs = _train(spec, profile, plan, workers or usable_cores(), progress)
    write_study(out, runs)
    return runs


def usable_cores() -> int:
    """Returns the number of cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_study(path: Path) -> list[QualityRun]:
    """Reads a study written by `write_study`."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [_from_json(row) for row in rows]


def write_study(path: Path, runs: Sequence[QualityRun]) -> None:
    """Writes a study; a reader never sees half of it."""
    write_durably(path, json.dumps([asdict(run) for run in runs], indent=1).encode())


def _checked(plan: list[Any], profile: str) -> list[tuple[str, Arm, int]]:
    if not plan:
        raise StudyError(
            f"quality_plan({profile!r}) of the subject names no run; expected (task, arm, seed) of "
            "each."
        )
    for entry in plan:
        fits = isinstance(entry, tuple | list) and len(entry) == len(_ENTRY)
        if not fits or not all(map(isinstance, entry, _ENTRY)):
            raise StudyError(
                f"quality_plan({profile!r}) of the subject has an entry {entry!r:.80}; expected "
                "(task, arm, seed)."
            )
    return [cast("tuple[str, Arm, int]", tuple(entry)) for entry in plan]


def _as_json(run: object) -> dict[str, Any]:
    """Returns a run as JSON values; numbers of NumPy and torch become Python's."""
    if not is_dataclass(run) or isinstance(run, type):
        raise TypeError(f"quality_run returned a {type(run).__name__}; expected QualityRun")
    row: dict[str, Any] = json.loads(json.dumps(asdict(run), default=_number))
    _from_json(row)  # Raises for one of other fields.
    return row


def _number(value: object) -> object:
    item = getattr(value, "item", None)
    if item is None:
        raise TypeError(f"a QualityRun holds a {type(value).__name__}; expected numbers and text")
    return item()


def _from_json(row: dict[str, Any]) -> QualityRun:
    return QualityRun(
        **{
            **row,
            "block_correct": tuple(row["block_correct"]),
            "block_size": tuple(row["block_size"]),
            "curve": tuple((int(step), float(a), float(b)) for step, a, b in row["curve"]),
        }
    )


def _train(
    spec: str | None,
    profile: str,
    plan: list[tuple[str, Arm, int]],
    workers: int,
    progress: Progress | None,
) -> list[QualityRun]:
    # spawn: a forked child would inherit torch's thread pools in an unusable state.
    context = multiprocessing.get_context("spawn")
    results: dict[int, list[QualityRun]] = {}
    with ProcessPoolExecutor(
        max_workers=min(workers, len(plan)), mp_context=context, initializer=_begin_process
    ) as pool:
        pending = {
            pool.submit(_run, spec, profile, *task): index for index, task in enumerate(plan)
        }
        try:
            while pending:
                ended, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in ended:
                    index = pending.pop(future)
                    results[index] = _result(future, plan[index])
                    if progress is not None:
                        progress(_label(plan[index]), len(results), len(plan))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [run for index in sorted(results) for run in results[index]]


def _result(future: Future[Any], task: tuple[str, Arm, int]) -> list[QualityRun]:
    try:
        ok, value = future.result()
    except BrokenProcessPool as error:
        raise StudyError(
            f"Quality run {_label(task)} lost its process (killed, or out of memory)."
        ) from error
    if not ok:
        raise StudyError(f"Quality run {_label(task)} raised {value}")
    return [_from_json(row) for row in cast("list[dict[str, Any]]", value)]


def _label(task: tuple[str, Arm, int]) -> str:
    name, arm, seed = task
    return f"{name} {arm} seed {seed}"


def _begin_process() -> None:
    """Prepares a process of the study: one thread, and processes of its own as elsewhere."""
    # A spawned process spawns its own too: DataLoader workers could then take no lambda.
    multiprocessing.set_start_method(None, force=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)


def _run(
    spec: str | None, profile: str, task: str, arm: Arm, seed: int
) -> tuple[bool, list[dict[str, Any]] | str]:
    subject = cast("MeasuresQuality", load_subject(spec).subject)
    try:
        # As JSON: what a subject puts into it may not cross processes.
        return True, [_as_json(run) for run in subject.quality_run(task, arm, seed, profile)]
    except Exception as error:
        # The traceback object does not cross processes; its text does.
        last = traceback.format_exc(limit=-3)
        return False, f"{type(error).__name__}: {error}\n{last}"
