"""What the server counts, as Prometheus reads it."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from .problems import Outcome

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """All of a server's metrics, in a registry of their own.

    At rest, for every route, `forge_requests_received_total` equals the sum over outcomes of
    `forge_requests_outcome_total` and the sum over codes of `forge_requests_total`. A client that
    left counts as code 499; the code of a stream is the one it would have had as a whole.
    """

    def __init__(self) -> None:
        # One more line for every count, and nobody reads it.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"forge_{name}", text, labels, registry=registry)

        self.received = counter("requests_received", "Requests that arrived.", "route")
        self.requests = counter("requests", "Requests that ended.", "route", "code")
        self.outcomes = counter(
            "requests_outcome", "Requests by how they ended.", "route", "outcome"
        )
        self.accepted = counter("requests_accepted", "Requests admitted to the queue.")
        self.shed = counter("requests_shed", "Requests refused unprocessed.", "reason")
        self.restarts = counter("inference_restarts", "Replacements of the inference thread.")
        self.tokens = counter("tokens", "Tokens generated.")
        self.refused_connections = counter("connections_refused", "Connections beyond the limit.")
        self.in_flight = Gauge(
            "forge_requests_in_flight", "Requests admitted and not ended.", registry=registry
        )
        self.queue_length = Gauge(
            "forge_queue_length", "Requests admitted and not begun.", registry=registry
        )
        self.state = Gauge("forge_state", "1 for the state it is in.", ["state"], registry=registry)
        self.batch_size = Histogram(
            "forge_batch_size",
            "Requests computed together.",
            buckets=_BATCHES,
            registry=registry,
        )
        self.request_seconds = Histogram(
            "forge_request_seconds",
            "From the request's headers to the end of its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.inference_seconds = Histogram(
            "forge_inference_seconds",
            "One step of the inference thread.",
            buckets=(0.0001, 0.00025, 0.0005, *_SECONDS),
            registry=registry,
        )

    def of(self, route: str) -> RouteMetrics:
        """Returns what is counted of one route."""
        return RouteMetrics(self, route)

    def text(self) -> bytes:
        """Returns the exposition."""
        return generate_latest(self.registry)


class RouteMetrics:
    """The counts of one route; finding a labelled metric costs more than counting.

    Args:
        metrics: Of the server.
        route: Its path.
    """

    def __init__(self, metrics: Metrics, route: str) -> None:
        self._all, self._route = metrics, route
        self.received = metrics.received.labels(route)
        self._seconds = metrics.request_seconds.labels(route)
        self._ends: dict[tuple[int, Outcome], tuple[Counter, Counter]] = {}

    def ended(self, code: int, outcome: Outcome, seconds: float) -> None:
        """Counts a request that ended."""
        ends = self._ends.get((code, outcome))
        if ends is None:
            ends = self._ends[code, outcome] = (
                self._all.requests.labels(self._route, str(code)),
                self._all.outcomes.labels(self._route, outcome.value),
            )
        for counter in ends:
            counter.inc()
        self._seconds.observe(seconds)

    def shed(self, reason: str) -> None:
        """Counts a request that was refused unprocessed."""
        self._all.shed.labels(reason).inc()
