"""What each route does, and the permission it needs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

from forge_harness.security.access import PUBLIC, Permission

from .admission import Admission
from .batcher import Prediction
from .completer import Completed
from .engine import Engine
from .exchange import Exchange, Reply, check_json_type, dump, json_body
from .health import Health
from .inputs import completion_of, rows_of
from .jobs import Job
from .metrics import MEDIA_TYPE as METRICS_TYPE
from .metrics import Metrics
from .openapi import document
from .package import Classifier, Completer, Served, describe
from .problems import CANCELLED, NOT_FOUND, Problem
from .route import Gate, Route
from .settings import Settings
from .streaming import MEDIA_TYPE as EVENTS_TYPE
from .streaming import TokenStream, text_of, usage


class Api:
    """The handlers, over what they share.

    Args:
        served: The model.
        settings: Limits.
        health: State of the server.
        engine: Computes.
        admission: Lets in.
        metrics: Shown.
        drain: Begins a drain, asked for by whom.
    """

    def __init__(
        self,
        *,
        served: Served,
        settings: Settings,
        health: Health,
        engine: Engine,
        admission: Admission,
        metrics: Metrics,
        drain: Callable[[str], None],
    ) -> None:
        self._served, self._settings, self._health = served, settings, health
        self._engine, self._admission, self._metrics = engine, admission, metrics
        self._drain = drain

    def routes(self) -> tuple[Route, ...]:
        """Returns all routes."""
        predict, describe_it = Permission("model", "predict"), Permission("model", "describe")
        rows, text = self._gate(Classifier), self._gate(Completer)
        return (
            Route("/v1/predict", "POST", predict, self.predict, "serve.predict", rows),
            Route("/v1/completions", "POST", predict, self.completions, "serve.completions", text),
            Route("/v1/models", "GET", describe_it, self.models, "serve.models"),
            Route("/v1/drain", "POST", Permission("server", "drain"), self.drain, "serve.drain"),
            Route("/metrics", "GET", Permission("metrics", "read"), self.metrics, "serve.metrics"),
            Route("/openapi.json", "GET", describe_it, self.openapi, "serve.openapi"),
            Route("/healthz", "GET", PUBLIC, self.healthz, ""),
            Route("/readyz", "GET", PUBLIC, self.readyz, ""),
        )

    async def healthz(self, exchange: Exchange) -> Reply:
        """The process lives."""
        return Reply(body=b'{"status":"alive"}')

    async def readyz(self, exchange: Exchange) -> Reply:
        """Requests are admitted, or why not."""
        state: dict[str, Any] = {"state": self._health.state.value}
        if self._health.is_ready:
            return Reply(body=dump(state))
        return Reply(status=503, body=dump({**state, "reason": self._health.reason}))

    async def metrics(self, exchange: Exchange) -> Reply:
        """The counts."""
        return Reply(body=self._metrics.text(), media_type=METRICS_TYPE)

    async def models(self, exchange: Exchange) -> Reply:
        """What is served."""
        return Reply(body=dump({"data": [dict(describe(self._served))]}))

    async def openapi(self, exchange: Exchange) -> Reply:
        """This description."""
        return Reply(body=dump(document(self.routes(), self._served)))

    async def drain(self, exchange: Exchange) -> Reply:
        """Begins a drain."""
        self._drain(exchange.principal.name)
        return Reply(status=202, body=dump({"state": self._health.state.value}))

    async def predict(self, exchange: Exchange) -> Reply:
        """Labels and logits of rows."""
        served = self._served
        assert isinstance(served, Classifier)  # the gate
        deadline = exchange.deadline(self._settings.deadline_s)
        rows = rows_of(await self._json(exchange), served)
        job = self._job(rows, cost=len(rows), steps=1, deadline=deadline)
        result: Prediction = await self._result(exchange, job)
        body = {
            "labels": result.labels.tolist(),
            "logits": result.logits.tolist(),
            "model": served.name,
            "request_id": exchange.request_id,
        }
        detail = {"rows": job.cost, "model": served.name}
        return Reply(body=dump(body), headers=_timing(job), detail=detail)

    async def completions(self, exchange: Exchange) -> Reply:
        """A prompt continued."""
        served = self._served
        assert isinstance(served, Completer)  # the gate
        deadline = exchange.deadline(self._settings.deadline_s)
        wanted = completion_of(await self._json(exchange), served)
        tokens = wanted.max_tokens
        job = self._job(wanted, cost=tokens, steps=tokens, deadline=deadline)
        if wanted.stream:
            return await self._streamed(exchange, job)
        completed: Completed = await self._result(exchange, job)
        choice = {
            "text": text_of(completed.tokens),
            "tokens": list(completed.tokens),
            "finish_reason": completed.finish_reason,
        }
        body = {
            "choices": [choice],
            "usage": usage(wanted, completed),
            "model": served.name,
            "request_id": exchange.request_id,
        }
        detail = {**usage(wanted, completed), "model": served.name}
        return Reply(body=dump(body), headers=_timing(job), detail=detail)

    async def _streamed(self, exchange: Exchange, job: Job) -> Reply:
        """Answers with a stream once there is a first token."""
        self._enter(exchange, job)
        left = exchange.on_leave(lambda: self._engine.abandon(job, _left()))

        def release() -> None:
            left.cancel()
            self._engine.abandon(job, _left())

        stream = TokenStream(job, exchange.request_id, release)
        try:
            self._engine.submit(job)
            await stream.begin()
        except BaseException:
            stream.close()
            raise
        reply = Reply(
            media_type=EVENTS_TYPE,
            headers=[*_timing(job), ("cache-control", "no-store")],
            events=stream,
            detail={"model": self._served.name, "stream": True},
        )
        stream.reply = reply
        return reply

    def _gate(self, kind: type[Served]) -> Gate:
        def check(exchange: Exchange) -> None:
            if not isinstance(self._served, kind):
                raise _other_route(self._served)
            self._admission.check_open(exchange.deadline(self._settings.deadline_s))

        return check

    def _enter(self, exchange: Exchange, job: Job) -> None:
        """Admits a job: until its answer has been sent, since a drain waits for that."""
        client = exchange.client
        self._admission.enter(
            client, cost=job.cost, steps=job.steps, deadline=job.deadline, now=time.monotonic()
        )
        exchange.at_end(lambda: self._admission.leave(client))

    async def _json(self, exchange: Exchange) -> Mapping[str, Any]:
        check_json_type(exchange)
        limits = self._settings
        return json_body(await exchange.body(most=limits.max_body, within_s=limits.body_s))

    def _job(self, work: object, *, cost: int, steps: int, deadline: float) -> Job:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        return Job(work, cost, steps, deadline, future)

    async def _result(self, exchange: Exchange, job: Job) -> Any:  # noqa: ANN401 - of the scheduler
        """Admits a job, waits for it, and withdraws it when the client leaves."""
        self._enter(exchange, job)
        left = exchange.on_leave(lambda: self._engine.abandon(job, _left()))
        try:
            self._engine.submit(job)
            return await job.future
        finally:
            left.cancel()


def _timing(job: Job) -> list[tuple[str, str]]:
    queued = (job.started - job.arrived) * 1000
    return [("x-queue-ms", f"{queued:.3f}"), ("x-batch-size", str(job.mates))]


def _left() -> Problem:
    return Problem(CANCELLED, "The client left before its answer was there.")


def _other_route(served: Served) -> Problem:
    right = "/v1/completions" if isinstance(served, Completer) else "/v1/predict"
    return Problem(NOT_FOUND, f"{served.name!r} does not answer here; ask {right}.")
