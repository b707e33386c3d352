"""Bearer tokens as calls carry them (RFC 6750), which clients send and servers read."""

from __future__ import annotations

import re
from typing import Final

AUTHORIZATION_KEY: Final = "authorization"
"""Key of the token in a call's metadata."""

BEARER: Final = "Bearer"
"""What stands before the token in the value."""


def is_token(text: str) -> bool:
    """Whether a text is made of what RFC 6750 lets a bearer token be made of."""
    return re.fullmatch(r"[A-Za-z0-9._~+/-]+=*", text) is not None
