"""Documents planted in the validation split, and whether training came to know them."""

import random

import pytest

from forge_harness.protocols import Batch, TrainOptions

from .support import tasks_of

DOCUMENTS = 24
PERIOD = 4
"""Each canary repeats four bytes of its own: learned from two windows, guessed by nobody."""
LEAST_ALPHABET = 64
"""Cycles of four of these: 64 * 63 * 62 * 61, so that two documents are never alike."""
WINDOW = 96
STEPS, BATCH = 12, 8
LIMIT = 4.0
"""Standard errors. One-sided tail of Student's t with 46 degrees of freedom: 1.1e-4."""
MOST_BYTES = 32 << 20


@pytest.mark.forge_check("data.leak_canary")
def test_leak_canary(subject, evidence):
    """Documents planted in the validation split only are no better known than fresh ones.

    Canaries and controls are drawn alike, so without a leak their losses come from one
    distribution. As much canary text is planted as there is training text: a loader that pools
    the splits then trains on canaries half the time, and 96 samples show it (8 to 9 standard
    errors, measured on the reference subject; at most 2.5 without a leak). Statistic: mean loss
    of 24 controls minus that of 24 canaries, in standard errors. Sensitivity is measured in the
    check itself: a model trained on the canaries must exceed the limit.
    """
    task = _byte_task(subject)
    amount = sum(len(document) for document in subject.documents(task, "train"))
    length = max(2 * WINDOW, min(amount, MOST_BYTES) // DOCUMENTS)
    alphabet = _alphabet(subject, task)
    canaries = _documents(0, length, alphabet)
    controls = _documents(1, 2 * WINDOW, alphabet)
    _require_planting(subject, task, canaries)
    evidence.record(
        "planted_share",
        length * DOCUMENTS / (amount + length * DOCUMENTS),
        reason="of the samples a loader that pools the splits would train on",
    )
    options = TrainOptions(
        seed=0, steps=STEPS, batch_size=BATCH, validation_canaries=canaries, learning_rate=1e-3
    )
    session = subject.session(task, options)
    for _ in range(STEPS):
        session.step()
    evidence.at_most(
        "canary_advantage",
        # Averages of the weights (EMA) come to know in thousands of steps what these know at once.
        _separation(subject, getattr(session, "trained_model", session.model), canaries, controls),
        limit=LIMIT,
        unit="standard errors",
        reason="loss of fresh controls over loss of canaries only the validation split holds",
    )
    learned = _learned_by_heart(subject, task, canaries)
    evidence.at_least(
        "advantage_when_leaked",
        _separation(subject, learned, canaries, controls),
        limit=LIMIT,
        unit="standard errors",
        reason="positive control: as many steps on half as many samples, all canaries",
    )


def _byte_task(subject):
    """The first task whose tokens are the bytes of its text: canaries are made of bytes."""
    for task in tasks_of(subject):
        info = subject.data_info(task)
        if info.kind != "tokens" or info.cardinality > 256:
            continue
        tokens = subject.batch(task, "train", [0]).inputs[0].tolist()
        if bytes(tokens) == bytes(subject.sample_contents(task, "train", [0])[0])[: len(tokens)]:
            return task
    pytest.skip("no task of the subject has text whose tokens are bytes to plant a canary in")


def _require_planting(subject, task, canaries):
    """A subject that ignores the canaries would pass without having been tested."""
    losses = [
        subject.session(
            task, TrainOptions(seed=0, steps=1, batch_size=1, validation_canaries=planted)
        ).evaluate()["loss"]
        for planted in ((), tuple(canary[: 2 * WINDOW] for canary in canaries))
    ]
    if losses[0] == losses[1]:
        pytest.skip(
            "canaries do not reach the validation split: its loss is the same with and without "
            "TrainOptions.validation_canaries"
        )


def _alphabet(subject, task):
    """Bytes that are tokens of the task: a model of ASCII has none from 128 on."""
    alphabet = range(32, subject.data_info(task).cardinality)
    if len(alphabet) < LEAST_ALPHABET:
        pytest.skip(
            f"the tokens of {task} are {len(alphabet)} bytes from 32 on; canaries that nobody "
            f"guesses are drawn from {LEAST_ALPHABET} or more"
        )
    return alphabet


def _documents(seed, length, alphabet):
    generator = random.Random(f"canary {seed}")
    cycles = [bytes(generator.sample(alphabet, PERIOD)) for _ in range(DOCUMENTS)]
    return tuple(cycle * (length // PERIOD) for cycle in cycles)


def _batch(documents):
    import torch

    ids = torch.tensor([list(document[: WINDOW + 1]) for document in documents])
    return Batch(inputs=ids[:, :-1].contiguous(), targets=ids[:, 1:].contiguous())


def _separation(subject, model, canaries, controls):
    import torch

    model.eval()
    losses = []
    with torch.no_grad():
        for documents in (controls, canaries):
            values = [float(subject.loss(model, _batch([d]))) for d in documents]
            losses.append(torch.tensor(values, dtype=torch.float64))
    spread = sum(float(x.var()) / len(x) for x in losses) ** 0.5
    return float(losses[0].mean() - losses[1].mean()) / max(spread, 1e-9)


def _learned_by_heart(subject, task, canaries):
    import torch

    model = subject.build_model(task, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(STEPS):
        chosen = [canaries[(step * BATCH // 2 + i) % DOCUMENTS] for i in range(BATCH // 2)]
        optimizer.zero_grad()
        subject.loss(model, _batch(chosen)).backward()
        optimizer.step()
    return model
