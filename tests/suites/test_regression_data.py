"""Targets that are numbers, and labels that are not whole numbers, a list or one a sample."""

import importlib.util
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from forge_harness.types import Outcome


def _loaded(name):
    path = Path(__file__).parents[1] / "subject" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


foreign, points = _loaded("foreign_images"), _loaded("foreign_subject")
CLASSES, SIZES, Images = foreign.CLASSES, foreign.SIZES, foreign.Images
CHECKS = ("label_or_token_range", "balance")


class Prices(Images):
    """Offers LoadsData: a price and an age for each image."""

    held_out_spread = 1.0

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.prices = {
            split: 300 * torch.randn(size, 2, generator=generator) for split, size in SIZES.items()
        }
        self.prices["validation"] *= self.held_out_spread

    def data_info(self, task):
        return replace(super().data_info(task), kind="values", cardinality=0)

    def labels(self, task, split):
        return self.prices[split].tolist()

    def targets(self, split, ids):
        return self.prices[split][list(ids)]

    def batch(self, task, split, ids):
        return replace(super().batch(task, split, ids), targets=self.targets(split, ids))


class OnePrice(Prices):
    """A number a sample, listed as a tensor; half precision in batches."""

    def labels(self, task, split):
        return self.prices[split][:, 0]

    def targets(self, split, ids):
        return self.prices[split][list(ids), :1].half()


class MostlyNone(OnePrice):
    """Most prices are 0."""

    def __init__(self):
        super().__init__()
        for split in SIZES:
            self.prices[split][::3] = 0.0
            self.prices[split][1::3] = 0.0


class Noise(OnePrice):
    """What a denoiser has to find is drawn anew for each training batch, and fixed held out."""

    def targets(self, split, ids):
        drawn = super().targets(split, ids)
        # Whole ones: one in three comes again.
        return drawn if split == "validation" else torch.randn_like(drawn).round()


@pytest.mark.parametrize("subject", [Prices, OnePrice, MostlyNone, Noise])
@pytest.mark.parametrize("name", CHECKS)
def test_numbers_are_targets(run_check, subject, name):
    """They were held to be classes in [0, 0), and no two of them alike."""
    run = run_check(f"data.{name}", subject())
    assert (run.outcome, run.reason) == (Outcome.PASS, "")


class Truncated(Prices):
    def targets(self, split, ids):
        return super().targets(split, ids).long()


class Overflows(Prices):
    """1e5 is no number of fp16."""

    held_out_spread = 1e3

    def targets(self, split, ids):
        return super().targets(split, ids).half()


class Unknown(Prices):
    def __init__(self):
        super().__init__()
        self.prices["train"][7] = math.nan


class OfTheNext(Prices):
    def targets(self, split, ids):
        return super().targets(split, ids).roll(1, 0)


class Unlisted(Prices):
    def labels(self, task, split):
        return super().labels(task, split)[:-1]


class NeverSeen(Prices):
    def read(self, split, ids):
        return super().read(split, ids) * (math.nan if split == "validation" else 1)


class Dearer(Prices):
    held_out_spread = 4.0


class NoneInUse(MostlyNone):
    """Prices of 0 in training alone."""

    def __init__(self):
        super().__init__()
        self.prices["validation"][self.prices["validation"] == 0.0] = 0.01


@pytest.mark.parametrize(
    ("subject", "name", "reason"),
    [
        (Truncated, "label_or_token_range", "images_train_wrong_targets is 200"),
        (Overflows, "label_or_token_range", "images_validation_bad_targets is"),
        (Unknown, "label_or_token_range", "images_train_not_finite is 2 targets"),
        (OfTheNext, "label_or_token_range", "images_train_wrong_targets is 200"),
        (Unlisted, "label_or_token_range", "images_train_listed is 199 targets, expected 200"),
        (NeverSeen, "label_or_token_range", "images_validation_bad_inputs is 3200"),
        (Dearer, "balance", "images_distribution_distance is"),
        (NoneInUse, "balance", "images_distribution_distance is"),
    ],
)
def test_numbers_that_are_others_show(run_check, subject, name, reason):
    run = run_check(f"data.{name}", subject())
    assert run.outcome is Outcome.FAIL, run.reason
    assert run.reason.startswith(reason)


