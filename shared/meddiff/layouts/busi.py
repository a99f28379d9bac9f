"""BUSI, breast ultrasound (Al-Dhabyani et al., Data in Brief 2020): a folder a class, masks beside the images.

Several lesions of one image have several masks. The class ``normal`` has all-black masks: lesion-free backgrounds.
"""

from __future__ import annotations

import re

from meddiff.contracts.dataset import Role
from meddiff.layouts.base import Files, Layout, Listing, pair_up

_FILE = re.compile(
    r"(?:^|/)(?P<group>benign|malignant|normal)/(?P<stem>(?P=group) \(\d+\))(?P<mask>_mask(?:_\d+)?)?\.png$",
    re.IGNORECASE,
)


def read(files: Files) -> Listing | None:
    """Cases of ``benign/benign (1).png``, ``benign (1)_mask.png``, ``benign (1)_mask_1.png`` and so on."""
    found = [(match["stem"].lower(), match["mask"], path) for path in files if (match := _FILE.search(path))]
    return pair_up(
        [(stem, path) for stem, mask, path in found if not mask],
        [(stem, path) for stem, mask, path in found if mask],
        role=_role,
    )


def _role(image: str) -> Role:
    return "background" if image.split("/")[-2].lower() == "normal" else "pair"


LAYOUT = Layout("busi", "benign/benign (1).png beside benign/benign (1)_mask.png; malignant/, normal/ likewise", read)
