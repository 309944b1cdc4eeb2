"""The gated delta rule: how its state decays, is written to and is read."""