class Halves(Images):
    """Targets of a class task between two classes: what reads them as integers sees the lower."""

    def batch(self, task, split, ids):
        batch = super().batch(task, split, ids)
        return replace(batch, targets=batch.targets + 0.5)


class Longer(Images):
    def labels(self, task, split):
        return [*super().labels(task, split), 0]


class Shorter(Images):
    def labels(self, task, split):
        return super().labels(task, split)[:-1]


class PerPixel(Images):
    def batch(self, task, split, ids):
        batch = super().batch(task, split, ids)
        return replace(batch, targets=batch.targets[:, None].expand(-1, 8))


class Uneven(Images):
    """Of the last class in training alone; labels are a tensor, as torchvision has them."""

    def labels(self, task, split):
        return torch.tensor([CLASSES - 1 if split == "train" else 0] * SIZES[split])


@pytest.mark.parametrize(
    ("subject", "name", "reason"),
    [
        (Halves, "label_or_token_range", "images_train_bad_targets is 200"),
        (Longer, "label_or_token_range", "images_train_listed is 201 labels, expected 200"),
        (Shorter, "label_or_token_range", "images_train_listed is 199 labels, expected 200"),
        (PerPixel, "label_or_token_range", "images_train_wrong_targets is 1600"),
        (Uneven, "balance", "images_distribution_distance is 1,"),
    ],
)
def test_labels_that_are_none_of_the_samples_show(run_check, subject, name, reason):
    run = run_check(f"data.{name}", subject())
    assert run.outcome is Outcome.FAIL, run.reason
    assert run.reason.startswith(reason)


class OneHot(Images):
    def batch(self, task, split, ids):
        batch = super().batch(task, split, ids)
        return replace(batch, targets=torch.nn.functional.one_hot(batch.targets, CLASSES).float())


class OfTorch(Images):
    """Labels and the order of an epoch are tensors."""

    def labels(self, task, split):
        return torch.tensor(super().labels(task, split))

    def epoch_order(self, task, **options):
        return torch.tensor(super().epoch_order(task, **options))


@pytest.mark.parametrize(
    ("subject", "name"),
    [(OneHot, "label_or_token_range"), *((OfTorch, name) for name in (*CHECKS, "loader_order"))],
)
def test_what_torch_makes_of_labels_is_no_false_alarm(run_check, subject, name):
    run = run_check(f"data.{name}", subject())
    assert (run.outcome, run.reason) == (Outcome.PASS, "")


def test_an_empty_split_has_no_shares(run_check, monkeypatch):
    monkeypatch.setitem(SIZES, "validation", 0)
    run = run_check("data.balance", Images())
    assert run.outcome is Outcome.NOT_MEASURED
    assert run.reason.startswith("the validation split of images is empty")


class Regresses(points.Blobs, Prices):
    """Trains on points whose targets are the numbers -1 and 1."""

    tasks = points.Blobs.tasks

    def loss(self, model, batch):
        return torch.nn.functional.mse_loss(model(batch.inputs)[:, 0], batch.targets)

    def example_batch(self, task, *, batch_size, seed):
        found = super().example_batch(task, batch_size=batch_size, seed=seed)
        return replace(found, targets=2.0 * found.targets - 1)

    def batch(self, task, split, ids):
        known = self.example_batch(task, batch_size=512, seed=0)
        return replace(known, inputs=known.inputs[list(ids)], targets=known.targets[list(ids)])

    def epoch_order(self, task, *, seed, epoch, rank=0, world_size=1):
        return list(range(SIZES["train"]))[rank::world_size]


def test_a_regression_is_learned_by_heart(run_check):
    """The least loss there is was looked for in logits of its targets, which ended in an error."""
    run = run_check("training.overfit_one_batch", Regresses())
    assert run.outcome is Outcome.PASS, run.reason
