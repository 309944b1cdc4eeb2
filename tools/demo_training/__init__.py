"""Training of the demo checkpoint: its architecture, data, fast layers and loop."""
