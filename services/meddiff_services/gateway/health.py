"""``/healthz``, ``/readyz`` and ``/metrics``."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from meddiff.contracts.base import Contract
from prometheus_client import CONTENT_TYPE_LATEST

from meddiff_services.gateway.backends import Anyone

router = APIRouter(tags=["health"])


class Health(Contract):
    """``status`` is ``ok``; anything else is a problem."""

    status: str = "ok"


@router.get("/healthz")
async def get_health() -> Health:
    """The process answers, however many requests wait for the store."""
    return Health()


@router.get("/readyz")
def get_readiness(here: Anyone) -> Health:
    """The object store answers, so jobs are accepted and results are given, with or without Redis; else 503."""
    here.store.ping()
    return Health()


@router.get("/metrics", response_class=Response, responses={200: {"content": {CONTENT_TYPE_LATEST: {}}}})
def get_metrics(request: Request) -> Response:
    """Prometheus's text format."""
    return Response(request.app.state.metrics.text(), media_type=CONTENT_TYPE_LATEST)
