"""What a machine says of itself without MLX, whose device is made ready by the first question to it."""

import os
import sys


def machine_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def chip_name() -> str:
    """As macOS calls the processor, such as "Apple M1 Max"; "" elsewhere, and where it does not say."""
    if sys.platform != "darwin":
        return ""
    import ctypes

    text, size = ctypes.create_string_buffer(128), ctypes.c_size_t(128)
    asked = ctypes.CDLL(None).sysctlbyname
    failed = asked(b"machdep.cpu.brand_string", text, ctypes.byref(size), None, ctypes.c_size_t(0))
    return "" if failed else text.value.decode(errors="replace")
