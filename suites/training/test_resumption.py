"""Runs repeat and resume bit for bit, and nothing a run depends on is left out of a checkpoint."""

import random
from dataclasses import replace
from urllib.parse import quote

import pytest
import torch

from forge_harness.canonical import file_sha256
from forge_harness.subject.protocols import TrainOptions

from .comparison import compare, compare_metrics, compare_run, compare_state
from .rerun import PACKAGE, Outcome, digest, facts, metrics, outcome
from .states import tensors_of
from .support import (
    cheapest,
    differing,
    digests,
    disturb_generators,
    finished,
    only_cheapest,
    optimizer_of,
    others,
    short_epochs,
    shown,
    states_of_models,
    steps,
    tasks,
)

_STEPS = 20
_CUT = 11
"""Past the middle of the schedule, inside the second epoch where epochs are short."""
_MOVED = (
    "; the generators of the process (torch, NumPy, random) were moved before the second run and "
    "before its step 5, as other code may: a session that draws from them keeps their states"
)


def _options(subject, task, **changes):
    return short_epochs(subject, task, steps=_STEPS, **changes)


def _went_elsewhere(evidence, another_process, result):
    """Whether the other process did its part; red where it failed to, and not only to begin."""
    failed, error = result.get("failed", ""), result.get("error", "")
    left_out = failed == "loading" and another_process.spec is None
    evidence.record(
        "other_process",
        f"left out, the subject cannot be sent there: {error}" if left_out else "used",
        reason="a fresh interpreter with another hash seed, which shares nothing but the files",
    )
    if left_out:
        return False
    evidence.equal(
        "other_process_error",
        error or "none",
        expected="none",
        reason=f"{failed or 'nothing'} fails in another process",
    )
    return True


@pytest.mark.forge_check("training.repeat_bit_identical")
def test_repeat_bit_identical(subject, evidence, tmp_path, another_process):
    """The same seed gives the same run, whatever else drew random numbers; another seed does not.

    Oracle: bitwise equality of all steps, of the final state and of what `evaluate` says, over 20
    steps and two epoch borders, with the generators of the process moved before and during the
    second run. A third run is made in another process, under another hash seed.
    """
    task = only_cheapest(subject, evidence)
    options = _options(subject, task, seed=7)
    reference = subject.session(task, options)
    records = steps(reference, _STEPS)
    expected = outcome(reference, records)
    disturb_generators(99)
    session = subject.session(task, options)
    repeated = steps(session, 5)
    disturb_generators(100)
    repeated += steps(session, _STEPS - 5)
    compare(evidence, outcome(session, repeated), expected, note=_MOVED)
    result = another_process.run(tmp_path / "other", task, options, steps=_STEPS)
    if _went_elsewhere(evidence, another_process, result):
        compare(evidence, finished(result), expected, "other_process.")
    other = subject.session(task, _options(subject, task, seed=8))
    changed = differing(digests(other.model.state_dict()), digests(_fresh(subject, task, 7)))
    evidence.at_least(
        "tensors_of_another_seed",
        len(changed),
        limit=1,
        unit="tensors",
        reason="another seed starts from other weights; otherwise nothing was tested",
    )
    same = [r.sample_ids for r in steps(other, 1)] == [r.sample_ids for r in records[:1]]
    evidence.equal(
        "same_samples_for_another_seed", same, expected=False, reason="the seed orders the data"
    )


def _fresh(subject, task, seed):
    return subject.session(task, _options(subject, task, seed=seed)).model.state_dict()


@pytest.mark.forge_check("training.resume_bit_identical")
def test_resume_bit_identical(subject, evidence, tmp_path, another_process):
    """A run interrupted in the middle of its second epoch ends as if it had not been.

    Oracle: bitwise equality of steps, sample ids, final state and `evaluate` with an uninterrupted
    run. The interruption lies past the boundary of a two-stage schedule, and the generators of the
    process are moved before the resumption. Then once more in another process, which has the
    checkpoint and nothing else: it also says at once what the saved session says of itself, and
    exports the package that one does. The other tasks go on for two steps as the session that was
    saved does. Parameters a task declares to be tied are so after it, of every task that has any.
    """
    task = cheapest(subject)
    options = _options(subject, task, seed=3)
    reference = subject.session(task, options)
    expected = outcome(reference, steps(reference, _STEPS))
    session = subject.session(task, options)
    records = steps(session, _CUT)
    path = tmp_path / "session"
    subject.save_session(session, path)
    disturb_generators(5)
    resumed = subject.resume_session(task, options, path)
    evidence.equal("resumed_at", resumed.step_index, expected=_CUT, unit="steps", reason="as saved")
    saved = metrics(session)
    first = subject.resume_session(task, options, path)
    compare_metrics(evidence, "metrics_at_once", metrics(first), saved, "right after resuming")
    found = outcome(resumed, records + steps(resumed, _STEPS - _CUT))
    compare(evidence, found, expected)
    if callable(getattr(subject, "model_spec", None)):
        _compare_ties(subject, evidence, tmp_path)
    for other in others(subject):
        _compare_two_steps(subject, evidence, other, tmp_path)
    result = another_process.run(
        tmp_path / "other", task, options, steps=_STEPS - _CUT, checkpoint=path
    )
    if not _went_elsewhere(evidence, another_process, result):
        return
    compare_metrics(
        evidence, "other_process.metrics_at_once", result["metrics_at_once"], saved, "there at once"
    )
    there = replace(expected, facts=expected.facts[_CUT:])
    compare(evidence, finished(result), there, "other_process.")
    if callable(getattr(subject, "export_package", None)):
        _compare_packages(subject, evidence, task, session, tmp_path)


