from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from forge_harness.errors import ForgeError, NonFiniteError
from forge_harness.protocols import Batch, TrainOptions
from forge_harness.training import (
    QATSession,
    ReferenceData,
    batch,
    data_info,
    planned_schedule,
    training_loss,
)
from forge_harness.training.optimize import clip_gradients, decay_groups, gradient_norm
from forge_harness.training.randomness import RandomState


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(torch.nan_to_num(left[key]), torch.nan_to_num(right[key])) for key in left
    )


def run(session: QATSession, steps: int) -> list[float]:
    return [session.step().loss for _ in range(steps)]


def gradients(session: QATSession) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in session.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("task", ["digits", "bytes#small"])
def test_same_seed_same_bits_whatever_else_draws_random_numbers(task: str) -> None:
    options = TrainOptions(steps=3, batch_size=4)
    first = QATSession(task, options)
    losses = run(first, 3)
    second = QATSession(task, options)
    for _ in range(3):
        torch.rand(7), np.random.rand(3), random.random()
        second.step()
    assert same(first.state_tensors(), second.state_tensors())
    assert losses == run(QATSession(task, options), 3)
    other = QATSession(task, TrainOptions(steps=3, batch_size=4, seed=1))
    assert run(other, 3) != losses


def test_result_does_not_depend_on_the_number_of_threads() -> None:
    options = TrainOptions(steps=2, batch_size=4)
    threads = torch.get_num_threads()
    states = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            session = QATSession("bytes#small", options)
            run(session, 2)
            states.append(session.state_tensors())
    finally:
        torch.set_num_threads(threads)
    assert same(*states)


def test_evaluation_in_between_changes_nothing() -> None:
    options = TrainOptions(steps=4, batch_size=32)
    plain, evaluated = QATSession("digits", options), QATSession("digits", options)
    run(plain, 4)
    for _ in range(4):
        evaluated.step()
        evaluated.evaluate()
        assert evaluated.model.training
    assert same(plain.state_tensors(), evaluated.state_tensors())


@pytest.mark.parametrize("accumulation", [2, 3, 5])
def test_accumulation_gives_the_gradient_of_the_whole_batch(accumulation: int) -> None:
    # Full precision: the rounding of a ternary model amplifies the last bit of a sum.
    whole = QATSession("digits", TrainOptions(steps=1, precision="full", batch_size=32))
    split = QATSession(
        "digits",
        TrainOptions(steps=1, precision="full", batch_size=32, accumulation=accumulation),
    )
    first, second = whole.step(), split.step()
    assert sorted(first.sample_ids) == sorted(second.sample_ids)
    assert second.loss == pytest.approx(first.loss, rel=1e-6)
    other = gradients(split)
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-7)


def test_last_batch_of_an_epoch_is_smaller_and_normalised_by_its_own_size() -> None:
    size = data_info("digits").train_size
    batch_size = size // 2 - 1  # Third batch of the epoch: the two or three samples left.
    options = TrainOptions(steps=4, precision="full", batch_size=batch_size, accumulation=2)
    session = QATSession("digits", options)
    records = [session.step() for _ in range(2)]
    before = {k: v.clone() for k, v in session.model.state_dict().items()}
    last = session.step()
    assert len(last.sample_ids) == size - 2 * batch_size
    seen = [index for record in [*records, last] for index in record.sample_ids]
    assert sorted(seen) == list(range(size))
    twin = QATSession("digits", options)
    twin.model.load_state_dict(before)
    loss = training_loss(twin.model, batch("digits", "train", last.sample_ids))
    assert last.loss == pytest.approx(loss.item(), rel=1e-6)
    loss.backward()
    norm = gradient_norm(list(twin.model.parameters()))
    assert last.grad_norm == pytest.approx(norm, rel=1e-5)
    assert session.position.epoch == 1
    assert len(session.step().sample_ids) == batch_size


def test_fixed_batch_is_trained_on_at_every_step() -> None:
    session = QATSession("digits", TrainOptions(steps=40, fixed_batch=(3, 1, 4, 15)))
    records = [session.step() for _ in range(40)]
    assert all(record.sample_ids == (3, 1, 4, 15) for record in records)
    assert records[-1].loss < 0.05
    assert session.position.offset == 0


def test_clipping_bounds_what_the_optimizer_sees() -> None:
    seen: list[float] = []
    options = TrainOptions(steps=2, clip_norm=0.01, batch_size=16)
    session = QATSession("digits", options)
    parameters = list(session.model.parameters())
    session.optimizer.register_step_pre_hook(lambda *_: seen.append(gradient_norm(parameters)))
    parameters[0].register_hook(lambda gradient: gradient * 1e6)
    assert session.step().grad_norm > 1.0
    assert seen == [pytest.approx(0.01, rel=1e-4)]


