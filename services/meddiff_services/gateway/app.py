"""The gateway as a FastAPI application: routes, what they share, and the sweep beside them."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi_offline import FastAPIOffline
from meddiff import __version__
from meddiff.contracts.problems import Problem
from meddiff.settings import Settings

from meddiff_services.gateway import access, datasets, health, jobs, models, pictures, problems, recipes, schemas, sweep
from meddiff_services.gateway.backends import Backends
from meddiff_services.gateway.bodies import BoundedBodies, HeadAsGet
from meddiff_services.gateway.metrics import Metrics, Observed

DESCRIPTION = "Synthetic image-mask pairs from about thirty annotated images. Errors are RFC 9457 problems."


def create_app(settings: Settings) -> FastAPI:
    """The application. While it runs, a thread plans active jobs again every ``settings.sweep_seconds``."""
    backends = Backends.connect(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        stop = threading.Event()
        thread = threading.Thread(target=sweep.run, args=(backends, app.state.metrics, stop), name="sweep")
        thread.start()
        yield
        stop.set()
        thread.join()

    app = FastAPIOffline(
        title="MedDiff-FT",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        static_url="/docs-static",
        redoc_url=None,
        responses=problems.documented("invalid-request", "unavailable", "internal"),
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.backends = backends
    app.state.metrics = Metrics(backends.leases)
    app.state.keys = access.Keys(backends.store)
    problems.install(app)
    for resource in (jobs, pictures, datasets, models, access, recipes, schemas, health):
        app.include_router(resource.router)
    app.add_middleware(BoundedBodies, max_upload_bytes=settings.max_upload_bytes)
    app.add_middleware(HeadAsGet)
    app.add_middleware(Observed, metrics=app.state.metrics)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's schema, with the problems that its routes refer to."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        problem = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
        components = schema["components"]["schemas"]
        components |= problem.pop("$defs") | {"Problem": problem}
        app.openapi_schema = schema
    return app.openapi_schema
