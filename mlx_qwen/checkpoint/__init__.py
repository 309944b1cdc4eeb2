"""A checkpoint on disk or on the Hub: its files, headers, tensor names and layouts."""
