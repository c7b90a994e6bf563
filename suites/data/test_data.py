"""The data: readable, intact, disjoint, in range, delivered once, and not leaking."""

import hashlib

import pytest

from forge_harness.protocols import TrainOptions

SPLITS = ("train", "validation")
LONG_LINE = 40
"""Characters from which a line of text is taken to identify its source."""


def tasks_of(subject):
    """Returns the subject's task names, or one placeholder when it names none."""
    return list(subject.tasks()) if hasattr(subject, "tasks") else ["default"]


def digests(contents):
    """Returns the SHA-256 of each content."""
    return [hashlib.sha256(content).digest() for content in contents]


@pytest.mark.forge_check("data.readable_and_intact")
def test_readable_and_intact(subject, evidence):
    """Content is that of the day it was recorded, and every sample can be read.

    Oracle: the digest recorded with the data, against one recomputed from what is loaded now.
    """
    for task in tasks_of(subject):
        info = subject.data_info(task)
        evidence.equal(
            f"{task}_digest",
            subject.data_digest(task),
            expected=info.digest,
            reason="content loaded now against the digest recorded when it was made",
        )
        for split, size in zip(SPLITS, (info.train_size, info.validation_size), strict=True):
            contents = subject.sample_contents(task, split, range(size))
            unreadable = size - len(contents) + sum(not content for content in contents)
            evidence.at_least(
                f"{task}_{split}_samples", size, limit=1, unit="samples", reason="declared size"
            )
            evidence.equal(
                f"{task}_{split}_unreadable",
                unreadable,
                expected=0,
                unit="samples",
                reason="every sample of the split was read",
            )


@pytest.mark.forge_check("data.splits_disjoint")
def test_splits_disjoint(subject, evidence):
    """No document, no sample and no long line of text is in both splits.

    By content, never by index: before the loader (documents) and after its permutation (what the
    first two epochs deliver).
    """
    for task in tasks_of(subject):
        info = subject.data_info(task)
        documents = {split: subject.documents(task, split) for split in SPLITS}
        shared = set(digests(documents["train"])) & set(digests(documents["validation"]))
        evidence.equal(
            f"{task}_shared_documents",
            len(shared),
            expected=0,
            unit="documents",
            reason=f"{len(documents['train'])} against {len(documents['validation'])} by SHA-256",
        )
        if info.kind == "tokens":
            lines = [
                {line.strip() for document in documents[s] for line in document.splitlines()}
                for s in SPLITS
            ]
            long = {line for line in lines[0] & lines[1] if len(line) >= LONG_LINE}
            evidence.equal(
                f"{task}_shared_lines",
                len(long),
                expected=0,
                unit="lines",
                reason=f"lines of {LONG_LINE} characters and more: copied passages leak too",
            )
        held_out = set(
            digests(subject.sample_contents(task, "validation", range(info.validation_size)))
        )
        delivered = set()
        for epoch in (0, 1):
            order = list(subject.epoch_order(task, seed=0, epoch=epoch))
            delivered.update(digests(subject.sample_contents(task, "train", order)))
        evidence.equal(
            f"{task}_shared_samples",
            len(delivered & held_out),
            expected=0,
            unit="samples",
            reason="what two epochs deliver, against the whole validation split",
        )


@pytest.mark.forge_check("data.label_or_token_range")
def test_label_or_token_range(subject, evidence):
    """Labels and token ids lie in [0, cardinality) in both splits, and survive their dtype.

    The whole vocabulary is passed through the declared dtype: an int8 buffer turns byte 200
    into -56 and trains on.
    """
    import torch

    for task in tasks_of(subject):
        info = subject.data_info(task)
        for split in SPLITS:
            labels = subject.labels(task, split)
            outside = [label for label in labels if not 0 <= label < info.cardinality]
            evidence.equal(
                f"{task}_{split}_out_of_range",
                len(outside),
                expected=0,
                unit="labels",
                reason=f"[0, {info.cardinality}); {sorted(set(outside))[:5] or 'none outside'}",
            )
        dtype = getattr(torch, info.input_dtype)
        batch = subject.batch(task, "train", [0])
        evidence.equal(
            f"{task}_input_dtype",
            str(batch.inputs.dtype).removeprefix("torch."),
            expected=info.input_dtype,
            reason="delivered against declared",
        )
        if info.kind == "tokens":
            vocabulary = torch.arange(info.cardinality)
            lost = int((vocabulary.to(dtype).to(torch.int64) != vocabulary).sum())
            evidence.equal(
                f"{task}_ids_lost_in_dtype",
                lost,
                expected=0,
                unit="ids",
                reason=f"the whole vocabulary through {info.input_dtype}",
            )
            delivered = subject.batch(task, "train", range(min(64, info.train_size)))
            low, high = int(delivered.inputs.min()), int(delivered.inputs.max())
            evidence.within(
                f"{task}_delivered_low", low, low=0, high=info.cardinality - 1, reason="64 samples"
            )
            evidence.within(
                f"{task}_delivered_high", high, low=0, high=info.cardinality - 1, reason="as above"
            )
            evidence.equal(
                f"{task}_targets_are_next_inputs",
                bool((delivered.inputs[:, 1:] == delivered.targets[:, :-1]).all()),
                expected=True,
                reason="a target is the token after its input, or the task is another one",
            )


