"""MedDiff-FT as a service: contracts, client and science."""

__version__ = "0.1.0"
