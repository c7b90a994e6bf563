"""A training checkpoint that went through the store resumes as if it never had."""

import hashlib

import pytest
import torch

from forge_harness import oracles
from forge_harness.drill.target import open_store
from forge_harness.protocols import BuildsModel, TrainOptions
from forge_harness.state import NewState

_STEPS = 8
_AT = 4


@pytest.mark.forge_check("state.checkpoint_restore")
def test_checkpoint_restore(subject, evidence, tmp_path, forge_seed):
    """Training saved into the store, overwritten, restored and resumed equals training in one go.

    Oracle: a run that was never interrupted. Losses and every tensor the run depends on are
    compared bit for bit. A checkpoint may be a file or a directory.
    """
    task = subject.tasks()[0] if isinstance(subject, BuildsModel) else "default"
    options = TrainOptions(steps=_STEPS, seed=forge_seed)
    straight = subject.session(task, options)
    losses = [straight.step().loss for _ in range(_STEPS)]
    opener = subject.state_store().opener
    session = subject.session(task, options)
    for step in range(_AT + 2):
        session.step()
        if step + 1 >= _AT:
            saved = tmp_path / f"saved-{step + 1}"
            subject.save_session(session, saved)
            _commit(opener, tmp_path / "store", saved)
    restored = tmp_path / "restored"
    with open_store(opener, tmp_path / "store") as store:
        store.restore(store.generations()[0].number)
        _copy(store, store.get("phase5", "checkpoint"), restored)
    resumed = subject.resume_session(task, options, restored)
    evidence.equal(
        "resumed_at", resumed.step_index, expected=_AT, unit="steps", reason="what was restored"
    )
    again = [resumed.step().loss for _ in range(_STEPS - _AT)]
    evidence.equal(
        "losses_equal",
        again == losses[_AT:],
        expected=True,
        reason=f"losses of steps {_AT} to {_STEPS - 1}, bit for bit",
    )
    wanted, found = (_digests(run.state_tensors()) for run in (straight, resumed))
    differing = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
    evidence.equal(
        "tensors_differing",
        len(differing),
        expected=0,
        unit="tensors",
        reason=", ".join(differing[:3]) or f"all {len(wanted)} compared",
    )


def _commit(opener, root, saved):
    files = {"data": saved}
    if saved.is_dir():
        found = (path for path in sorted(saved.rglob("*")) if path.is_file())
        files = {f"data/{path.relative_to(saved).as_posix()}": path for path in found}
    with open_store(opener, root) as store:
        store.commit([NewState(phase="phase5", kind="checkpoint", name="checkpoint", files=files)])


def _copy(store, state, place):
    for name in state.files:
        target = place / name.removeprefix("data").lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        store.copy_to(state, name, target)


def _digests(tensors):
    return {
        name: hashlib.sha256(_bytes(oracles.whole(tensor.detach()))).hexdigest()
        for name, tensor in tensors.items()
    }


def _bytes(tensor):
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
