"""What ranks that share a model send each other for a token, and how long a network takes for it."""

from dataclasses import dataclass

from mlx_qwen.config import TextConfig


@dataclass(frozen=True, slots=True)
class Network:
    """A connection between ranks.

    Attributes:
        latency: seconds of one sum over all ranks of few bytes.
        bandwidth: bytes a second that a rank sends to its neighbour.
    """

    latency: float
    bandwidth: float


@dataclass(frozen=True, slots=True)
class Traffic:
    """What is sent for a token or a piece of a prompt: `sums`, one after the other, of `sum_bytes` each; logits."""

    sums: int
    sum_bytes: int
    logit_bytes: int

    def seconds(self, network: Network, ranks: int) -> float:
        """How long it takes in a ring, where nothing is computed meanwhile.

        A ring sums in twice as many steps as it gathers, and each rank sends (n - 1) / n of the bytes in half of them.
        """
        sent = (ranks - 1) / ranks * (2 * self.sums * self.sum_bytes + self.logit_bytes)
        return (self.sums + 0.5) * network.latency + sent / network.bandwidth


def traffic(text: TextConfig, tokens: int = 1, *, item_size: int = 2) -> Traffic:
    """What a pass over `tokens` tokens sends: two sums a layer, one of the embedding, and the last token's logits."""
    sums = 2 * text.num_hidden_layers + 1
    return Traffic(sums, tokens * text.hidden_size * item_size, text.vocab_size * item_size)