def _compare_two_steps(subject, evidence, task, directory):
    """Holds a session resumed after two steps to the one that was saved: at once, and two later.

    Their metrics are left out: those of a large split take seconds.
    """
    options, path = TrainOptions(steps=4, batch_size=6), directory / _named("session", task)
    session = subject.session(task, options)
    steps(session, 2)
    subject.save_session(session, path)
    saved = digests(session.state_tensors())
    expected = Outcome(facts(steps(session, 2)), digests(session.state_tensors()), {})
    disturb_generators(6)
    resumed = subject.resume_session(task, options, path)
    at_once = digests(resumed.state_tensors())
    found = Outcome(facts(steps(resumed, 2)), digests(resumed.state_tensors()), {})
    compare_run(evidence, found, expected, f"{task}.")
    compare_state(evidence, f"{task}.different_at_once", at_once, saved, "resumed")


def _named(kind, task):
    """A name for a file, whatever the task is called."""
    return f"{kind}-{quote(task, safe='')}"


def _compare_ties(subject, evidence, directory):
    """Whether tied parameters are one tensor in a resumed session as in the one that was saved."""
    for task in tasks(subject):
        pairs = subject.model_spec(task).tied
        if not pairs:
            continue
        options, path = TrainOptions(steps=8), directory / _named("tied", task)
        session = subject.session(task, options)
        steps(session, 4)
        subject.save_session(session, path)
        resumed = subject.resume_session(task, options, path)
        # What the live session does not tie, or has under another name, says nothing here.
        held = _together(session.model, pairs)
        apart = [pair for pair in held if pair not in _together(resumed.model, pairs)]
        evidence.equal(
            f"{task}.untied",
            len(apart),
            expected=0,
            unit="tensors",
            reason=f"of {len(held)} that share one with another: "
            + shown([other for _, other in apart]),
        )


def _together(model, pairs):
    """The pairs of names, of those given, that a model's state dict has for one tensor."""
    tensors = model.state_dict(keep_vars=True)
    return [
        (one, other)
        for one, other in pairs
        if one in tensors
        and other in tensors
        and tensors[one].data_ptr() == tensors[other].data_ptr()
    ]


def _compare_packages(subject, evidence, task, session, directory):
    """Holds a resumed session's package to the live one's, by file where files repeat."""
    one, two = directory / "package-1", directory / "package-2"
    resumed = directory / "other" / PACKAGE
    for path in (one, two):
        subject.export_package(session, path)
    live, again, found = (_files(path) for path in (one, two, resumed))
    # A file with the time of its making in it says nothing; the metrics still do.
    repeats = {name: value for name, value in live.items() if again.get(name) == value}
    changed = [name for name in repeats if found.get(name) != repeats[name]]
    evidence.equal(
        "other_process.different_files",
        len(changed),
        expected=0,
        unit="files",
        reason=f"of {len(repeats)} that two exports of one session agree in: {shown(changed)}",
    )
    if callable(getattr(subject, "evaluate_package", None)):
        said = [dict(subject.evaluate_package(task, path)) for path in (resumed, one)]
        compare_metrics(evidence, "other_process.package_metrics", *said, "of the package")


def _files(directory):
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): file_sha256(path) for path in files}


