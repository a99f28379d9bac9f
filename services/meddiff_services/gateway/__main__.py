"""``python -m meddiff_services.gateway``: the HTTP service."""

from __future__ import annotations

import ipaddress
import sys

import uvicorn
from meddiff.settings import Settings
from meddiff.telemetry import configure_logs

from meddiff_services.gateway.app import create_app

LEAVE_SECONDS = 10


def main() -> None:
    """Serves until SIGTERM. Ends at once where no keys are required and ``MEDDIFF_HOST`` is no loopback address."""
    settings = Settings()
    if not settings.require_keys and not _is_loopback(settings.host):
        sys.exit("MEDDIFF_HOST must be a loopback address where MEDDIFF_REQUIRE_KEYS is off: anyone could ask anything")
    configure_logs("gateway")
    uvicorn.run(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        access_log=False,
        log_config=None,
        timeout_graceful_shutdown=LEAVE_SECONDS,
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    main()
