"""Prometheus metrics of the gateway and a log line for every request."""

from __future__ import annotations

import re
import secrets
import time
from collections import Counter as Counted
from collections.abc import Iterator

import redis
import structlog
from meddiff.contracts.ids import created_at
from meddiff.contracts.tasks import QUEUE_OF
from meddiff.planning.leases import Leases
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

METHODS = frozenset({"GET", "HEAD", "POST", "DELETE", "OPTIONS"})  # A caller may invent others.

log = structlog.get_logger()

_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-((?!0{32})[0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")


class Metrics:
    """The registry of one application. Routes are counted by their template, so labels stay few."""

    def __init__(self, leases: Leases) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(Queues(leases))
        self.requests = Counter(
            "meddiff_http_requests_total", "Requests answered", ["method", "route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "meddiff_http_request_duration_seconds", "Time to answer", ["method", "route"], registry=self.registry
        )
        self.sweeps = Counter("meddiff_sweeps_total", "Sweeps of active jobs", ["outcome"], registry=self.registry)
        for outcome in ("led", "followed", "failed"):
            self.sweeps.labels(outcome)

    def text(self) -> bytes:
        """The application's metrics and the process's, in Prometheus's text format."""
        return generate_latest(self.registry) + generate_latest(REGISTRY)


class Queues(Collector):
    """Queues and unfinished jobs as Redis knows them, read when Prometheus asks; every gateway tells the same. Tenants
    are told by their weight alone: names would be labels without bound."""

    def __init__(self, leases: Leases) -> None:
        self._leases = leases

    def describe(self) -> list[Metric]:
        """Nothing, so that registering asks Redis nothing."""
        return []

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("meddiff_redis_up", "Whether Redis answers")
        try:
            found = list(self._told())
            up.add_metric([], 1)
        except redis.RedisError:
            found = []
            up.add_metric([], 0)
        yield up
        yield from found

    def _told(self) -> Iterator[Metric]:
        leases, now = self._leases, time.time()
        workers = GaugeMetricFamily("meddiff_workers", "Live workers", labels=["queue"])
        tasks = GaugeMetricFamily(
            "meddiff_queue_tasks", "Tasks sent and waiting, or running", labels=["queue", "state"]
        )
        left = GaugeMetricFamily(
            "meddiff_queue_tasks_left", "Tasks not done of unfinished jobs", labels=["queue", "tenant_class"]
        )
        oldest = GaugeMetricFamily(
            "meddiff_queue_oldest_job_seconds",
            "Age of the oldest job that waits for a worker",
            labels=["queue", "tenant_class"],
        )
        jobs = GaugeMetricFamily("meddiff_jobs_unfinished", "Jobs that have not ended", labels=["tenant_class"])
        counted: Counted[tuple[str, str]] = Counted()
        unfinished: Counted[str] = Counted()
        for (tenant, _), (_, stages) in leases.left().items():
            unfinished[self._class(tenant)] += 1
            for stage, count in stages.items():
                counted[QUEUE_OF[stage], self._class(tenant)] += count
        classes = {"1", *(f"{weight:g}" for weight in leases.weights.values())}
        for queue, count in leases.workers().items():
            workers.add_metric([queue], count)
            for state, some in zip(("sent", "running"), leases.tasks(queue), strict=True):
                tasks.add_metric([queue, state], some)
            ages = [(self._class(tenant), now - created_at(job).timestamp()) for tenant, job in leases.waiting(queue)]
            for name in sorted(classes):
                left.add_metric([queue, name], counted[queue, name])
                oldest.add_metric([queue, name], max((age for owner, age in ages if owner == name), default=0.0))
        for name in sorted(classes):
            jobs.add_metric([name], unfinished[name])
        yield from (workers, tasks, left, oldest, jobs)

    def _class(self, tenant: str) -> str:
        return f"{self._leases.weights.get(tenant, 1.0):g}"


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
        trace_id = _trace_id(scope)
        scope.setdefault("state", {})["trace_id"] = trace_id

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-trace-id", trace_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, observed)
        finally:
            seconds = time.perf_counter() - begun
            method = scope["method"] if scope["method"] in METHODS else "other"
            route = getattr(scope.get("route"), "path", "unknown")
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
                trace=trace_id,
            )


def _trace_id(scope: Scope) -> str:
    """That of the caller's ``traceparent`` header (W3C Trace Context), or a new one."""
    for name, value in scope["headers"]:
        if name == b"traceparent" and (found := _TRACEPARENT.fullmatch(value)):
            return str(found[1].decode())
    return secrets.token_hex(16)