@pytest.mark.forge_check("training.resume_twice_bit_identical")
def test_resume_twice_bit_identical(subject, evidence, tmp_path, forge_seed):
    """Interruptions at random steps, at an epoch border and right after one another change nothing.

    Oracle: as for one interruption, sample ids compared one by one: a sample lost or repeated at
    each restart shows in no loss.
    """
    task = only_cheapest(subject, evidence)
    options = _options(subject, task, seed=4)
    reference = subject.session(task, options)
    expected = outcome(reference, steps(reference, _STEPS))
    chooser = random.Random(forge_seed)
    # The eighth step ends an epoch where epochs are short.
    cuts = sorted({8, 9, *chooser.sample(range(1, _STEPS), 2)})
    session, records = subject.session(task, options), []
    for index, cut in enumerate(cuts):
        records += steps(session, cut - len(records))
        path = tmp_path / f"{index}"
        subject.save_session(session, path)
        disturb_generators(index)
        session = subject.resume_session(task, options, path)
    records += steps(session, _STEPS - len(records))
    evidence.record("interruptions", str(cuts), unit="steps", reason="from the seed of the run")
    compare(evidence, outcome(session, records), expected)


@pytest.mark.forge_check("training.optimizer_state_exact")
def test_optimizer_state_exact(subject, evidence, tmp_path):
    """Optimizer state and hyperparameters come back bit for bit, with their dtypes.

    Oracle: `optimizer.state_dict()` of the live and the resumed session, entry by entry. An
    optimizer without state by nature (SGD without momentum) has none right after its own step.
    """
    task = only_cheapest(subject, evidence)
    options = _options(subject, task)
    session = subject.session(task, options)
    kept = []
    handle = optimizer_of(session).register_step_post_hook(lambda o, *_: kept.append(len(o.state)))
    steps(session, 5)
    handle.remove()
    subject.save_session(session, tmp_path / "session")
    resumed = subject.resume_session(task, options, tmp_path / "session")
    live, restored = (_flat(optimizer_of(s).state_dict()) for s in (session, resumed))
    tensors = sum(isinstance(v, str) and v.startswith("tensor") for v in live.values())
    evidence.at_least(
        "state_tensors",
        tensors,
        limit=1 if any(kept) else 0,
        unit="tensors",
        reason="state that there is right after the optimizer's step, and that can be lost"
        if any(kept)
        else "the optimizer keeps no state; its hyperparameters are compared",
    )
    changed = sorted(k for k in live.keys() | restored.keys() if live.get(k) != restored.get(k))
    evidence.equal(
        "different_entries",
        len(changed),
        expected=0,
        unit="entries",
        reason=f"of {len(live)}, bytes and dtype: {shown(changed)}",
    )


def _flat(value, prefix=""):
    """Flattens nested state into name -> digest or text."""
    if isinstance(value, torch.Tensor):
        return {prefix: f"tensor {value.dtype} {digest(value)}"}
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, list | tuple):
        pairs = enumerate(value)
    else:
        return {prefix: f"{type(value).__name__} {value!r}"}
    return {k: v for key, item in pairs for k, v in _flat(item, f"{prefix}.{key}").items()}


@pytest.mark.forge_check("training.every_state_saved")
def test_every_state_saved(subject, evidence, tmp_path):
    """All a run depends on is in its state, in its checkpoint, and untouched by saving.

    Oracle: sha256 of every stateful tensor, live against resumed; the state covers each weight,
    buffer and optimizer tensor by content; and the checkpoint holds the moment it was taken, also
    when training goes on afterwards.
    """
    task = only_cheapest(subject, evidence)
    options = _options(subject, task)
    session = subject.session(task, options)
    start = digests(session.state_tensors())
    steps(session, 5)
    live = digests(session.state_tensors())
    uncovered = _uncovered(session, live)
    evidence.equal(
        "uncovered_tensors",
        len(uncovered),
        expected=0,
        unit="tensors",
        reason=f"weights, buffers, optimizer state are in the state: {shown(uncovered)}",
    )
    evidence.at_least(
        "moving_tensors",
        len(differing(start, live)),
        limit=2,
        unit="tensors",
        reason="five steps move weights and more; otherwise nothing was tested",
    )
    path = tmp_path / "session"
    subject.save_session(session, path)
    after_saving = differing(live, digests(session.state_tensors()))
    evidence.equal(
        "changed_by_saving",
        len(after_saving),
        expected=0,
        unit="tensors",
        reason=f"saving only reads: {shown(after_saving)}",
    )
    steps(session, 3)
    resumed = subject.resume_session(task, options, path)
    lost = differing(live, digests(resumed.state_tensors()))
    evidence.equal(
        "not_restored",
        len(lost),
        expected=0,
        unit="tensors",
        reason=f"state at the moment of saving, though training went on: {shown(lost)}",
    )


def _uncovered(session, state):
    """Names of live tensors whose content is nowhere in the state."""
    known = set(state.values())
    live = states_of_models(session) | tensors_of(optimizer_of(session).state_dict())
    return sorted(name for name, tensor in live.items() if digest(tensor) not in known)
