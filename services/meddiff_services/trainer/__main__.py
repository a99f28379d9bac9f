"""Trainer: fine-tunes, trains the mask generator, publishes models."""

from meddiff_services import worker

worker.main("trainer", queues=["training"], stages="meddiff_services.trainer.tasks")
