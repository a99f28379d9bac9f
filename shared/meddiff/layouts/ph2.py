"""PH2, dermoscopy (Mendonça et al., EMBC 2013): a folder a case, image and mask each in a folder of its own."""

from __future__ import annotations

import re

from meddiff.layouts.base import Files, Layout, Listing, pair_up

_IMAGE = re.compile(r"(?:^|/)(IMD\d+)/\1_Dermoscopic_Image/\1\.bmp$", re.IGNORECASE)
_MASK = re.compile(r"(?:^|/)(IMD\d+)/\1_lesion/\1_lesion\.bmp$", re.IGNORECASE)


def read(files: Files) -> Listing | None:
    """Cases of ``IMD003/IMD003_Dermoscopic_Image/IMD003.bmp`` and ``IMD003/IMD003_lesion/IMD003_lesion.bmp``."""
    return pair_up(
        [(found[1].upper(), path) for path in files if (found := _IMAGE.search(path))],
        [(found[1].upper(), path) for path in files if (found := _MASK.search(path))],
    )


LAYOUT = Layout("ph2", "IMD003/IMD003_Dermoscopic_Image/IMD003.bmp and IMD003/IMD003_lesion/IMD003_lesion.bmp", read)
