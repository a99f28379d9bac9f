from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

from gateways import gateway

__all__ = ["gateway"]
