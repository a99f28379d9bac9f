"""Memory and use of this process's GPU, read when Prometheus asks."""

from __future__ import annotations

from collections.abc import Iterator

import structlog
import torch
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

log = structlog.get_logger()


class Gpus(Collector):
    """Every CUDA device that the process sees. Its use is told where the driver does: of a part of one it does not."""

    def describe(self) -> list[Metric]:
        """Nothing, so that registering asks no driver."""
        return []

    def collect(self) -> Iterator[Metric]:
        memory = GaugeMetricFamily("meddiff_gpu_memory_bytes", "Memory of a GPU", labels=["device", "state"])
        use = GaugeMetricFamily("meddiff_gpu_utilization_ratio", "Share of time a kernel ran", labels=["device"])
        for n in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(n)
            memory.add_metric([str(n), "used"], total - free)
            memory.add_metric([str(n), "free"], free)
            try:
                use.add_metric([str(n)], torch.cuda.utilization(n) / 100)
            except Exception as error:  # NVML's errors have no base of their own.
                log.debug("use of the GPU not told", error=type(error).__name__)
        yield from (memory, use)
