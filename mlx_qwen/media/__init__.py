"""From files, URLs and arrays to pictures and frames, and from these to patches and grids."""