def test_clip_norm_zero_never_clips() -> None:
    session = QATSession("digits", TrainOptions(steps=1, clip_norm=0.0, batch_size=16))
    record = session.step()
    assert gradient_norm(list(session.model.parameters())) == record.grad_norm


def test_gradient_norm_is_exact_and_survives_large_values() -> None:
    parameter = nn.Parameter(torch.zeros(2, 2))
    parameter.grad = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert gradient_norm([parameter]) == 5.0
    parameter.grad = torch.full((2, 2), 1e30)
    assert gradient_norm([parameter]) == pytest.approx(2e30)
    clip_gradients([parameter], 2e30, 1.0)
    assert gradient_norm([parameter]) == pytest.approx(1.0)


def test_matrices_decay_and_nothing_else() -> None:
    session = QATSession("bytes#small", TrainOptions(steps=1))
    names = {id(p): name for name, p in session.model.named_parameters()}
    decayed, kept = ([names[id(p)] for p in group] for group in decay_groups(session.model))
    assert decayed
    assert all(name.startswith("blocks.") and "norm" not in name for name in decayed)
    assert "embedding.weight" in kept
    assert set(decayed) | set(kept) == set(names.values())
    session.step()
    now = {group["decays"]: group["weight_decay"] for group in session.optimizer.param_groups}
    assert now == {True: session.recipe.weight_decay, False: 0.0}


@pytest.mark.parametrize("task", ["digits", "bytes#small"])
def test_live_optimizer_follows_the_plan(task: str) -> None:
    options = TrainOptions(steps=6, batch_size=2)
    session = QATSession(task, options)
    for planned in planned_schedule(task, options):
        record = session.step()
        group = next(g for g in session.optimizer.param_groups if g["decays"])
        assert record.learning_rate == group["lr"] == planned.learning_rate
        assert record.weight_decay == group["weight_decay"] == planned.weight_decay


def test_steps_beyond_the_schedule_are_refused() -> None:
    session = QATSession("digits", TrainOptions(steps=1, batch_size=2))
    session.step()
    with pytest.raises(ForgeError, match="All 1 steps"):
        session.step()


class PoisonedData(ReferenceData):
    """Delivers one NaN once `poison` is set."""

    poison = False

    def batch(self, task: str, split: str, ids: Sequence[int]) -> Batch:  # type: ignore[override]
        found = batch(task, split, ids)  # type: ignore[arg-type]
        if self.poison:
            found.inputs[0, 0] = float("nan")
        return found


def test_a_nan_never_reaches_the_weights() -> None:
    data = PoisonedData()
    session = QATSession("digits", TrainOptions(steps=3, batch_size=8), load=data)
    session.step()
    before = session.state_tensors()
    data.poison = True
    with pytest.raises(NonFiniteError, match="Step 1 has loss nan"):
        session.step()
    assert same(session.state_tensors(), before)
    data.poison = False
    twin = QATSession("digits", TrainOptions(steps=3, batch_size=8))
    run(twin, 2)
    session.step()
    assert same(session.state_tensors(), twin.state_tensors())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_gradient_never_reaches_the_weights(value: float) -> None:
    session = QATSession("digits", TrainOptions(steps=3, batch_size=8))
    session.step()
    before = session.state_tensors()
    parameter = next(iter(session.model.parameters()))
    handle = parameter.register_hook(lambda gradient: gradient * value)
    with pytest.raises(NonFiniteError):
        session.step()
    handle.remove()
    assert same(session.state_tensors(), before)


@pytest.mark.parametrize("extra", [{"compute": "int8"}, {"compute": "fake"}, {"autocast": True}])
def test_compute_modes_and_autocast_train(extra: dict[str, object]) -> None:
    options = TrainOptions(steps=2, batch_size=2, extra=extra)
    plain = run(QATSession("bytes#small", TrainOptions(steps=2, batch_size=2)), 2)
    assert run(QATSession("bytes#small", options), 2) == pytest.approx(plain, rel=0.02)


def test_random_state_is_restored_when_the_block_raises() -> None:
    state = RandomState(3)
    before = state.tensors()
    outside = torch.get_rng_state()

    def draw() -> tuple[float, ...]:
        return torch.rand(1).item(), float(np.random.rand()), random.gauss(0, 1)

    with pytest.raises(ZeroDivisionError), state.active():
        raise ZeroDivisionError(draw())
    assert same(state.tensors(), before)
    assert torch.equal(torch.get_rng_state(), outside)
    with state.active():
        drawn = draw()
    other = RandomState(9)
    other.load(before)
    with other.active():
        assert draw() == drawn
    assert same(other.tensors(), state.tensors())
