"""The data: readable, intact, disjoint, in range and balanced."""

import pytest

from forge_harness.protocols import BuildsModel

from .inputs import NEW, Alphabet, lateness, new_share, unlike
from .passages import LEAK, PASSAGE, Passages
from .reads import misplaced, reads_of, redrawn
from .rows import CHUNK, digests, input_rows
from .support import labels_of, order_of, size_of, tasks_of
from .values import hold_values, shares

SPLITS = ("train", "validation")
LONG_LINE = 40
"""Characters from which a line of text is taken to identify its source."""
SAMPLES = 4 * 1024
"""Of a split at most, whose values are compared with the other's."""


@pytest.mark.forge_check("data.readable_and_intact")
def test_readable_and_intact(subject, evidence, forge_seed):
    """Content is that of the day it was recorded, and every sample can be read, in any order.

    Oracles: the digest recorded with the data, against one recomputed from what is loaded now; and
    each sample read by itself, against a shuffled list in which some come twice. Samples that
    change from read to read, as augmentation makes them, are left out, but where they are others.
    Held-out samples are the same each time: what is evaluated is not augmented.
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
            for name, read in reads_of(subject, task, split).items():
                wrong, compared = misplaced(read, size, forge_seed)
                evidence.equal(
                    f"{task}_{split}_misplaced_{name}",
                    wrong,
                    expected=0,
                    unit="samples",
                    reason=f"of {compared} of a shuffled list, against each read by itself",
                )
                if split == "validation":
                    _expect_the_same(evidence, f"{task}_{split}", name, read, size, forge_seed)


def _expect_the_same(evidence, prefix, name, read, size, seed):
    changed, count = redrawn(read, size, seed)
    evidence.equal(
        f"{prefix}_redrawn_{name}",
        changed,
        expected=0,
        unit="samples",
        reason=f"of {count} read twice: held-out samples are not drawn anew, or augmented",
    )


@pytest.mark.forge_check("data.splits_disjoint")
def test_splits_disjoint(subject, evidence):
    """No document, no sample, no long line and no run of windows of text is in both splits.

    By content, never by index: before the loader (documents), after its permutation (what the
    first two epochs deliver), and as training gets it (inputs of every batch, a row at a time; of
    text also passages wherever they begin: windows that overlap are split by document or leak).
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
            _expect_no_shared_line(evidence, task, documents)
        held_out = set(
            digests(subject.sample_contents(task, "validation", range(info.validation_size)))
        )
        delivered = set()
        for epoch in (0, 1):
            order = order_of(subject, task, seed=0, epoch=epoch)
            delivered.update(digests(subject.sample_contents(task, "train", order)))
        evidence.equal(
            f"{task}_shared_samples",
            len(delivered & held_out),
            expected=0,
            unit="samples",
            reason="what two epochs deliver, against the whole validation split",
        )
        passages = Passages()
        validation = input_rows(subject, task, "validation", info.validation_size, passages.hold)
        train = input_rows(subject, task, "train", info.train_size, passages.see)
        evidence.equal(
            f"{task}_shared_inputs",
            train.shared(validation),
            expected=0,
            unit="rows",
            reason=f"{len(train)} against {len(validation)} distinct rows of all batches",
        )
        if info.kind == "tokens":
            evidence.at_most(
                f"{task}_known_samples",
                passages.known(),
                limit=LEAK,
                reason=f"share of held-out samples a quarter of whose passages of {PASSAGE} tokens "
                "is in training, wherever it begins",
            )


def _expect_no_shared_line(evidence, task, documents):
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


