"""Inpainter: paints lesions into backgrounds."""

from meddiff_services import worker

worker.main("inpainter", queues=["inpainting"], stages="meddiff_services.inpainter.tasks")
