"""Quality scorer: judges datasets that come in and pairs that were made."""

from meddiff_services import worker

worker.main("quality_scorer", queues=["datasets", "quality"], stages="meddiff_services.quality_scorer.tasks")
