"""What a measurement was made on."""

import platform
import sys

import mlx.core as mx

from mlx_qwen.version import installed

_PACKAGES = ("mlx-qwen", "mlx", "mlx-lm", "mlx-vlm")


def machine_facts() -> dict[str, str]:
    """The chip, memory, system and versions, by name; packages that are not installed are left out."""
    info = mx.device_info()
    system = f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else platform.platform()
    memory = int(info.get("memory_size", 0))
    facts = {
        "chip": str(info.get("device_name", platform.processor() or platform.machine())),
        "memory": f"{memory / (1 << 30):.0f} GiB" if memory else "",
        "device": str(mx.default_device()),
        "system": system,
        "python": platform.python_version(),
        **{name: installed(name) or "" for name in _PACKAGES},
    }
    return {name: value for name, value in facts.items() if value}


def machine_line(facts: dict[str, str]) -> str:
    """All facts in one line."""
    return "; ".join(f"{name} {value}" for name, value in facts.items())