@pytest.mark.forge_check("data.balance")
def test_balance(subject, evidence):
    """The shares of each class, or of the commonest tokens, agree between the splits.

    Statistic: total variation distance of the two label distributions. Limit 0.10, about three
    times what drawing 360 of 1,797 images at random gives (0.03 over ten classes).
    """
    from collections import Counter

    for task in tasks_of(subject):
        info = subject.data_info(task)
        counts = []
        for split in SPLITS:
            if info.kind == "classes":
                counts.append(Counter(subject.labels(task, split)))
            else:
                counts.append(Counter(b"".join(subject.documents(task, split))))
        shares = [{k: n / c.total() for k, n in c.items()} for c in counts]
        keys = shares[0].keys() | shares[1].keys()
        distance = sum(abs(shares[0].get(k, 0) - shares[1].get(k, 0)) for k in keys) / 2
        evidence.at_most(
            f"{task}_distribution_distance",
            distance,
            limit=0.10,
            reason="total variation between the label distributions of the splits",
        )


@pytest.mark.forge_check("data.loader_order")
def test_loader_order(subject, evidence):
    """Each epoch visits every sample once, over all ranks, in an order that seed and epoch decide.

    Oracle: sorted ids are 0 .. n - 1. Ranks are 1, 2 and 3, so that uneven shares occur.
    """
    for task in tasks_of(subject):
        size = subject.data_info(task).train_size
        wrong = []
        for world in (1, 2, 3):
            for epoch in (0, 1, 2):
                ids = [
                    index
                    for rank in range(world)
                    for index in subject.epoch_order(
                        task, seed=3, epoch=epoch, rank=rank, world_size=world
                    )
                ]
                if sorted(ids) != list(range(size)):
                    wrong.append(f"{world} ranks, epoch {epoch}: {len(ids)} ids of {size} samples")
        evidence.equal(
            f"{task}_epochs_that_miss_or_repeat",
            len(wrong),
            expected=0,
            unit="epochs",
            reason="; ".join(wrong[:3]) or "1, 2 and 3 ranks, 3 epochs each",
        )
        first = list(subject.epoch_order(task, seed=3, epoch=0))
        evidence.equal(
            f"{task}_order_repeats",
            list(subject.epoch_order(task, seed=3, epoch=0)) == first,
            expected=True,
            reason="same seed and epoch, same order",
        )
        evidence.equal(
            f"{task}_epochs_differ",
            list(subject.epoch_order(task, seed=3, epoch=1)) != first,
            expected=True,
            reason="a new epoch is a new permutation",
        )
        evidence.equal(
            f"{task}_seeds_differ",
            list(subject.epoch_order(task, seed=4, epoch=0)) != first,
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


@pytest.mark.forge_check("data.leak_canary")
def test_leak_canary(subject, evidence):
    """Documents planted in the validation split only are no better known than fresh ones.

    Canaries and controls are drawn from one generator, so without a leak their losses come from
    one distribution. Statistic: mean loss of 24 controls minus that of 24 canaries, in standard
    errors; limit 4 (one false alarm in 30,000 runs). Sensitivity is measured in the same check:
    a model trained on the canaries themselves must exceed the limit.
    """
    task = next(
        (task for task in tasks_of(subject) if subject.data_info(task).kind == "tokens"), None
    )
    if task is None:
        pytest.skip("no task of the subject has text to plant a canary in")
    canaries, controls = _random_documents(task, subject, 0), _random_documents(task, subject, 1)
    session = subject.session(
        task, TrainOptions(seed=0, steps=12, batch_size=8, validation_canaries=canaries)
    )
    for _ in range(12):
        session.step()
    z = _separation(subject, session.model, canaries, controls)
    evidence.at_most(
        "canary_advantage",
        z,
        limit=4.0,
        unit="standard errors",
        reason="loss of fresh controls over loss of canaries only the validation split holds",
    )
    learned = _learned_by_heart(subject, task, canaries)
    evidence.at_least(
        "advantage_when_leaked",
        _separation(subject, learned, canaries, controls),
        limit=4.0,
        unit="standard errors",
        reason="positive control: twelve steps on the canaries themselves",
    )


def _random_documents(task, subject, seed):
    import random

    generator = random.Random(f"canary {seed}")
    top = min(256, subject.data_info(task).cardinality)
    # A narrow alphabet of its own a document: something a few steps can learn.
    return tuple(
        bytes(generator.choices(generator.sample(range(32, top), 12), k=200)) for _ in range(24)
    )


def _document_batch(documents):
    import torch

    from forge_harness.protocols import Batch

    ids = torch.tensor([list(document[:97]) for document in documents])
    return Batch(inputs=ids[:, :-1].contiguous(), targets=ids[:, 1:].contiguous())


def _separation(subject, model, canaries, controls):
    import torch

    model.eval()
    losses = []
    with torch.no_grad():
        for documents in (controls, canaries):
            values = [float(subject.loss(model, _document_batch([d]))) for d in documents]
            losses.append(torch.tensor(values, dtype=torch.float64))
    spread = sum(float(x.var()) / len(x) for x in losses) ** 0.5
    return float(losses[0].mean() - losses[1].mean()) / max(spread, 1e-9)


def _learned_by_heart(subject, task, canaries):
    import torch

    model = subject.build_model(task, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = _document_batch(canaries)
    for _ in range(12):
        optimizer.zero_grad()
        subject.loss(model, batch).backward()
        optimizer.step()
    return model
