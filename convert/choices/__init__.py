"""What is left to the converter: a dtype for a chip, bits that meet a size."""
