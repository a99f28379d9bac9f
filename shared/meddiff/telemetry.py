"""Logs: one JSON object a line, with the job and tenant it is about and never a word of the user's data."""

from __future__ import annotations

import logging
import sys

import structlog


def _without_message(logger: object, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """An exception's message may hold a file's name, so only its type is logged."""
    if isinstance(raised := event.pop("exc_info", None), tuple) and raised[0] is not None:
        event["error"] = raised[0].__name__
    return event


def configure_logs(service: str) -> None:
    """Every log line of this process, structlog's and the standard library's, as JSON on stderr.

    Each line holds ``event``, ``level``, ``time`` (ISO 8601, UTC) and ``service``, and what is bound to the context.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
        lambda logger, method, event: {"service": service, **event},
    ]
    shared.append(_without_message)
    json_lines = structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[*shared, json_lines],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _without_message, json_lines],
            foreign_pre_chain=shared,
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
