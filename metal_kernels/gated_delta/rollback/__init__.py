"""Taking tokens back that a Gated DeltaNet layer has run."""
