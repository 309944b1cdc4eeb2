"""What is left to the converter: a dtype for a chip, bits that meet a size."""

from .choose import Choices, choose

__all__ = ["Choices", "choose"]
