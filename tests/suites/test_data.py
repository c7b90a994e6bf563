"""Each data check goes red for its own reason; the seeded defects are ones real pipelines had."""

import re

import pytest
import torch

from forge_harness.protocols import Batch
from forge_harness.subject.reference import ReferenceSubject


class ChangedPixel(ReferenceSubject):
    def data_digest(self, task):
        return "sha256:" + "0" * 64


class EmptySample(ReferenceSubject):
    def sample_contents(self, task, split, ids):
        contents = list(super().sample_contents(task, split, ids))
        return [b"" if index == 3 else c for index, c in zip(ids, contents, strict=True)]


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
        from dataclasses import replace

        return replace(super().data_info(task), train_size=20)

    def epoch_order(self, task, **options):
        return range(20)


class LabelsFromOne(ReferenceSubject):
    def labels(self, task, split):
        return [label + 1 for label in super().labels(task, split)]


class NarrowIds(ReferenceSubject):
    def data_info(self, task):
        from dataclasses import replace

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


class OneClassHeldOut(ReferenceSubject):
    def labels(self, task, split):
        labels = super().labels(task, split)
        return [label for label in labels if label < 8] if split == "validation" else labels


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


class IgnoresTheSeed(ReferenceSubject):
    def epoch_order(self, task, *, seed, **options):
        return super().epoch_order(task, seed=0, **options)


class Unshuffled(ReferenceSubject):
    def epoch_order(self, task, *, seed, epoch, rank=0, world_size=1):
        order = list(range(self.data_info(task).train_size))
        order[:2] = order[1::-1] if (seed + epoch) % 2 else order[:2]
        return order[rank::world_size]


class Reshuffles(ReferenceSubject):
    calls = 0

    def epoch_order(self, task, *, seed, **options):
        if options.get("world_size", 1) == 1:
            self.calls += 1
        return super().epoch_order(task, seed=seed + self.calls, **options)


class TrainsOnValidation(ReferenceSubject):
    canaries = ()

    def session(self, task, options):
        self.canaries = options.validation_canaries
        return super().session(task, options)

    def batch(self, task, split, ids):
        if split != "train" or not self.canaries:
            return super().batch(task, split, ids)
        rows = torch.tensor([list(self.canaries[i % len(self.canaries)][:129]) for i in ids])
        return Batch(inputs=rows[:, :-1].contiguous(), targets=rows[:, 1:].contiguous())


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
        ("splits_disjoint", SharedDocument, "digits_shared_documents is 1 documents"),
        ("splits_disjoint", CopiedPassage, "bytes_shared_lines is 1 lines"),
        ("splits_disjoint", SplitAfterShuffle, "digits_shared_samples is 1 samples"),
        ("label_or_token_range", LabelsFromOne, "digits_train_out_of_range"),
        ("label_or_token_range", NarrowIds, "input_dtype is int8, expected float32"),
        ("label_or_token_range", WrongDtype, "digits_input_dtype is float64"),
        ("balance", OneClassHeldOut, "digits_distribution_distance is 0"),
        ("loader_order", DropsLastBatch, "digits_epochs_that_miss_or_repeat is 9"),
        ("loader_order", PadsRanks, "epochs_that_miss_or_repeat is"),
        ("loader_order", EveryRankSeesAll, "epochs_that_miss_or_repeat is 6"),
        ("loader_order", SameEveryEpoch, "digits_epochs_differ is False"),
        ("loader_order", IgnoresTheSeed, "digits_seeds_differ is False"),
        ("loader_order", Reshuffles, "order_repeats is False"),
        ("loader_order", Unshuffled, "samples_in_place is"),
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
        (TextNotShifted, "bytes_targets_are_next_inputs is False"),
    ],
)
def test_defects_of_token_data(run_check, subject, reason):
    run = run_check("data.label_or_token_range", subject())
    assert run.outcome == "fail"
    assert reason in run.reason


def test_a_subject_without_text_has_no_canary(run_check):
    class ImagesOnly(ReferenceSubject):
        def tasks(self):
            return ("digits",)

    run = run_check("data.leak_canary", ImagesOnly())
    assert run.outcome == "not_measured"
    assert "no task of the subject has text" in run.reason
