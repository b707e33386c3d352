"""Settings that every test runs under."""

from __future__ import annotations

import os

import pillow_heif

# Nothing may be fetched, and a missing file must be an error, not a wait.
os.environ["HF_HUB_OFFLINE"] = "1"

# Has Pillow save HEIF in tests; the engine itself opens it without being told.
pillow_heif.register_heif_opener()
