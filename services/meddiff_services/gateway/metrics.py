"""Prometheus metrics of the gateway and a log line for every request."""

from __future__ import annotations

import time

import structlog
from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = structlog.get_logger()


class Metrics:
    """The registry of one application. Routes are counted by their template, so labels stay few."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "meddiff_http_requests_total", "Requests answered", ["method", "route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "meddiff_http_request_seconds", "Time to answer", ["method", "route"], registry=self.registry
        )
        self.sweeps = Counter("meddiff_sweeps_total", "Sweeps of active jobs", ["outcome"], registry=self.registry)


class Observed:
    """ASGI middleware: counts, times and logs every request."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.perf_counter()
        status = 500

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, observed)
        finally:
            seconds = time.perf_counter() - begun
            method, route = scope["method"], getattr(scope.get("route"), "path", "unknown")
            self._metrics.requests.labels(method, route, status).inc()
            self._metrics.seconds.labels(method, route).observe(seconds)
            state = scope.get("state", {})
            log.info(
                "request",
                method=method,
                route=route,
                status=status,
                seconds=round(seconds, 4),
                tenant=state.get("tenant"),
                key=state.get("key_id"),
            )
