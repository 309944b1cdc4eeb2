"""All of a Gated DeltaNet layer between its input projections and its output projection."""
