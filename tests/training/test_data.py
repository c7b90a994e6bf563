from __future__ import annotations

import pytest
import torch

from forge_harness.errors import UsageError
from forge_harness.training import (
    CanaryData,
    ReferenceData,
    batch,
    data_digest,
    data_info,
    documents,
    epoch_order,
    labels,
    sample_contents,
)
from forge_harness.training.corpus import build_corpus
from forge_harness.training.splits import CONTEXT, data_set, windows

TASKS = ["digits", "digits#3", "bytes"]


@pytest.mark.parametrize("task", TASKS)
def test_no_content_is_in_two_splits(task: str) -> None:
    assert not set(documents(task, "train")) & set(documents(task, "validation"))
    info = data_info(task)
    train = sample_contents(task, "train", range(info.train_size))
    held_out = sample_contents(task, "validation", range(info.validation_size))
    assert not set(train) & set(held_out)


@pytest.mark.parametrize("task", TASKS)
def test_recorded_digest_is_that_of_the_content(task: str) -> None:
    assert data_info(task).digest == data_digest(task)


def test_digest_moves_with_one_byte() -> None:
    data = data_set("digits#4")
    before = data.digest()
    data.train.samples[7, 3] ^= 1
    try:
        assert data.digest() != before
    finally:
        data.train.samples[7, 3] ^= 1
    assert data.digest() == before


def test_folds_hold_every_image_out_once() -> None:
    held_out = [image for fold in range(5) for image in documents(f"digits#{fold}", "validation")]
    assert len(held_out) == len(set(held_out)) == 1797
    for fold in range(5):
        shares = torch.bincount(torch.tensor(labels(f"digits#{fold}", "validation")))
        assert shares.min() >= 34
        assert shares.max() <= 37


def test_text_targets_are_the_next_byte() -> None:
    sample = batch("bytes", "train", [0, 5000])
    assert sample.inputs.shape == sample.targets.shape == (2, CONTEXT)
    assert sample.inputs.dtype == sample.targets.dtype == torch.int64
    assert torch.equal(sample.inputs[:, 1:], sample.targets[:, :-1])


def test_windows_predict_every_byte_but_the_first() -> None:
    content = bytes(range(256)) + b"tail"
    cut = windows(content, context=100)
    assert all(len(window) == 101 for window in cut)
    assert all(window in content for window in cut)
    assert {byte for window in cut for byte in window[1:]} == set(content[1:])
    assert windows(b"short", context=100) == []


@pytest.mark.parametrize("task", ["digits", "bytes"])
def test_every_sample_once_an_epoch_over_ranks(task: str) -> None:
    size = data_info(task).train_size
    for world_size in (1, 3):
        seen = [
            index
            for rank in range(world_size)
            for index in epoch_order(task, seed=5, epoch=2, rank=rank, world_size=world_size)
        ]
        assert sorted(seen) == list(range(size))


def test_order_follows_seed_and_epoch() -> None:
    base = epoch_order("digits", seed=0, epoch=0)
    assert epoch_order("digits", seed=0, epoch=0) == base
    assert epoch_order("digits", seed=1, epoch=0) != base
    assert epoch_order("digits", seed=0, epoch=1) != base


def test_canaries_are_in_validation_only() -> None:
    canary = bytes(range(1, 201))
    data = CanaryData(ReferenceData(), "bytes", [canary])
    assert canary in data.documents("bytes", "validation")
    assert canary not in data.documents("bytes", "train")
    assert data.data_info("bytes").train_size == data_info("bytes").train_size
    last = data.data_info("bytes").validation_size - 1
    assert data.sample_contents("bytes", "validation", [0, last])[1] == canary[71:199]


def test_canary_image_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(UsageError, match="63 bytes, 64 were expected"):
        CanaryData(ReferenceData(), "digits", [bytes(63)])


@pytest.mark.parametrize("name", ["digit", "digits#5", "bytes#1"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="Valid: "):
        data_info(name)


def test_samples_outside_the_split_are_refused() -> None:
    with pytest.raises(UsageError, match="Sample -1 is not in the train split"):
        batch("digits", "train", [0, -1])


def test_corpus_drops_duplicates_and_lines_known_from_training() -> None:
    shared = b"a line of at least forty bytes, found in both of the splits"
    pad = b"\n# " + b"x" * 250
    files = [(f"module_{index}.py", b"%d\n" % index + shared + pad) for index in range(64)]
    files.append(("copy.py", files[0][1]))
    corpus = build_corpus(files)
    assert len(corpus.train) + len(corpus.validation) <= 64
    assert corpus.validation
    assert all(shared in content for content in corpus.train)
    assert not any(shared in content for content in corpus.validation)
    assert build_corpus(reversed(files)).digest() == corpus.digest()
