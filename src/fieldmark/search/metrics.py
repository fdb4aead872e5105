"""What a service counts, for Prometheus: requests, their time, batches, items, in a registry of its own."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The service's numbers.

    Args:
        items: tells the number of items.
    """

    def __init__(self, items: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("fieldmark_requests", "Requests answered.", ("route", "status"), registry=self.registry)
        self.seconds = Histogram(
            "fieldmark_request_seconds",
            "Time to the end of an answer.",
            ("route",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.active = Gauge("fieldmark_active_requests", "Requests being answered.", registry=self.registry)
        self.batches = Histogram(
            "fieldmark_batch_size", "Photos and texts embedded at once.", buckets=BATCHES, registry=self.registry
        )
        Gauge("fieldmark_items", "Items of the store.", registry=self.registry).set_function(items)


class Counting:
    """ASGI middleware that counts requests and their time.

    Args:
        app: what it counts.
        metrics: where.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        started = time.perf_counter()
        try:
            with self.metrics.active.track_inprogress():
                await self.app(scope, receive, noted)
        finally:
            # The route's pattern, not the path: a client must not be able to make new series. None where no route was
            # reached.
            route = getattr(scope.get("route"), "path", "none")
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - started)