@pytest.mark.forge_check("data.label_or_token_range")
def test_label_or_token_range(subject, evidence):
    """Labels, inputs and targets lie in [0, cardinality) in every sample, and survive their dtype.

    The whole vocabulary is passed through the declared dtype: an int8 buffer turns byte 200
    into -56 and trains on. Targets are held against their oracle: the listed label, or the
    token after the input. Inputs are held against theirs: tokens that are bytes of text are those
    of the sample's content (which says what is delivered: marks in front, lower case), and float
    values that make an alphabet, as grey levels do, make the same one in both splits. A declared
    `ignored_target` is no target: it is left out, and must not be all there is. What a model that
    is not declared causal predicts (a translation, masked tokens) has no oracle here. Targets that
    are numbers (`kind` "values") have no range: they are finite, and the listed ones.
    """
    import torch

    unheld = []
    for task in tasks_of(subject):
        info = subject.data_info(task)
        if info.kind == "tokens":
            dtype = getattr(torch, info.input_dtype)
            vocabulary = torch.arange(info.cardinality)
            lost = int((vocabulary.to(dtype).to(torch.int64) != vocabulary).sum())
            evidence.equal(
                f"{task}_ids_lost_in_dtype",
                lost,
                expected=0,
                unit="ids",
                reason=f"the whole vocabulary through {info.input_dtype}",
            )
        for split in SPLITS:
            size = size_of(subject, task, split)
            if info.kind == "values":
                hold_values(evidence, subject, task, split)
                continue
            labels = labels_of(subject, task, split)
            if info.kind == "classes":
                evidence.equal(
                    f"{task}_{split}_listed",
                    len(labels),
                    expected=size,
                    unit="labels",
                    reason="labels that LoadsData.labels lists against samples of the split",
                )
            outside = [label for label in labels if not 0 <= label < info.cardinality]
            evidence.equal(
                f"{task}_{split}_out_of_range",
                len(outside),
                expected=0,
                unit="labels",
                reason=f"[0, {info.cardinality}); {sorted(set(outside))[:5] or 'none outside'}",
            )
            seen = _read_all(subject, task, split, size, labels if info.kind == "classes" else None)
            if info.ignored_target is not None:
                _expect_some_counted(evidence, f"{task}_{split}", info, seen)
            held = _expected(info, seen)
            if seen["wrong"] and info.kind == "tokens" and not _predicts_next(subject, task):
                unheld.append(f"{task}_{split}")
                del held["wrong_targets"]
            for name, (found, expected, reason) in held.items():
                evidence.equal(f"{task}_{split}_{name}", found, expected=expected, reason=reason)
        if info.kind != "tokens":
            _same_values(subject, task, evidence)
    if unheld:
        pytest.skip(
            f"the targets of {', '.join(unheld)} are not the next inputs, and their model is not "
            "declared causal: which ones are right has no oracle here; ranges and dtypes were held"
        )


def _predicts_next(subject, task):
    return not isinstance(subject, BuildsModel) or subject.model_spec(task).causal


def _expect_some_counted(evidence, prefix, info, seen):
    evidence.record(
        f"{prefix}_ignored_share",
        seen["ignored"] / (seen["all"] or 1),
        reason=f"of {seen['all']} targets, those that are {info.ignored_target} and none",
    )
    evidence.at_least(
        f"{prefix}_counted_targets",
        seen["all"] - seen["ignored"],
        limit=1,
        unit="targets",
        reason=f"a split whose targets all are {info.ignored_target} teaches and shows nothing",
    )


def _same_values(subject, task, evidence):
    """Holds float inputs of the validation split to the values that training inputs have."""
    alphabet = Alphabet()
    for inputs in _float_inputs(subject, task, "train"):
        alphabet.see(inputs)
    if not alphabet.exists():
        return
    new = [alphabet.strangers(inputs) for inputs in _float_inputs(subject, task, "validation")]
    evidence.at_most(
        f"{task}_validation_new_values",
        new_share(new),
        limit=NEW,
        reason=f"share that is none of the {len(alphabet.values)} values of training inputs",
    )


