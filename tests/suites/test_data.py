"""Each data check goes red for its own reason; the seeded defects are ones real pipelines had."""

import re
from dataclasses import replace

import pytest
import torch

from forge_harness import training
from forge_harness.protocols import Batch, methods_of
from forge_harness.subject.reference import ReferenceSubject


class ChangedPixel(ReferenceSubject):
    def data_digest(self, task):
        return "sha256:" + "0" * 64


class EmptySample(ReferenceSubject):
    def sample_contents(self, task, split, ids):
        contents = list(super().sample_contents(task, split, ids))
        return [b"" if index == 3 else c for index, c in zip(ids, contents, strict=True)]


class NothingHeldOut(ReferenceSubject):
    def data_info(self, task):
        return replace(super().data_info(task), validation_size=0)


class SharedDocument(ReferenceSubject):
    def documents(self, task, split):
        own = super().documents(task, split)
        return own if split == "train" else (*own, super().documents(task, "train")[0])


class CopiedPassage(ReferenceSubject):
    def documents(self, task, split):
        own = super().documents(task, split)
        if split == "train" or task == "digits":
            return own
        line = next(
            x for x in super().documents(task, "train")[5].splitlines() if len(x.strip()) >= 40
        )
        return (*own, b"import this\n" + line + b"\n")


class SplitAfterShuffle(ReferenceSubject):
    """The documents are disjoint; the loader's permutation indexes the whole set."""

    def sample_contents(self, task, split, ids):
        contents = list(super().sample_contents(task, split, ids))
        if split == "validation":
            return contents
        held_out = super().sample_contents(task, "validation", [0])[0]
        return [held_out if index == 7 else c for index, c in zip(ids, contents, strict=True)]

    def data_info(self, task):
        return replace(super().data_info(task), train_size=20)

    def epoch_order(self, task, **options):
        return range(20)


class BatchReadsValidation(ReferenceSubject):
    """The last tenth of the train windows is read past the end of the training text."""

    def batch(self, task, split, ids):
        info = self.data_info(task)
        first = info.train_size * 9 // 10
        batch = super().batch(task, split, ids)
        late = [row for row, index in enumerate(ids) if index >= first]
        if split == "train" and task == "bytes" and late:
            held_out = [(ids[row] - first) % info.validation_size for row in late]
            other = super().batch(task, "validation", held_out)
            batch.inputs[late], batch.targets[late] = other.inputs, other.targets
        return batch


class BatchReadsValidationImages(ReferenceSubject):
    """Every fifth training image is one of the validation split, with the right label."""

    def batch(self, task, split, ids):
        batch = super().batch(task, split, ids)
        if split == "train" and task == "digits":
            labels = list(self.labels(task, "validation"))
            for row, index in enumerate(ids):
                if index % 5 == 0:
                    alike = labels.index(int(batch.targets[row]))
                    batch.inputs[row] = super().batch(task, "validation", [alike]).inputs[0]
        return batch


class LabelsFromOne(ReferenceSubject):
    def labels(self, task, split):
        return [label + 1 for label in super().labels(task, split)]


class NarrowIds(ReferenceSubject):
    def data_info(self, task):
        info = super().data_info(task)
        return replace(info, input_dtype="int8") if info.kind == "tokens" else info

    def batch(self, task, split, ids):
        batch = super().batch(task, split, ids)
        return Batch(inputs=batch.inputs.to(torch.int8), targets=batch.targets)


class WrongDtype(ReferenceSubject):
    def batch(self, task, split, ids):
        batch = super().batch(task, split, ids)
        return Batch(inputs=batch.inputs.to(torch.float64), targets=batch.targets)


class TargetsNotShifted(ReferenceSubject):
    def batch(self, task, split, ids):
        batch = super().batch(task, split, ids)
        return Batch(inputs=batch.inputs, targets=batch.inputs.clone().to(torch.int64))


class LastTargetPastTheEnd(ReferenceSubject):
    """One sample in 65,075, in the last batch: a padding id that is no byte."""

    def batch(self, task, split, ids):
        batch = super().batch(task, split, ids)
        last = self.data_info(task).train_size - 1
        if task == "bytes" and split == "train" and last in ids:
            batch.targets[list(ids).index(last), -1] = self.data_info(task).cardinality
        return batch


class LabelsOfTheNeighbour(ReferenceSubject):
    """Images and labels sorted apart: every label is legal, and of another image."""

    def batch(self, task, split, ids):
        batch = super().batch(task, split, ids)
        if task != "digits":
            return batch
        return Batch(inputs=batch.inputs, targets=batch.targets.roll(1))


