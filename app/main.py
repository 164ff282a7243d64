"""The gateway's application: routers, middleware, lifespan, error handlers; nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import metadata

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute

from app import health, observability, problem
from app.catalogue import routes as catalogue
from app.datasets import routes as datasets
from app.datasets import workspace
from app.datasets.one_image import ImageReader
from app.jobs import routes as jobs
from app.jobs.reader import JobReader
from app.keys import routes as keys
from app.security.limits import BodyLimits
from app.settings import Settings
from app.students import routes as students
from app.students.predict import Predictor
from app.teachers import routes as teachers
from app.webhooks import routes as webhooks
from app.wiring import Wiring

DESCRIPTION = "Few-shot distillation as a service: few labelled images in, a tiny ONNX classifier out."


def create_app(settings: Settings | None = None, wiring: Wiring | None = None) -> FastAPI:
    """The gateway. Who gives a `wiring` closes it; otherwise the app builds its own and closes it at the end."""
    wired = wiring or Wiring.build(settings or Settings())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        workspace.clean(wired.settings)
        yield
        app.state.predictor.close()
        app.state.images.close()
        if wiring is None:
            wired.close()

    app = FastAPI(
        title="Dram",
        description=DESCRIPTION,
        version=metadata.version("dram"),
        lifespan=lifespan,
        openapi_url="/openapi.json" if wired.settings.docs else None,
        redirect_slashes=False,
    )
    app.state.wiring = wired
    app.state.metrics = observability.Metrics()
    app.state.readiness = health.Readiness(wired)
    app.state.job_reader = JobReader(wired)
    app.state.predictor = Predictor(wired.settings, wired.blobs)
    app.state.images = ImageReader(wired.settings)
    problem.install(app)
    app.add_middleware(BodyLimits)
    app.add_middleware(observability.Observed, metrics=app.state.metrics)
    for resource in (jobs, datasets, students, teachers, catalogue, webhooks, keys, health):
        _mount(app, resource.router)
    return app


def from_environment() -> FastAPI:
    """What `uvicorn app.main:from_environment --factory` serves."""
    settings = Settings()
    observability.configure(settings.log_level, settings.log_json)
    return create_app(settings)


def _mount(app: FastAPI, router: APIRouter) -> None:
    """Add a resource's routes themselves. `include_router` keeps the router as a node and matches each path twice;
    the most polled route would pay for it. A router therefore carries its whole prefix, tags and dependencies."""
    for route in router.routes:
        if isinstance(route, APIRoute):
            route.unique_id = _operation_id(route)
        app.router.routes.append(route)


def _operation_id(route: APIRoute) -> str:
    return "_".join((*(str(tag) for tag in route.tags[:1]), route.name))
