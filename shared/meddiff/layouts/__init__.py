"""Dataset layouts, one file each. A new one is a new file and one line in ``LAYOUTS``."""

from meddiff.layouts.base import IMAGE_SUFFIXES, Files, Layout, Listing, RawCase, is_image, is_text
from meddiff.layouts.detect import LAYOUTS, detect, relevant

__all__ = [
    "IMAGE_SUFFIXES",
    "LAYOUTS",
    "Files",
    "Layout",
    "Listing",
    "RawCase",
    "detect",
    "is_image",
    "is_text",
    "relevant",
]