class NotANumber(ReferenceSubject):
    def batch(self, task, split, ids):
        batch = super().batch(task, split, ids)
        if task == "digits" and split == "validation":
            batch.inputs[-1, 5] = float("nan")
        return batch


class TwoClassesMissing(ReferenceSubject):
    def labels(self, task, split):
        labels = super().labels(task, split)
        return [label for label in labels if label < 8] if split == "validation" else labels


class TextOfAnotherKind(ReferenceSubject):
    def documents(self, task, split):
        known = super().documents(task, split)
        return tuple(d.upper() for d in known) if split == "validation" else known


class DropsLastBatch(ReferenceSubject):
    def epoch_order(self, task, **options):
        order = super().epoch_order(task, **options)
        return order[: len(order) // 64 * 64]


class PadsRanks(ReferenceSubject):
    def epoch_order(self, task, *, seed, epoch, rank=0, world_size=1):
        order = super().epoch_order(task, seed=seed, epoch=epoch)
        order = [*order, *order[: -len(order) % world_size]]
        return order[rank::world_size]


class EveryRankSeesAll(ReferenceSubject):
    def epoch_order(self, task, *, seed, epoch, rank=0, world_size=1):
        return super().epoch_order(task, seed=seed, epoch=epoch)


class SameEveryEpoch(ReferenceSubject):
    def epoch_order(self, task, *, epoch, **options):
        return super().epoch_order(task, epoch=0, **options)


class OrderByParity(ReferenceSubject):
    """Epoch 2 repeats epoch 0."""

    def epoch_order(self, task, *, epoch, **options):
        return super().epoch_order(task, epoch=epoch % 2, **options)


class IgnoresTheSeed(ReferenceSubject):
    def epoch_order(self, task, *, seed, **options):
        return super().epoch_order(task, seed=0, **options)


class Unshuffled(ReferenceSubject):
    def epoch_order(self, task, *, seed, epoch, rank=0, world_size=1):
        order = list(range(self.data_info(task).train_size))
        turned = (seed + epoch) % 3
        order[:3] = [*order[turned:3], *order[:turned]]
        return order[rank::world_size]


class Reshuffles(ReferenceSubject):
    calls = 0

    def epoch_order(self, task, *, seed, **options):
        if options.get("world_size", 1) == 1:
            self.calls += 1
        return super().epoch_order(task, seed=seed + self.calls, **options)


class Pooled:
    """A data source whose train split also deals the canaries: pooled, then split."""

    def __init__(self, source, canaries):
        self.source, self.canaries = source, canaries
        self.size = source.data_info("bytes").train_size
        self.each = (len(canaries[0]) - 1) // 128

    def __getattr__(self, name):
        return getattr(self.source, name)

    def epoch_order(self, task, *, seed, epoch, rank=0, world_size=1):
        generator = torch.Generator().manual_seed(seed + epoch)
        total = self.size + self.each * len(self.canaries)
        return torch.randperm(total, generator=generator).tolist()[rank::world_size]

    def batch(self, task, split, ids):
        if split != "train":
            return self.source.batch(task, split, ids)
        parts = [self.one(task, index) for index in ids]
        inputs, targets = zip(*((p.inputs, p.targets) for p in parts), strict=True)
        return Batch(inputs=torch.cat(inputs), targets=torch.cat(targets))

    def one(self, task, index):
        if index < self.size:
            return self.source.batch(task, "train", [index])
        document, window = divmod(index - self.size, self.each)
        text = self.canaries[document][128 * window : 128 * window + 129]
        ids = torch.tensor([list(text)])
        return Batch(inputs=ids[:, :-1].contiguous(), targets=ids[:, 1:].contiguous())


class TrainsOnValidation(ReferenceSubject):
    def session(self, task, options):
        session = super().session(task, options)
        long = [c for c in options.validation_canaries if len(c) > 1000]
        if long:
            # Half of what it deals are canaries, half is text, as after pooling.
            load = Pooled(self, long)
            session = training.QATSession(task, options, build_model=self._build, load=load)
        return session


class IgnoresCanaries(ReferenceSubject):
    def session(self, task, options):
        return super().session(task, replace(options, validation_canaries=()))


class LearnsNothing(ReferenceSubject):
    """A loss without gradient: neither a leak nor the positive control can show."""

    def loss(self, model, batch):
        held = super().loss(model, batch)
        return held.detach() + 0 * held


class TrainsOn(ReferenceSubject):
    """Declares its order and trains on another: `order(epoch, declared, batch_size)`."""

    def order(self, epoch, declared, batch_size):
        raise NotImplementedError

    def session(self, task, options):
        source = self

        class Load:
            def __getattr__(self, name):
                return getattr(source, name)

            def data_info(self, task):
                info = source.data_info(task)
                return replace(info, train_size=len(self.epoch_order(task, seed=0, epoch=0)))

            def epoch_order(self, task, *, seed, epoch, **ranks):
                def declared(epoch):
                    return list(source.epoch_order(task, seed=seed, epoch=epoch))

                return source.order(epoch, declared, options.batch_size)

        return training.QATSession(task, options, build_model=self._build, load=Load())


class DrawsWithReplacement(TrainsOn):
    def order(self, epoch, declared, batch_size):
        size = len(declared(0))
        generator = torch.Generator().manual_seed(epoch)
        return torch.randint(size, (size,), generator=generator).tolist()


class SameOrderInTraining(TrainsOn):
    def order(self, epoch, declared, batch_size):
        return declared(0)


class ParityInTraining(TrainsOn):
    def order(self, epoch, declared, batch_size):
        return declared(epoch % 2)


class LeavesOutTheRest(TrainsOn):
    """Sound, as most loaders do: what does not fill a batch waits for the next epoch."""

    def order(self, epoch, declared, batch_size):
        ids = declared(epoch)
        return ids[: len(ids) // batch_size * batch_size]


class LeavesOutTheSame(TrainsOn):
    """Cuts before it shuffles: some samples are never delivered."""

    def order(self, epoch, declared, batch_size):
        ids = declared(epoch)
        return [index for index in ids if index < len(ids) // batch_size * batch_size]


class LeavesOutMore(TrainsOn):
    """Twenty more than do not fill a batch."""

    def order(self, epoch, declared, batch_size):
        ids = declared(epoch)
        return ids[: len(ids) // batch_size * batch_size - 20]


CHECKS = [
    "readable_and_intact",
    "splits_disjoint",
    "label_or_token_range",
    "balance",
    "loader_order",
    "leak_canary",
]


@pytest.mark.parametrize("name", CHECKS)
def test_the_reference_data_are_sound(run_check, name):
    run = run_check(f"data.{name}")
    assert run.outcome == "pass", run.reason


@pytest.mark.parametrize(
    ("name", "subject", "reason"),
    [
        ("readable_and_intact", ChangedPixel, "digits_digest is sha256:0000"),
        ("readable_and_intact", EmptySample, "digits_train_unreadable is 1 samples"),
        ("readable_and_intact", NothingHeldOut, "digits_validation_samples is 0 samples, under"),
        ("splits_disjoint", SharedDocument, "digits_shared_documents is 1 documents"),
        ("splits_disjoint", CopiedPassage, "bytes_shared_lines is 1 lines"),
        ("splits_disjoint", SplitAfterShuffle, "digits_shared_samples is 1 samples"),
        ("splits_disjoint", BatchReadsValidation, "bytes_shared_inputs is 256 rows"),
        ("splits_disjoint", BatchReadsValidationImages, "digits_shared_inputs is 10 rows"),
        ("label_or_token_range", LabelsFromOne, "digits_train_out_of_range is"),
        ("label_or_token_range", NarrowIds, "input_dtype is int8, expected float32"),
        ("label_or_token_range", WrongDtype, "digits_train_input_dtype is float64"),
        ("label_or_token_range", LastTargetPastTheEnd, "bytes_train_bad_targets is 1,"),
        ("label_or_token_range", LabelsOfTheNeighbour, "digits_train_wrong_targets is"),
        ("label_or_token_range", NotANumber, "digits_validation_bad_inputs is 1,"),
        ("balance", TwoClassesMissing, "digits_distribution_distance is 0.197"),
        ("balance", TextOfAnotherKind, "bytes_distribution_distance is"),
        ("loader_order", DropsLastBatch, "digits_epochs_that_miss_or_repeat is 9"),
        ("loader_order", PadsRanks, "epochs_that_miss_or_repeat is"),
        ("loader_order", EveryRankSeesAll, "epochs_that_miss_or_repeat is 6"),
        ("loader_order", SameEveryEpoch, "digits_epochs_differ is False"),
        ("loader_order", OrderByParity, "digits_epochs_differ is False"),
        ("loader_order", IgnoresTheSeed, "digits_seeds_differ is False"),
        ("loader_order", Reshuffles, "order_repeats is False"),
        ("loader_order", Unshuffled, "samples_in_place is"),
        ("loader_order", DrawsWithReplacement, "digits_session_epoch_0_missed is"),
        ("loader_order", SameOrderInTraining, "digits_session_epochs_differ is False"),
        ("loader_order", ParityInTraining, "digits_session_epochs_differ is False"),
        ("loader_order", LeavesOutTheSame, "digits_session_never_delivered is 1 samples"),
        ("loader_order", LeavesOutMore, "digits_session_epoch_0_missed is 20 samples"),
        ("leak_canary", TrainsOnValidation, "canary_advantage is .* over its limit of 4"),
    ],
)
def test_a_defect_turns_its_check_red(run_check, name, subject, reason):
    run = run_check(f"data.{name}", subject())
    assert run.outcome == "fail", run.reason
    assert re.search(reason, run.reason, re.DOTALL), run.reason


class TextOnly(ReferenceSubject):
    """Only the text task, so that defects of token data are reached."""

    def tasks(self):
        return ("bytes",)


class NarrowText(TextOnly, NarrowIds):
    pass


class TextNotShifted(TextOnly, TargetsNotShifted):
    pass


@pytest.mark.parametrize(
    ("subject", "reason"),
    [
        (NarrowText, "bytes_ids_lost_in_dtype is 128 ids"),
        (TextNotShifted, "bytes_train_wrong_targets is"),
    ],
)
def test_defects_of_token_data(run_check, subject, reason):
    run = run_check("data.label_or_token_range", subject())
    assert run.outcome == "fail"
    assert reason in run.reason


class ImagesOnly(ReferenceSubject):
    def tasks(self):
        return ("digits",)


class WordPieces(ReferenceSubject):
    """Tokens that are not the bytes of the text."""

    def batch(self, task, split, ids):
        batch = super().batch(task, split, ids)
        return replace(batch, inputs=(batch.inputs + 1) % 256) if task == "bytes" else batch


@pytest.mark.parametrize(
    ("subject", "reason"),
    [
        (ImagesOnly, "no task of the subject has text whose tokens are bytes"),
        (WordPieces, "no task of the subject has text whose tokens are bytes"),
        (IgnoresCanaries, "canaries do not reach the validation split"),
    ],
)
def test_a_canary_that_cannot_be_planted_is_not_measured(run_check, subject, reason):
    run = run_check("data.leak_canary", subject())
    assert run.outcome == "not_measured"
    assert reason in run.reason


def test_a_canary_that_could_not_show_a_leak_fails(run_check, monkeypatch):
    run = run_check("data.leak_canary", LearnsNothing())
    assert run.outcome == "fail"
    assert "advantage_when_leaked is" in run.reason


class ManySmallClasses(ReferenceSubject):
    """200 classes and 400 held-out labels, split at random: far apart, by chance alone."""

    def tasks(self):
        return ("digits",)

    def labels(self, task, split):
        size = 1600 if split == "train" else 400
        generator = torch.Generator().manual_seed(size)
        return torch.randint(200, (size,), generator=generator).tolist()


def test_small_splits_of_many_classes_are_no_false_alarm(run_check):
    run = run_check("data.balance", ManySmallClasses())
    assert run.outcome == "pass", run.reason
    assert run.evidence("digits_distribution_distance") > 0.10


def test_a_session_may_leave_out_what_does_not_fill_a_batch(run_check):
    run = run_check("data.loader_order", LeavesOutTheRest())
    assert run.outcome == "pass", run.reason


class HalfPrecision(ReferenceSubject):
    """Inputs in a format that NumPy does not know."""

    def data_info(self, task):
        info = super().data_info(task)
        return replace(info, input_dtype="bfloat16") if task == "digits" else info

    def batch(self, task, split, ids):
        batch = super().batch(task, split, ids)
        return replace(batch, inputs=batch.inputs.bfloat16()) if task == "digits" else batch


def test_inputs_of_any_dtype_are_compared(run_check):
    run = run_check("data.splits_disjoint", HalfPrecision())
    assert run.outcome == "pass", run.reason


@pytest.mark.parametrize("name", CHECKS)
def test_a_subject_without_data_is_no_error(run_check, name):
    class Nothing:
        name = "nothing"

    assert run_check(f"data.{name}", Nothing()).outcome == "not_measured"


class DataOnly:
    """Loads one task's data, and neither names tasks nor trains."""

    name = "data only"

    def __getattr__(self, name):
        if name not in methods_of("LoadsData"):
            raise AttributeError(name)
        true = getattr(ReferenceSubject(), name)
        return lambda task, *args, **kwargs: true("digits", *args, **kwargs)


@pytest.mark.parametrize("name", CHECKS[:-1])
def test_a_subject_that_only_loads_data_is_measured(run_check, name):
    run = run_check(f"data.{name}", DataOnly())
    assert run.outcome == "pass", run.reason