def _float_inputs(subject, task, split):
    """Yields float inputs of samples from all over a split, as batches hold them."""
    info = subject.data_info(task)
    size = info.train_size if split == "train" else info.validation_size
    ids = range(0, size, -(-size // SAMPLES) or 1)
    for start in range(0, len(ids), CHUNK):
        inputs = subject.batch(task, split, ids[start : start + CHUNK]).inputs
        if inputs.is_floating_point():
            yield inputs


def _expected(info, seen):
    count = f"{seen['samples']} samples read"
    ids = f"tokens of [0, {info.cardinality})" if info.kind == "tokens" else "finite values"
    late = seen["late"]
    text = {
        "wrong_inputs": (
            seen["unlike"],
            0,
            f"not the bytes their content begins with, late by {late}; {count}",
        )
    }
    return {
        "input_dtype": (seen["dtypes"], info.input_dtype, "delivered against declared"),
        "bad_inputs": (seen["inputs"], 0, f"not {ids}; {count}"),
        "bad_targets": (
            seen["targets"],
            0,
            f"not whole numbers of [0, {info.cardinality}); {count}",
        ),
        "wrong_targets": (
            seen["wrong"],
            0,
            f"not the {'next input' if info.kind == 'tokens' else 'listed label'}; {count}",
        ),
        **({} if late is None else text),
    }


def _read_all(subject, task, split, size, labels):
    """Reads every sample and counts what is wrong; `labels` are those of a class task."""
    import torch

    info = subject.data_info(task)
    top, ignored = info.cardinality, info.ignored_target
    seen = {
        "all": 0,
        "ignored": 0,
        "samples": 0,
        "inputs": 0,
        "targets": 0,
        "wrong": 0,
        "unlike": 0,
        "late": None,
    }
    dtypes = set()
    for start in range(0, size, CHUNK):
        ids = range(start, min(start + CHUNK, size))
        batch = subject.batch(task, split, ids)
        targets = batch.targets if labels is None else chosen(batch.targets, top)
        dtypes.add(str(batch.inputs.dtype).removeprefix("torch."))
        # int64 first: 256 itself wraps in a comparison with an int8 tensor.
        inputs = batch.inputs.to(torch.int64) if labels is None else batch.inputs
        exact, targets = targets.double(), targets.to(torch.int64)
        seen["samples"] += len(targets)
        counts = (
            torch.ones_like(targets, dtype=torch.bool) if ignored is None else targets != ignored
        )
        seen["all"] += targets.numel()
        seen["ignored"] += int((~counts).sum())
        is_one = (exact >= 0) & (exact < top) & (exact == exact.floor())
        seen["targets"] += int((counts & ~is_one).sum())
        if labels is None:
            seen["inputs"] += int(((inputs < 0) | (inputs >= top)).sum())
            seen["wrong"] += _not_next(inputs, targets, counts)
            if top <= 256 and (start == 0 or seen["late"] is not None):
                _see_text(seen, inputs, subject.sample_contents(task, split, ids), start == 0)
        else:
            seen["inputs"] += int((~torch.isfinite(inputs.double())).sum())
            listed = torch.tensor([labels[index] for index in ids])
            flat = targets.flatten()
            # Several targets a sample are none of one label.
            same = flat == listed if flat.shape == listed.shape else torch.zeros_like(counts)
            seen["wrong"] += int((counts.flatten() & ~same.flatten()).sum())
    return {**seen, "dtypes": ", ".join(sorted(dtypes))}


def _not_next(inputs, targets, counts):
    """How many targets are not the next input: all, where they are not as many as inputs."""
    if inputs.shape != targets.shape:
        return int(counts.sum())
    # After a row's last target there may be padding, which is no next input.
    rest = counts.flip(1).cumsum(1).flip(1)
    held = counts[:, :-1] & (rest[:, 1:] > 0)
    return int((held & (inputs[:, 1:] != targets[:, :-1])).sum())


def _see_text(seen, inputs, contents, first):
    """Counts inputs that are not those of their contents, where tokens are bytes."""
    if first:
        seen["late"] = lateness(inputs, contents)
    if seen["late"] is not None:
        seen["unlike"] += unlike(inputs, contents)


@pytest.mark.forge_check("data.balance")
def test_balance(subject, evidence):
    """The shares of each class, or of each byte of text, agree between the splits.

    Statistic: total variation distance of the two distributions. Limit 0.10: an accuracy moves
    by no more. Small splits differ by chance: for classes the largest distance of 1,000 splits
    drawn at random from the same labels is the limit where that is more. Bytes of one document
    are not independent draws and get no allowance. Targets that are numbers are divided into tenths
    of both splits, which are held as classes are; of several numbers a target the furthest apart.
    """
    from collections import Counter

    for task in tasks_of(subject):
        kind = subject.data_info(task).kind
        if kind == "tokens":
            listed = [b"".join(subject.documents(task, split)) for split in SPLITS]
        else:
            listed = [labels_of(subject, task, split) for split in SPLITS]
        if empty := [split for split, found in zip(SPLITS, listed, strict=True) if not found]:
            pytest.skip(f"the {empty[0]} split of {task} is empty: there are no shares to compare")
        pairs = shares(*listed) if kind == "values" else [tuple(map(Counter, listed))]
        chance = 0.0 if kind == "tokens" else max(_variation_by_chance(pair) for pair in pairs)
        distance = max(_variation(*pair) for pair in pairs)
        evidence.at_most(
            f"{task}_distribution_distance",
            distance,
            limit=max(0.10, chance),
            reason="total variation between the bytes of the splits"
            if kind == "tokens"
            else f"total variation between the splits; {chance:.3f} occurs by chance",
        )


def chosen(targets, classes):
    """Returns one class a sample; of a row of shares, as one-hot targets are, the largest."""
    if targets.dim() == 2 and targets.shape[1] == classes > 1 and targets.is_floating_point():
        known = targets.isfinite().all(1)
        return targets.argmax(1).double().masked_fill(~known, float("nan"))
    return targets


def _variation(first, second):
    first_total, second_total = first.total(), second.total()
    keys = first.keys() | second.keys()
    return sum(abs(first[k] / first_total - second[k] / second_total) for k in keys) / 2


def _variation_by_chance(counts):
    """The largest distance among 1,000 splits of the pooled labels into the same sizes."""
    import numpy as np

    pooled = np.array(list((counts[0] + counts[1]).values()))
    size, other = counts[0].total(), counts[1].total()
    generator = np.random.default_rng(0)
    drawn = generator.multivariate_hypergeometric(pooled, size, size=1000)
    return float((abs(drawn / size - (pooled - drawn) / other).sum(1) / 2).max())
