"""``python serve.py stages queue…``: a worker of those queues with the stages of that module."""

from __future__ import annotations

import sys
from typing import cast

from meddiff.contracts.tasks import Queue
from meddiff_services.worker import main

if __name__ == "__main__":
    main("trivial", [cast(Queue, queue) for queue in sys.argv[2:]], sys.argv[1])
