"""A model being served, without the socket: what every engine of `serve` puts behind its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from forge_harness.errors import AuditError

from .admission import Admission
from .app import Application
from .batcher import BatchScheduler
from .completer import CompletionScheduler
from .engine import Engine, Scheduler
from .guard import Guard
from .health import Health, State
from .metrics import Metrics
from .package import Classifier, Served
from .problems import NOT_READY, Problem
from .route import Route
from .routes import Api
from .settings import Settings

_log = logging.getLogger(__name__)
_SERVER = "server"


class Core:
    """Engine, admission, routes and counts of one model.

    Args:
        served: The model.
        settings: Limits and places.
        guard: Tokens, roles, audit.
        drain: Begins a drain, asked for by whom.
        build: Makes the scheduler of the inference thread; None: the one of the model.
    """

    def __init__(
        self,
        served: Served,
        settings: Settings,
        guard: Guard,
        *,
        drain: Callable[[str], None],
        build: Callable[[], Scheduler] | None = None,
    ) -> None:
        self.served, self.settings, self.guard = served, settings, guard
        self.url = ""
        self.metrics, self.health = Metrics(), Health(self._changed)
        self._mark(State.STARTING)
        self.engine = Engine(
            build or (lambda: scheduler_of(served, settings)),
            capacity=settings.max_batch,
            settings=settings,
            health=self.health,
            metrics=self.metrics,
            on_restart=lambda reason: self.record("serve.restart_inference", {"reason": reason}),
        )
        inbox = self.engine.inbox
        self.metrics.queue_length.set_function(lambda: len(inbox))
        self.admission = Admission(settings, self.health, self.engine, self.metrics)
        self._drain = drain

    def routes(self) -> tuple[Route, ...]:
        """Returns the routes of this server."""
        return Api(
            served=self.served,
            settings=self.settings,
            health=self.health,
            engine=self.engine,
            admission=self.admission,
            metrics=self.metrics,
            drain=self._drain,
        ).routes()

    def application(self) -> Application:
        """Returns the ASGI application."""
        return Application(
            self.routes(), guard=self.guard, metrics=self.metrics, health=self.health
        )

    def abandon_all(self) -> int:
        """Ends what was accepted and is not answered; returns how many requests that were."""
        unanswered = self.admission.in_flight
        problem = Problem(NOT_READY, "The server stops; send the request to another one.")
        for job in [*self.engine.inbox.empty(), *list(self.engine.inbox.taken)]:
            self.engine.abandon(job, problem)
        return unanswered

    def record(self, action: str, detail: Mapping[str, object], *, is_last: bool = False) -> None:
        """Records what happens whether or not it can be recorded; see `Guard.control`."""
        try:
            self.guard.control(action, self.url, detail, _SERVER, is_last=is_last)
        except AuditError as error:
            _log.error("%s could not be recorded: %s", action, error)

    def _changed(self, state: State, reason: str) -> None:
        _log.warning("The server is %s%s", state.value, f": {reason}" if reason else "")
        self._mark(state)

    def _mark(self, state: State) -> None:
        for each in State:
            self.metrics.state.labels(each.value).set(each is state)


def scheduler_of(served: Served, settings: Settings) -> Scheduler:
    """Returns the scheduler of a model."""
    if isinstance(served, Classifier):
        return BatchScheduler(served, max_batch=settings.max_batch)
    return CompletionScheduler(served, max_batch=settings.max_batch)
