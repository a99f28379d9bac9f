"""Mask sampler: shapes, guides and backgrounds of candidates."""

from meddiff_services import worker

worker.main("mask_sampler", queues=["masks"], stages="meddiff_services.mask_sampler.tasks")
