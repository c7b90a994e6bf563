"""Subjects that evaluate, export or spread their training over ranks with one thing wrong."""

import os
from dataclasses import replace

import torch
import torch.nn.functional as F

from forge_harness import training
from forge_harness.subject.reference import ReferenceSubject


def with_digits_alone(subject):
    """The subject without its other task, for a defect that shows in the cheapest."""
    subject.tasks = lambda: ("digits",)
    return subject


class Changed:
    """A data source with some of its methods exchanged."""

    def __init__(self, source, **methods):
        self.source = source
        self.__dict__.update(methods)

    def __getattr__(self, name):
        return getattr(self.source, name)


class EvaluatesWith(ReferenceSubject):
    """Loop and package evaluate with one function, `metrics(model, data, task)`."""

    def __init__(self, metrics):
        self.metrics = metrics

    def session(self, task, options):
        session = super().session(task, options)
        session.evaluate = lambda: self._evaluate(session.model, task)
        return session

    def evaluate_package(self, task, path):
        model = training.load_package(self.build_model(task, seed=0), path)
        return self._evaluate(model, task)

    def _evaluate(self, model, task):
        mode = model.training
        model.eval()
        with torch.no_grad():
            metrics = self.metrics(model, self, task)
        model.train(mode)
        return metrics


def quality(model, data, task):
    found = training.evaluation.evaluate_model(model, data, task)
    return {"loss": found.loss, "accuracy": found.accuracy}


def of_the_train_split(model, data, task):
    return quality(
        model, Changed(data, batch=lambda task, split, ids: data.batch(task, "train", ids)), task
    )


def without_the_last_batch(model, data, task):
    info = data.data_info(task)
    whole = info.validation_size // 100 * 100
    return quality(
        model, Changed(data, data_info=lambda task: replace(info, validation_size=whole)), task
    )


def mean_of_batch_means(model, data, task):
    size, means = data.data_info(task).validation_size, []
    for start in range(0, size, 100):
        batch = data.batch(task, "validation", range(start, min(start + 100, size)))
        loss = F.cross_entropy(model(batch.inputs).flatten(0, -2), batch.targets.flatten())
        means.append(float(loss))
    return {**quality(model, data, task), "loss": sum(means) / len(means)}


def top_two(model, data, task):
    size, right = data.data_info(task).validation_size, []
    for start in range(0, size, 100):
        batch = data.batch(task, "validation", range(start, min(start + 100, size)))
        best = model(batch.inputs).topk(2, dim=-1).indices
        right.append((best == batch.targets[..., None]).any(-1).flatten())
    return {**quality(model, data, task), "accuracy": float(torch.cat(right).double().mean())}


class PredictsTheTokenAfterNext(ReferenceSubject):
    """The data shift the targets, and the loss shifts them again."""

    def loss(self, model, batch):
        if batch.targets.dim() == 1:
            return super().loss(model, batch)
        logits = model(batch.inputs)[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), batch.targets[:, 1:].flatten())


class ExportsTextWith(ReferenceSubject):
    """The second task is exported with its parameters changed: `change(name, tensor)`."""

    def __init__(self, change):
        self.change = change

    def export_package(self, session, path):
        kept = {name: p.detach().clone() for name, p in session.model.named_parameters()}
        with torch.no_grad():
            for name, p in session.model.named_parameters() if session.task == "bytes" else ():
                p.copy_(self.change(name, kept[name]))
            super().export_package(session, path)
            for name, p in session.model.named_parameters():
                p.copy_(kept[name])


def rolled_embedding(name, tensor):
    return tensor.roll(1, 0) if name == "embedding.weight" else tensor


def initial_gains(name, tensor):
    return torch.ones_like(tensor) if tensor.dim() == 1 else tensor


class RanksNeverSetEpoch(ReferenceSubject):
    """Every rank sees the order of epoch 0 for ever; one process alone does not."""

    def epoch_order(self, task, *, seed, epoch, **ranks):
        epoch = 0 if "RANK" in os.environ else epoch
        return super().epoch_order(task, seed=seed, epoch=epoch, **ranks)
