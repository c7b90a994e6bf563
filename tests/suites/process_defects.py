"""Subjects that are right as long as the process lives, or as long as nobody evaluates."""

from contextlib import contextmanager
from dataclasses import replace

import torch

from forge_harness.subject.reference import ReferenceSubject

_KEPT = {}


class MomentsInMemory(ReferenceSubject):
    """Moments are zeros on disk, and kept in a dictionary of this module."""

    def save_session(self, session, path):
        states = session.optimizer.state
        kept = {p: dict(entry) for p, entry in states.items()}
        named = {id(p): name for name, p in session.model.named_parameters()}
        _KEPT[str(path)] = {named[id(p)]: _copied(entry) for p, entry in kept.items()}
        for p, entry in kept.items():
            states[p] = {k: torch.zeros_like(v) for k, v in entry.items()}
        super().save_session(session, path)
        states.update(kept)

    def resume_session(self, task, options, path):
        session = super().resume_session(task, options, path)
        for name, entry in _KEPT.get(str(path), {}).items():
            session.optimizer.state[session.model.get_parameter(name)] = _copied(entry)
        return session


def _copied(entry):
    return {key: value.clone() for key, value in entry.items()}


class HashSeed(ReferenceSubject):
    """The seed is mixed with hash(str): the same within a process, another in the next one."""

    def session(self, task, options):
        return super().session(task, _mixed(task, options))

    def resume_session(self, task, options, path):
        return super().resume_session(task, _mixed(task, options), path)


def _mixed(task, options):
    return replace(options, seed=(options.seed * 1000003 + hash(f"train:{task}")) % 2**31)


class AverageNotSaved(ReferenceSubject):
    """A moving average of the weights is evaluated and exported, and is in no checkpoint."""

    def session(self, task, options):
        return _averaging(super().session(task, options))

    def resume_session(self, task, options, path):
        return _averaging(super().resume_session(task, options, path))

    def export_package(self, session, path):
        with _average_in_place(session):
            super().export_package(session, path)


def _averaging(session):
    session.average = {n: p.detach().clone() for n, p in session.model.named_parameters()}
    stepping, evaluating = session.step, session.evaluate

    def step():
        record = stepping()
        for name, p in session.model.named_parameters():
            session.average[name].lerp_(p.detach(), 0.1)
        return record

    def evaluate():
        with _average_in_place(session):
            return evaluating()

    session.step, session.evaluate = step, evaluate
    return session


@contextmanager
def _average_in_place(session):
    kept = {n: p.detach().clone() for n, p in session.model.named_parameters()}
    _put(session, session.average)
    yield
    _put(session, kept)


@torch.no_grad()
def _put(session, values):
    for name, p in session.model.named_parameters():
        p.copy_(values[name])


class ExportsInitialGains(ReferenceSubject):
    """A resumed session exports the norms' gains it was built with, not those it has trained."""

    def resume_session(self, task, options, path):
        session = super().resume_session(task, options, path)
        session.gains_forgotten = True
        return session

    def export_package(self, session, path):
        kept = {n: p.detach().clone() for n, p in session.model.named_parameters()}
        if getattr(session, "gains_forgotten", False):
            _put(session, {n: torch.ones_like(p) if p.dim() < 2 else p for n, p in kept.items()})
        super().export_package(session, path)
        _put(session, kept)


class SessionsInMemory(ReferenceSubject):
    """The file is there, and what is resumed is a session the process has kept."""

    def save_session(self, session, path):
        super().save_session(session, path)
        _KEPT[str(path)] = dict(session.state_tensors())

    def resume_session(self, task, options, path):
        session = self.session(task, options)
        session.load_state_tensors(_KEPT[str(path)])
        return session
