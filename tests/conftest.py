"""Settings that every test runs under."""

from __future__ import annotations

import os

# Nothing may be fetched, and a missing file must be an error, not a wait.
os.environ["HF_HUB_OFFLINE"] = "1"
