"""From token ids to tokens: sequences, steps, sampling. It knows no wire format."""
