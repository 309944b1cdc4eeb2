"""Where a conversion reads from: a folder, or a Hub repository that need not be on the disk."""
