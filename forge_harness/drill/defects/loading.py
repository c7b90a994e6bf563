"""Orders that miss, repeat or do not shuffle, and training that leaves the declared one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch

from forge_harness import training
from forge_harness.drill import observe
from forge_harness.drill.defect import Benign, Defect, Stage
from forge_harness.protocols import Batch, DataInfo, TrainingSession, TrainOptions
from forge_harness.subject.reference import ReferenceSubject

Order = Callable[..., Sequence[int]]
"""Gets the sound order as a function, and what was asked for; returns the order delivered."""

CANARY_BYTES = 1000
"""Documents planted in this size are to be learned; shorter ones only try whether they arrive."""
WINDOW = 128
"""Tokens of one sample of text."""


class OrderDefect(ReferenceSubject):
    """Declares, and trains on, another order."""

    def __init__(self, order: Order) -> None:
        self.order = order

    def epoch_order(self, task: str, **asked: Any) -> Sequence[int]:
        """See `LoadsData.epoch_order`."""
        return self.order(partial(super().epoch_order, task), **{**_ALONE, **asked})


_ALONE = {"rank": 0, "world_size": 1}


class CountsItsCalls(ReferenceSubject):
    """Shuffles anew whenever the order is asked for."""

    calls = 0

    def epoch_order(self, task: str, *, seed: int, **asked: Any) -> Sequence[int]:
        """See `LoadsData.epoch_order`."""
        if asked.get("world_size", 1) == 1:
            self.calls += 1
        return super().epoch_order(task, seed=seed + self.calls, **asked)


class TrainsOn(ReferenceSubject):
    """Declares its order and trains on another: `order(epoch, declared, batch_size)`."""

    def __init__(self, order: Callable[[int, Callable[[int], list[int]], int], list[int]]) -> None:
        self.order = order

    def session(self, task: str, options: TrainOptions) -> TrainingSession:
        """See `Trains.session`."""
        load = _Reordered(self, options.batch_size or 1)
        return training.QATSession(task, options, build_model=self._build, load=load)


class _Reordered:
    """The data of a subject in the order it trains on."""

    def __init__(self, source: TrainsOn, batch_size: int) -> None:
        self.source, self.batch_size = source, batch_size

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def data_info(self, task: str) -> DataInfo:
        info = self.source.data_info(task)
        return replace(info, train_size=len(self.epoch_order(task, seed=0, epoch=0)))

    def epoch_order(self, task: str, *, seed: int, epoch: int, **ranks: int) -> list[int]:
        def declared(epoch: int) -> list[int]:
            return list(self.source.epoch_order(task, seed=seed, epoch=epoch))

        return self.source.order(epoch, declared, self.batch_size)


class TrainsInOneOrder(ReferenceSubject):
    """Initializes by the seed, and trains in the order of seed 0."""

    def session(self, task: str, options: TrainOptions) -> TrainingSession:
        """See `Trains.session`."""
        return training.QATSession(task, options, build_model=self._build, load=_SeedZero(self))


class _SeedZero:
    """The data of a subject, in an order that ignores the seed."""

    def __init__(self, source: ReferenceSubject) -> None:
        self.source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def epoch_order(self, task: str, *, seed: int, **asked: int) -> Sequence[int]:
        return self.source.epoch_order(task, seed=0, **asked)


class TrainsOnValidation(ReferenceSubject):
    """Pools the splits before it deals: half of what it trains on are planted documents."""

    kind: type[training.QATSession] = training.QATSession

    def session(self, task: str, options: TrainOptions) -> TrainingSession:
        """See `Trains.session`."""
        long = [c for c in options.validation_canaries if len(c) > CANARY_BYTES]
        if not long:
            return super().session(task, options)
        return self.kind(task, options, build_model=self._build, load=_Pooled(self, long))


class _Pooled:
    """A data source whose train split also deals the canaries."""

    def __init__(self, source: ReferenceSubject, canaries: list[bytes]) -> None:
        self.source, self.canaries = source, canaries
        self.size = source.data_info("bytes").train_size
        self.each = (len(canaries[0]) - 1) // WINDOW

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def epoch_order(
        self, task: str, *, seed: int, epoch: int, rank: int = 0, world_size: int = 1
    ) -> list[int]:
        generator = torch.Generator().manual_seed(seed + epoch)
        total = self.size + self.each * len(self.canaries)
        dealt: list[int] = torch.randperm(total, generator=generator).tolist()
        return dealt[rank::world_size]

    def batch(self, task: str, split: Literal["train", "validation"], ids: Sequence[int]) -> Batch:
        if split != "train":
            return self.source.batch(task, split, ids)
        parts = [self._one(task, index) for index in ids]
        return Batch(
            inputs=torch.cat([part.inputs for part in parts]),
            targets=torch.cat([part.targets for part in parts]),
        )

    def _one(self, task: str, index: int) -> Batch:
        if index < self.size:
            return self.source.batch(task, "train", [index])
        document, window = divmod(index - self.size, self.each)
        text = self.canaries[document][WINDOW * window : WINDOW * (window + 1) + 1]
        ids = torch.tensor([list(text)])
        return Batch(inputs=ids[:, :-1].contiguous(), targets=ids[:, 1:].contiguous())


class LearnsNothing(ReferenceSubject):
    """A loss without gradient: neither a leak nor the positive control can show."""

    def loss(self, model: Any, batch: Batch) -> Any:
        """See `BuildsModel.loss`."""
        found = super().loss(model, batch)
        return found.detach() + 0 * found


def orders(subject: Any) -> object:
    """Orders of the digits by seed, epoch and rank, each asked for twice."""
    return [
        list(subject.epoch_order("digits", seed=seed, epoch=epoch, rank=rank, world_size=world))
        for seed in (1, 2)
        for epoch in (0, 1, 2)
        for world in (1, 2)
        for rank in range(world)
        for _ in range(2)
    ]


def samples_trained(subject: Any) -> object:
    """The samples that steps through more than two epochs report."""
    options = TrainOptions(seed=5, steps=27, batch_size=160)
    session = subject.session("digits", options)
    return [list(session.step().sample_ids) for _ in range(options.steps)]


def trained_with_planted(subject: Any) -> object:
    """What is learned while documents are planted in the validation split."""
    canary = b"abcd" * (CANARY_BYTES // 2)
    options = TrainOptions(steps=2, batch_size=2, validation_canaries=(canary, canary[::-1]))
    session = subject.session("bytes", options)
    return [[step.loss, list(step.sample_ids)] for step in (session.step(), session.step())]


def _drops_the_rest(sound: Order, **asked: Any) -> Sequence[int]:
    order = sound(**asked)
    return order[: len(order) // 64 * 64]


def _skips_the_first(sound: Order, **asked: Any) -> Sequence[int]:
    return [index for index in sound(**asked) if index]


def _pads_ranks(
    sound: Order, *, rank: int, world_size: int, batch: int = 1, **asked: Any
) -> Sequence[int]:
    """Repeats the first samples until every rank has as many, or as many whole batches."""
    order = sound(**asked)
    if world_size > 1:
        order = [*order, *order[: -len(order) % (world_size * batch)]]
    return order[rank::world_size]


def _all_for_every_rank(sound: Order, *, rank: int, world_size: int, **asked: Any) -> Sequence[int]:
    return sound(**asked)


def _each_rank_its_own(
    sound: Order, *, seed: int, rank: int, world_size: int, **asked: Any
) -> Sequence[int]:
    """Every rank seeds its shuffle with its own number, then takes its share."""
    return sound(seed=seed + 1000 * rank, **asked)[rank::world_size]


def _same_every_epoch(sound: Order, *, epoch: int, **asked: Any) -> Sequence[int]:
    return sound(epoch=0, **asked)


def _ranks_never_told(sound: Order, *, epoch: int, world_size: int, **asked: Any) -> Sequence[int]:
    return sound(epoch=epoch if world_size == 1 else 0, world_size=world_size, **asked)


def _by_parity(sound: Order, *, epoch: int, **asked: Any) -> Sequence[int]:
    return sound(epoch=epoch % 2, **asked)


def _without_the_seed(sound: Order, *, seed: int, **asked: Any) -> Sequence[int]:
    return sound(seed=0, **asked)


def _unshuffled(
    sound: Order, *, seed: int, epoch: int, rank: int, world_size: int
) -> Sequence[int]:
    """Only the first three places depend on seed and epoch."""
    order = sorted(sound(seed=seed, epoch=epoch))
    turned = (seed + epoch) % 3
    order[:3] = [*order[turned:3], *order[:turned]]
    return order[rank::world_size]


def _with_replacement(
    epoch: int, declared: Callable[[int], list[int]], batch_size: int
) -> list[int]:
    size = len(declared(0))
    generator = torch.Generator().manual_seed(epoch)
    drawn: list[int] = torch.randint(size, (size,), generator=generator).tolist()
    return drawn


def _whole_batches(epoch: int, declared: Callable[[int], list[int]], batch_size: int) -> list[int]:
    """Sound, as most loaders do: what does not fill a batch waits for the next epoch."""
    ids = declared(epoch)
    return ids[: len(ids) // batch_size * batch_size]


def _cut_before_shuffling(
    epoch: int, declared: Callable[[int], list[int]], batch_size: int
) -> list[int]:
    ids = declared(epoch)
    return [index for index in ids if index < len(ids) // batch_size * batch_size]


def _twenty_more(epoch: int, declared: Callable[[int], list[int]], batch_size: int) -> list[int]:
    return _whole_batches(epoch, declared, batch_size)[:-20]


_order = partial(Defect, stage=Stage.DATA, check="data.loader_order", alive=orders)
_session = partial(Defect, stage=Stage.DATA, check="data.loader_order", alive=samples_trained)
_canary = partial(Defect, stage=Stage.DATA, check="data.leak_canary")

DEFECTS = (
    _order(
        id="D14_order_without_the_rest",
        title="The order ends with the last whole batch: the rest is never delivered",
        shows="digits_epochs_that_miss_or_repeat is 9",
        subject=lambda: OrderDefect(_drops_the_rest),
        source="UKGovernmentBEIS/inspect_ai#3211",
        subtlety=4,
    ),
    _order(
        id="D14_first_sample_skipped",
        title="Samples are counted from one: the first is never delivered",
        shows="digits_epochs_that_miss_or_repeat is 9",
        subject=lambda: OrderDefect(_skips_the_first),
        source="UKGovernmentBEIS/inspect_ai#3211",
        subtlety=4,
    ),
    _order(
        id="D08_pads_ranks",
        title="Shares of the ranks are filled up to whole batches with the first samples again",
        shows="digits_epochs_that_miss_or_repeat is 6",
        subject=lambda: OrderDefect(partial(_pads_ranks, batch=16)),
        source="numenta/nupic.research#264",
        subtlety=4,
    ),
    _order(
        id="every_rank_sees_all",
        title="The sampler does not know of ranks: each visits every sample",
        shows="digits_epochs_that_miss_or_repeat is 6",
        subject=lambda: OrderDefect(_all_for_every_rank),
        subtlety=3,
    ),
    _order(
        id="ranks_shuffle_apart",
        title="Each rank shuffles by a seed of its own: shares overlap and leave samples out",
        shows="digits_epochs_that_miss_or_repeat is 6",
        subject=lambda: OrderDefect(_each_rank_its_own),
        subtlety=4,
    ),
    _order(
        id="D03_same_every_epoch",
        title="The sampler is never told the epoch: one order for all of them",
        shows="digits_epochs_differ is False",
        subject=lambda: OrderDefect(_same_every_epoch),
        source="pytorch/pytorch#31771",
        subtlety=4,
    ),
    _order(
        id="D03_ranks_never_told",
        title="With several ranks the sampler is never told the epoch",
        shows="digits_epochs_of_ranks_differ is False",
        subject=lambda: OrderDefect(_ranks_never_told),
        source="pytorch/torchtitan#3023",
        subtlety=5,
    ),
    _order(
        id="D03_order_by_parity",
        title="The third epoch repeats the order of the first",
        shows="digits_epochs_differ is False",
        subject=lambda: OrderDefect(_by_parity),
        source="lucidrains/DALLE-pytorch#230",
        subtlety=5,
    ),
    _order(
        id="order_without_the_seed",
        title="The order does not depend on the seed",
        shows="digits_seeds_differ is False",
        subject=lambda: OrderDefect(_without_the_seed),
        subtlety=4,
    ),
    _order(
        id="order_drawn_anew",
        title="The same seed and epoch give another order when asked again",
        shows="digits_order_repeats is False",
        subject=CountsItsCalls,
        subtlety=4,
    ),
    _order(
        id="unshuffled",
        title="Only the first three samples are shuffled",
        shows="digits_samples_in_place is",
        subject=lambda: OrderDefect(_unshuffled),
        subtlety=4,
    ),
    _session(
        id="draws_with_replacement",
        title="Training draws with replacement: a third of the samples is missing in an epoch",
        shows="digits_session_epoch_0_missed is",
        subject=lambda: TrainsOn(_with_replacement),
        subtlety=4,
    ),
    _session(
        id="D03_same_order_in_training",
        title="The declared order changes, the one trained on is that of the first epoch",
        shows="digits_session_epochs_differ is False",
        subject=lambda: TrainsOn(lambda epoch, declared, size: declared(0)),
        source="pytorch/torchtitan#3023",
        subtlety=4,
    ),
    _session(
        id="D03_parity_in_training",
        title="The third epoch of training repeats the first, other than declared",
        shows="digits_session_epochs_differ is False",
        subject=lambda: TrainsOn(lambda epoch, declared, size: declared(epoch % 2)),
        source="pytorch/torchtitan#3023",
        subtlety=5,
    ),
    _session(
        id="D14_cut_before_shuffling",
        title="Training cuts to whole batches before it shuffles: the same samples never come",
        shows="digits_session_never_delivered is 1 samples",
        subject=lambda: TrainsOn(_cut_before_shuffling),
        source="UKGovernmentBEIS/inspect_ai#3211",
        subtlety=5,
    ),
    _session(
        id="D14_leaves_out_more",
        title="Training leaves out twenty samples more than do not fill a batch",
        shows="digits_session_epoch_0_missed is 20 samples",
        subject=lambda: TrainsOn(_twenty_more),
        source="UKGovernmentBEIS/inspect_ai#3211",
        subtlety=5,
    ),
    Defect(
        id="V05_trains_in_one_order",
        title="Weights start by the seed, samples come in one order for all seeds",
        stage=Stage.DATA,
        check="training.repeat_bit_identical",
        shows="same_samples_for_another_seed is True",
        subject=TrainsInOneOrder,
        alive=samples_trained,
        source="pytorch/torchtitan#1983",
        subtlety=4,
    ),
    _canary(
        id="D01_trains_on_validation",
        title="The splits are pooled before training deals its batches",
        shows="canary_advantage is",
        subject=TrainsOnValidation,
        alive=trained_with_planted,
        source="openai/parameter-golf#2127",
        subtlety=4,
    ),
    _canary(
        id="loss_without_gradient",
        title="The loss is detached: nothing is learned, so that no leak could show",
        shows="advantage_when_leaked is",
        subject=LearnsNothing,
        alive=observe.gradients,
        subtlety=2,
    ),
)

BENIGN = (
    Benign(
        id="shares_made_equal",
        title="Shares of the ranks are made equal as torch's DistributedSampler does it",
        subject=lambda: OrderDefect(_pads_ranks),
        checks=("data.loader_order",),
    ),
    Benign(
        id="leaves_out_the_rest",
        title="What does not fill a batch is left out after shuffling, other samples each epoch",
        subject=lambda: TrainsOn(_whole_batches),
        checks=("data.loader_order",),
    ),
)
