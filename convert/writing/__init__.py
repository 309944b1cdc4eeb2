"""How a conversion gets onto the disk, and from there to the Hub: whole, or not at all."""
