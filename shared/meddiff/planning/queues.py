"""The Celery application: queues on Redis, messages in JSON, no results, nothing prefetched."""

from __future__ import annotations

from celery import Celery
from kombu.exceptions import OperationalError

from meddiff.contracts.tasks import Task
from meddiff.planning.leases import RETRIES
from meddiff.settings import Settings
from meddiff.store.retry import RetryPolicy

RUN = "meddiff.run"


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
        task_publish_retry=False,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_enable_remote_control=False,
        worker_hijack_root_logger=False,
        worker_proc_alive_timeout=300,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "visibility_timeout": settings.visibility_timeout,
            "unacked_restore_interval": settings.redelivery_seconds,
            "unacked_restore_throttle": 1,
            "max_retries": 0,
        },
    )
    return app


class Sender:
    """Sends a task to its queue, under the policy of other calls to Redis. Raises
    ``kombu.exceptions.OperationalError`` where it cannot be reached."""

    def __init__(self, app: Celery, retry: RetryPolicy = RETRIES) -> None:
        self._app, self._retry = app, retry

    def __call__(self, task: Task) -> None:
        arguments = [task.tenant, task.job_id, task.stage, task.shard]
        self._retry(
            lambda: self._app.send_task(RUN, args=arguments, queue=task.queue),
            lambda error: isinstance(error, OperationalError),
        )
