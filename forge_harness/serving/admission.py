"""Who gets into the queue: nobody who would not be served in time, nobody beyond its share."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass

from forge_harness.errors import several

from .engine import Engine
from .health import Health
from .metrics import Metrics
from .pacing import Pacer
from .problems import NOT_READY, OVERLOADED, QUOTA, Problem
from .settings import Settings

_CLIENTS_REMEMBERED = 4096


@dataclass(slots=True)
class _Share:
    """What a client has used: tokens left in its bucket, when that was, requests in flight."""

    tokens: float
    at: float
    in_flight: int = 0


class Quota:
    """Requests a second (with as many at once) and requests in flight, of one client each.

    Args:
        rate: Requests a second; 0: no limit.
        in_flight: Requests at a time; 0: no limit.
    """

    def __init__(self, *, rate: float, in_flight: int) -> None:
        self.rate, self.in_flight = rate, in_flight
        self.burst = max(1.0, rate)
        self._shares: OrderedDict[str, _Share] = OrderedDict()

    def enter(self, client: str, now: float) -> None:
        """Counts a request in.

        Raises:
            Problem: QUOTA, with when to come back.
        """
        if not (self.rate or self.in_flight):
            return
        share = self._share(client, now)
        if self.in_flight and share.in_flight >= self.in_flight:
            raise Problem(
                QUOTA,
                f"{client!r} has {several(share.in_flight, 'request')} in flight; expected at most "
                f"{self.in_flight}: wait for an answer first.",
                retry_after_s=1.0,
            )
        if self.rate and share.tokens < 1.0:
            raise Problem(
                QUOTA,
                f"{client!r} sent more than {self.rate:g} requests a second; send fewer.",
                retry_after_s=(1.0 - share.tokens) / self.rate,
            )
        share.tokens -= 1.0
        share.in_flight += 1

    def leave(self, client: str) -> None:
        """Counts a request out."""
        share = self._shares.get(client)
        if share is not None:
            share.in_flight = max(0, share.in_flight - 1)

    def _share(self, client: str, now: float) -> _Share:
        share = self._shares.get(client)
        if share is None:
            share = self._shares[client] = _Share(self.burst, now)
            self._forget()
        self._shares.move_to_end(client)
        share.tokens = min(self.burst, share.tokens + (now - share.at) * self.rate)
        share.at = now
        return share

    def _forget(self) -> None:
        """Drops the clients not heard of for longest, none of which is being served."""
        for client in list(self._shares):
            if len(self._shares) <= _CLIENTS_REMEMBERED:
                return
            if not self._shares[client].in_flight:
                del self._shares[client]


_SPARE = 1.6
"""Time kept over the estimate: under overload steps take longer than those it was fitted to.
Without it a quarter of what was admitted at 23 times base load missed its deadline."""


class _Portion:
    """The work of the smaller ones among recent requests: down at once, up slowly."""

    def __init__(self) -> None:
        self.cost = self.steps = 0.0

    def saw(self, cost: int, steps: int) -> None:
        """Takes account of a request."""
        self.cost = min(cost, self.cost + _RISE * (cost - self.cost))
        self.steps = min(steps, self.steps + _RISE * (steps - self.steps))


_RISE = 0.1


class Admission:
    """Decides whether a request may wait, before anything is done for it."""

    def __init__(
        self, settings: Settings, health: Health, engine: Engine, metrics: Metrics
    ) -> None:
        self._settings, self._health = settings, health
        self._engine, self._metrics = engine, metrics
        self._quota = Quota(rate=settings.client_rate, in_flight=settings.client_in_flight)
        self._pacer, self._portion = Pacer(), _Portion()
        self.in_flight = 0

    @property
    def is_overloaded(self) -> bool:
        """Whether a request was refused for overload a moment ago."""
        return self._pacer.is_pacing

    def check_open(self, deadline: float) -> None:
        """Refuses whom nothing could be done for; asked before the body is read.

        What the request asks for is not known then, so under overload there must be room for what
        the smaller ones of late asked for. Otherwise half of the bodies are read in vain.

        Args:
            deadline: On the monotonic clock.

        Raises:
            Problem: NOT_READY or OVERLOADED.
        """
        self._check_ready()
        cost, steps = 0, 1
        if self.is_overloaded:
            cost, steps = int(self._portion.cost), max(1, int(self._portion.steps))
        self._check_room(cost=cost, steps=steps, deadline=deadline, now=time.monotonic())

    def enter(self, client: str, *, cost: int, steps: int, deadline: float, now: float) -> None:
        """Counts a request in; `leave` must follow.

        Args:
            client: Whose share it is.
            cost: Its work.
            steps: Fewest steps it takes.
            deadline: On the monotonic clock.
            now: On the same clock.

        Raises:
            Problem: NOT_READY, QUOTA or OVERLOADED.
        """
        self._portion.saw(cost, steps)
        self._check_ready()
        self._check_room(cost=cost, steps=steps, deadline=deadline, now=now)
        self._quota.enter(client, now)
        self.in_flight += 1
        self._metrics.accepted.inc()
        self._metrics.in_flight.inc()

    def _check_ready(self) -> None:
        if not self._health.is_ready:
            state = self._health.state.value
            raise Problem(
                NOT_READY,
                f"The server is {state} ({self._health.reason}); ask again later.",
                retry_after_s=1.0,
                reason=state,
            )

    def _check_room(self, *, cost: int, steps: int, deadline: float, now: float) -> None:
        waiting = len(self._engine.inbox)
        if waiting >= self._settings.max_queue:
            raise self._overloaded(
                f"{waiting} requests wait already; expected fewer than {self._settings.max_queue}.",
                retry_after_s=self._engine.wait_s(0, 1),
                reason="queue",
            )
        wait = self._engine.wait_s(cost, steps)
        is_late = now + wait * _SPARE > deadline
        if is_late and not (now < deadline and self._engine.starts_over(now)):
            raise self._overloaded(
                f"An answer would take {wait:.3f} s and the deadline is in {deadline - now:.3f} s; "
                "ask again later, or for less.",
                retry_after_s=wait,
                reason="wait",
            )

    def _overloaded(self, detail: str, *, retry_after_s: float, reason: str) -> Problem:
        self._pacer.refused()
        return Problem(OVERLOADED, detail, retry_after_s=retry_after_s, reason=reason)

    def leave(self, client: str) -> None:
        """Counts a request out, however it ended."""
        self._quota.leave(client)
        self.in_flight -= 1
        self._metrics.in_flight.dec()
