"""The Celery application: queues on Redis, messages in JSON, no results, nothing prefetched."""

from __future__ import annotations

from celery import Celery

from meddiff.contracts.tasks import Task
from meddiff.settings import Settings

RUN = "meddiff.run"

_PUBLISH_RETRY = {"max_retries": 4, "interval_start": 0.1, "interval_step": 0.4, "interval_max": 2.0}


def celery_app(settings: Settings) -> Celery:
    """The application that workers consume with and dispatchers send with."""
    app = Celery("meddiff", broker=settings.redis_url, set_as_current=False)
    app.conf.update(
        accept_content=["json"],
        task_serializer="json",
        task_ignore_result=True,
        task_acks_late=True,
        task_time_limit=settings.task_seconds,
        task_reject_on_worker_lost=True,
        task_publish_retry_policy=_PUBLISH_RETRY,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_enable_remote_control=False,
        worker_hijack_root_logger=False,
        worker_proc_alive_timeout=300,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={"visibility_timeout": settings.visibility_timeout},
    )
    return app


class Sender:
    """Sends a task to its queue. Raises ``kombu.exceptions.OperationalError`` where Redis cannot be reached."""

    def __init__(self, app: Celery) -> None:
        self._app = app

    def __call__(self, task: Task) -> None:
        arguments = [task.tenant, task.job_id, task.stage, task.shard]
        self._app.send_task(RUN, args=arguments, queue=task.queue)
