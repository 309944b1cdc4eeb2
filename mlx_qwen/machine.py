"""What a machine says of itself without MLX, whose device is made ready by the first question to it."""

import os
import re
import sys

from mlx_qwen.errors import MLXQwenError, PromptError
from mlx_qwen.sizes import GIB


def machine_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_bytes(memory: int | str, error: type[MLXQwenError] = PromptError) -> int:
    """Bytes of a memory size: a number of bytes, or text such as "64GB", which is 64 · 2^30 as memory is sold.

    Raises:
        MLXQwenError: the `error` that was named, where it is no size.
    """
    if isinstance(memory, int):
        size = memory
    else:
        found = re.fullmatch(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*Gi?B\s*", memory, re.IGNORECASE)
        if found is None:
            raise error(f"memory is {memory!r:.60}, expected a number of GB or GiB (2^30 bytes), such as 64GB.")
        size = int(float(found[1]) * GIB)
    if size <= 0:
        raise error(f"memory is {memory!r}, expected more than nothing, such as 64GB.")
    return size


def chip_name() -> str:
    """As macOS calls the processor, such as "Apple M1 Max"; "" elsewhere, and where it does not say."""
    if sys.platform != "darwin":
        return ""
    import ctypes

    text, size = ctypes.create_string_buffer(128), ctypes.c_size_t(128)
    asked = ctypes.CDLL(None).sysctlbyname
    failed = asked(b"machdep.cpu.brand_string", text, ctypes.byref(size), None, ctypes.c_size_t(0))
    return "" if failed else text.value.decode(errors="replace")
