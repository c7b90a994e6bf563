"""The order in which samples are delivered, as declared and as trained."""

import itertools
import math

import pytest

from forge_harness.protocols import TrainOptions, Trains

from .support import order_of, tasks_of

SMALL = 20_000
"""Samples up to which epochs of the cheapest task are trained for real."""
EPOCHS = 3
"""An order that follows the parity of the epoch repeats in the third only."""
TELLS = 4
"""Samples of an epoch, at least, whose order is compared with that of others."""
BEGINNING = 20
"""Steps of a session on more samples than that."""
LEAST_AGAIN = 0.5
"""Share of an epoch that has to be delivered a second time for its order to show."""


@pytest.mark.forge_check("data.loader_order")
def test_loader_order(subject, evidence):
    """Each epoch visits every sample once, over all ranks, in an order that seed and epoch decide.

    Oracle: sorted ids are 0 .. n - 1. Ranks are 1, 2 and 3, so that uneven shares occur, which may
    be made even by fewer repeated samples than there are ranks (torch's DistributedSampler). What
    is declared is then held against epochs of a real session, on the first task, as far as it gets:
    half an epoch must come again. A session may leave out what does not fill a batch, other samples
    in each epoch. On more than 20,000 samples it makes 20 steps, which repeat no more of them than
    draws with replacement would by chance: random windows of a long text are no defect, a sampler
    that is seeded anew in each step is.
    """
    for task in tasks_of(subject):
        size = subject.data_info(task).train_size
        wrong = _wrong_epochs(subject, task, size)
        evidence.equal(
            f"{task}_epochs_that_miss_or_repeat",
            len(wrong),
            expected=0,
            unit="epochs",
            reason="; ".join(wrong[:3]) or "1, 2 and 3 ranks, 3 epochs each",
        )
        first = order_of(subject, task, seed=3, epoch=0)
        evidence.equal(
            f"{task}_order_repeats",
            order_of(subject, task, seed=3, epoch=0) == first,
            expected=True,
            reason="same seed and epoch, same order",
        )
        later = [order_of(subject, task, seed=3, epoch=e) for e in range(1, EPOCHS)]
        evidence.equal(
            f"{task}_epochs_differ",
            _all_differ([first, *later]),
            expected=True,
            reason=f"a new epoch is a new permutation; {EPOCHS} epochs",
        )
        shares = {
            world: [
                order_of(subject, task, seed=3, epoch=e, rank=0, world_size=world)
                for e in range(EPOCHS)
            ]
            for world in (2, 3)
        }
        evidence.equal(
            f"{task}_epochs_of_ranks_differ",
            all(map(_all_differ, shares.values())),
            expected=True,
            reason="a new epoch is a new order for each of 2 and 3 ranks",
        )
        evidence.equal(
            f"{task}_seeds_differ",
            order_of(subject, task, seed=4, epoch=0) != first,
            expected=True,
            reason="another seed is another permutation",
        )
        fixed = sum(index == place for place, index in enumerate(first))
        evidence.at_most(
            f"{task}_samples_in_place",
            fixed,
            limit=max(8, size // 10),
            unit="samples",
            reason="a random permutation leaves about one sample where it was",
        )
    task = tasks_of(subject)[0]
    size = subject.data_info(task).train_size
    if isinstance(subject, Trains):
        held = _session_epochs if size <= SMALL else _session_beginning
        held(subject, task, evidence)


def _all_differ_where_both_are(orders):
    """Of the last ones there may be a part only: too little to be another by more than chance."""
    pairs = itertools.combinations((order for order in orders if len(order) >= TELLS), 2)
    return all(any(a != b for a, b in zip(*pair, strict=False)) for pair in pairs)


def _wrong_epochs(subject, task, size):
    """Epochs of 1, 2 and 3 ranks that leave samples out, or repeat as many as there are ranks."""
    wrong = []
    for world, epoch in itertools.product((1, 2, 3), range(EPOCHS)):
        ids = [
            index
            for rank in range(world)
            for index in order_of(subject, task, seed=3, epoch=epoch, rank=rank, world_size=world)
        ]
        if _missed(ids, size) >= world or set(ids) != set(range(size)):
            wrong.append(f"{world} ranks, epoch {epoch}: {len(ids)} ids of {size} samples")
    return wrong


def _all_differ(orders):
    return len({tuple(order) for order in orders}) == len(orders)


def _session_epochs(subject, task, evidence):
    """Trains through three epochs and looks at the samples the steps report."""
    size = subject.data_info(task).train_size
    batch = max(1, size // 8)
    # The last batch of an epoch may hold what is left.
    steps = EPOCHS * -(-size // batch)
    session = subject.session(task, TrainOptions(seed=3, steps=steps, batch_size=batch))
    ids = [int(index) for _ in range(steps) for index in session.step().sample_ids]
    # An epoch is all samples, or as many as fill whole batches: whichever explains more.
    epochs = min(
        (_cut(ids, length) for length in (size, size // batch * batch)),
        key=lambda epochs: sum(_missed(epoch, size) for epoch in epochs),
    )
    for number, visited in enumerate(epochs):
        evidence.equal(
            f"{task}_session_epoch_{number}_missed",
            _missed(visited, size),
            expected=0,
            unit="samples",
            reason=f"{len(visited)} of {size} samples an epoch in steps of {batch}, as reported",
        )
    again = len(ids) - len(epochs[0])
    if again < LEAST_AGAIN * len(epochs[0]):
        pytest.skip(
            f"{steps} steps of {batch} samples are {EPOCHS} epochs of {task}, and the session "
            f"delivered {len(ids)} samples, {again} of them after its first {len(epochs[0])}: "
            "whether epochs differ does not show; take TrainOptions.batch_size samples a step"
        )
    evidence.equal(
        f"{task}_session_epochs_differ",
        _all_differ_where_both_are(epochs),
        expected=True,
        reason="a new epoch is a new order in training as well",
    )
    left_out = [frozenset(range(size)) - set(epoch) for epoch in epochs]
    evidence.equal(
        f"{task}_session_never_delivered",
        len(left_out[0]) if len(set(left_out)) == 1 else 0,
        expected=0,
        unit="samples",
        reason="what does not fill a batch is left out after shuffling, not the same ever",
    )


def _session_beginning(subject, task, evidence):
    """Trains the first steps of an epoch that is too long to be trained through."""
    size = subject.data_info(task).train_size
    session = subject.session(task, TrainOptions(seed=3, steps=BEGINNING))
    ids = [int(index) for _ in range(BEGINNING) for index in session.step().sample_ids]
    # Of as many draws with replacement; six standard deviations of a Poisson count, and a few.
    chance = len(ids) - size * -math.expm1(len(ids) * math.log1p(-1 / size))
    evidence.at_most(
        f"{task}_session_repeated",
        _missed(ids, size),
        limit=math.floor(chance + 6 * math.sqrt(chance)) + 3,
        unit="samples",
        reason=f"of {len(ids)} that {BEGINNING} steps deliver, an epoch being {size}; "
        f"{chance:.2g} repeat by chance where windows are drawn at random",
    )


def _cut(ids, length):
    return [ids[epoch * length : (epoch + 1) * length] for epoch in range(EPOCHS)]


def _missed(visited, size):
    """Places of an epoch that do not hold a sample of their own."""
    return len(visited) - len(set(visited) & set(range(size)))
