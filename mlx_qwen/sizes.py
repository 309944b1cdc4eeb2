"""Sizes as people write them: GB are 10^9 bytes and GiB 2^30, in all that is read and shown.

Only a machine goes by what it is sold with: one of 24GB has 24 GiB of memory (`mlx_qwen.machine.memory_bytes`).
"""

import re

from mlx_qwen.errors import MLXQwenError

GIB = 1 << 30
_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": GIB, "tib": 1 << 40}
_MOST = 1 << 62


def bytes_of(size: int | str, name: str, error: type[MLXQwenError]) -> int:
    """Bytes of a size: a number of them, or a text such as "16GB" (10^9 each), "800MB" or "16GiB" (2^30).

    Raises `error`, which calls the size `name`, for anything else and for nothing.
    """
    found = re.fullmatch(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([a-z]*)\s*", str(size), re.IGNORECASE)
    unit = None if found is None else _UNITS.get(found[2].lower())
    if found is None or unit is None or not 0 < (nbytes := int(float(found[1]) * unit)) < _MOST:
        raise error(
            f"{name} is {size!r:.60}, expected a positive number of bytes, or of kB, MB, GB or TB (10^3, 10^6, 10^9 or "
            "10^12 bytes) or KiB, MiB, GiB or TiB (2^10, 2^20, 2^30 or 2^40), such as 16GB."
        )
    return nbytes
