"""Datasets come in here: from wherever they lie, in whatever layout, into one stored form."""

from meddiff.importing.datasets import (
    chosen_cases,
    first_of_each_picture,
    import_dataset,
    load_case,
    load_dataset,
    mask_png,
    select_cases,
    validate,
)
from meddiff.importing.sources import Archive, Source, check_uri, is_dataset_id, open_source

__all__ = [
    "Archive",
    "Source",
    "check_uri",
    "chosen_cases",
    "first_of_each_picture",
    "import_dataset",
    "is_dataset_id",
    "load_case",
    "load_dataset",
    "mask_png",
    "open_source",
    "select_cases",
    "validate",
]
