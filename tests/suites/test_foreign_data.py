"""Data that are not the reference's: augmented images, and text padded in front of itself."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from forge_harness.protocols import Batch
from forge_harness.types import Outcome


def load(name):
    spec = importlib.util.spec_from_file_location(
        name, Path(__file__).parents[1] / "subject" / f"{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


foreign = load("foreign_language_model")
Images = load("foreign_images").Images

DRAWN = 64


class SeldomFlipped(Images):
    """So seldom that most samples look fixed when they are read twice."""

    flipped = 0.03


class ReadsTheNext(SeldomFlipped):
    """Every fifth of a long list is the sample that the list has next."""

    def read(self, split, ids):
        ids = list(ids)
        late = len(ids) > 8
        following = [*ids[1:], ids[0]]
        places = enumerate(zip(ids, following, strict=True))
        return super().read(
            split, [n if late and place % 5 == 0 else i for place, (i, n) in places]
        )


@pytest.mark.parametrize("subject", [Images, SeldomFlipped])
def test_augmentation_that_leaves_samples_alike_by_chance_is_no_false_alarm(run_check, subject):
    run = run_check("data.readable_and_intact", subject())
    assert run.outcome is Outcome.PASS, run.reason


def test_samples_that_are_others_show_among_augmented_ones(run_check):
    run = run_check("data.readable_and_intact", ReadsTheNext())
    assert run.outcome is Outcome.FAIL, run.reason
    assert "images_train_misplaced_inputs is" in run.reason


class FlippedInUse(Images):
    """The splits share one dataset object, and with it what it does to its images."""

    def batch(self, task, split, ids):
        batch = super().batch(task, split, ids)
        if split == "train":
            return batch
        chosen = torch.rand(len(batch.inputs)) < self.flipped
        flipped = torch.where(chosen[:, None, None], batch.inputs.flip(-1), batch.inputs)
        return replace(batch, inputs=flipped)


def test_held_out_samples_that_are_augmented_show(run_check):
    run = run_check("data.readable_and_intact", FlippedInUse())
    assert run.outcome is Outcome.FAIL, run.reason
    assert "images_validation_redrawn_inputs is" in run.reason


class PaddedInFront(foreign.Words):
    """Short lines of unequal length, padded in front to the longest of their batch."""

    ignored = -100

    def batch(self, task, split, ids):
        rows = [
            [*text[: 12 + 7 * index % 19]]
            for text, index in zip(self.sample_contents(task, split, ids), ids, strict=True)
        ]
        width = len(sorted(rows, key=len)[-1])
        padded = [[*[0] * (width - len(row)), *row[:-1]] for row in rows]
        targets = [[*[self.ignored] * (width - len(row)), *row[1:]] for row in rows]
        return Batch(inputs=torch.tensor(padded), targets=torch.tensor(targets))


class DealsTraining(PaddedInFront):
    def batch(self, task, split, ids):
        dealt = ids if split == "train" else [index % 3 for index in ids]
        return super().batch(task, "train", dealt)


class Doubled(foreign.Words):
    """Names padded behind; those held out are some of training without their first letter."""

    def batch(self, task, split, ids):
        first = b"a" if split == "train" else b""
        rows = [
            first + b"a" + text[: 8 + index % 5]
            for text, index in zip(self.sample_contents(task, "train", ids), ids, strict=True)
        ]
        width = 16 if split == "train" else 15
        text = torch.tensor([[*row, *bytes(width - len(row))] for row in rows])
        return Batch(inputs=text[:, :-1].contiguous(), targets=text[:, 1:].contiguous())


def test_padding_in_front_hides_no_sample_that_both_splits_deliver(run_check):
    sound = run_check("data.splits_disjoint", PaddedInFront())
    assert sound.outcome is Outcome.PASS, sound.reason
    run = run_check("data.splits_disjoint", DealsTraining())
    assert run.outcome is Outcome.FAIL, run.reason
    assert "words_shared_inputs is 2 rows" in run.reason


def test_a_letter_that_is_doubled_in_front_of_padded_text_makes_another_text(run_check):
    run = run_check("data.splits_disjoint", Doubled())
    assert run.outcome is Outcome.PASS, run.reason


def test_what_is_drawn_anew_must_not_be_another_sample_behind_padding(run_check):
    class Pads(ReadsTheNext):
        def batch(self, task, split, ids):
            batch = super().batch(task, split, ids)
            wider = torch.nn.functional.pad(batch.inputs.flatten(1), (0, len(list(ids))))
            return replace(batch, inputs=wider)

    run = run_check("data.readable_and_intact", Pads())
    assert run.outcome is Outcome.FAIL, run.reason
    assert "images_train_misplaced_inputs is" in run.reason


class Reversed(Images):
    """Images come last first; targets are those that were asked for."""

    flipped = 0.0

    def read(self, split, ids):
        return super().read(split, list(ids)[::-1])


def test_a_batch_in_reverse_is_not_taken_for_augmentation(run_check):
    run = run_check("data.readable_and_intact", Reversed())
    assert run.outcome is Outcome.FAIL, run.reason
    assert run.evidence("images_train_misplaced_inputs") > DRAWN


class Translates(foreign.Words):
    """Targets are the end of the input, last letter first: those of an encoder and decoder."""

    causal = False

    def model_spec(self, task):
        return replace(super().model_spec(task), causal=self.causal)

    def batch(self, task, split, ids):
        batch = super().batch(task, split, ids)
        return replace(batch, targets=batch.inputs.flip(1)[:, :20].contiguous())


class TranslatesCausally(Translates):
    causal = True


def test_targets_that_are_no_next_inputs_are_not_measured_where_none_are_declared(run_check):
    run = run_check("data.label_or_token_range", Translates())
    assert run.outcome is Outcome.NOT_MEASURED, run.reason
    assert "the targets of words_train, words_validation are not the next inputs" in run.reason
    assert run.evidence("words_train_bad_targets") == 0
    run = run_check("data.label_or_token_range", TranslatesCausally())
    assert run.outcome is Outcome.FAIL, run.reason
    assert "words_train_wrong_targets is" in run.reason
