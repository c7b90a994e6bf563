"""Subjects that are right, and unlike the reference: no training check may be red for them."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from forge_harness.subject.reference import ReferenceSubject
from forge_harness.training import QATSession


class Dropout(ReferenceSubject):
    """Dropout of 0.1 in training mode."""

    def build_model(self, task, *, seed):
        model = super().build_model(task, seed=seed)
        model.head.register_forward_pre_hook(_drop)
        return model


def _drop(module, args):
    return (F.dropout(args[0], 0.1, training=module.training),)


class FrozenNorms(ReferenceSubject):
    """Norms are frozen, and said to be."""

    def model_spec(self, task):
        spec = super().model_spec(task)
        frozen = sum(
            p.numel() for p in super().build_model(task, seed=0).parameters() if p.dim() < 2
        )
        return replace(spec, parameters=spec.parameters - frozen)

    def build_model(self, task, *, seed):
        model = super().build_model(task, seed=seed)
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.dim() >= 2)
        return model


def half_rate_of_norms(session):
    """Norms and embeddings learn at half the plan's rate."""
    session.optimizer.register_step_pre_hook(_halve_last)


def double_rate_of_matrices(session):
    """Matrices learn at twice the plan's rate."""
    session.optimizer.register_step_pre_hook(_double_first)


def _halve_last(optimizer, *_):
    optimizer.param_groups[-1]["lr"] *= 0.5


def _double_first(optimizer, *_):
    optimizer.param_groups[0]["lr"] *= 2.0


class RowScales(ReferenceSubject):
    """One scale a row."""

    def quantize_weight(self, weight):
        scale = weight.abs().mean(dim=1, keepdim=True).clamp(min=1e-5)
        return (weight / scale).round().clamp(-1, 1).to(torch.int8), scale.flatten()


class GroupBetas(ReferenceSubject):
    """Norms and embeddings have betas of their own."""

    def session(self, task, options):
        session = super().session(task, options)
        session.optimizer.param_groups[-1]["betas"] = (0.8, 0.999)
        return session


class DropsLastBatch(ReferenceSubject):
    """An epoch ends with its last full batch."""

    def session(self, task, options):
        return QATSession(task, options, build_model=self._build, load=_FullBatches(self, options))


class _FullBatches:
    def __init__(self, source, options):
        self.source, self.size = source, options.batch_size or 64

    def __getattr__(self, name):
        return getattr(self.source, name)

    def epoch_order(self, task, **which):
        order = list(self.source.epoch_order(task, **which))
        return order[: len(order) // self.size * self.size]

    def data_info(self, task):
        info = self.source.data_info(task)
        return replace(info, train_size=info.train_size // self.size * self.size)


class FillsTheBatch(ReferenceSubject):
    """The last batch of an epoch is filled from the next one."""

    def session(self, task, options):
        session = super().session(task, options)
        order = [
            index
            for epoch in range(3)
            for index in self.epoch_order(task, seed=options.seed, epoch=epoch)
        ]
        session.position.peek = lambda count: _window(order, session.step_index, count)
        return session


def _window(order, step, count):
    return tuple(order[step * count : (step + 1) * count])


class WithReplacement(ReferenceSubject):
    """Wrong: samples are drawn anew for every batch, some of them twice."""

    def session(self, task, options):
        session = super().session(task, options)
        size = self.data_info(task).train_size
        session.position.peek = lambda count: tuple(
            (index * index) % size for index in range(count)
        )
        return session
