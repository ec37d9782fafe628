"""Seeds for everything that is drawn: derived by hash from names, so that no draw depends on the order of others."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from a path of names and numbers, for example `derive_seed(seed, "cohort", round)`."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
