"""What ranks that share a model send each other for a token, and how long a network takes for it."""

from dataclasses import dataclass

from mlx_qwen.config import TextConfig

# Bytes up to which more than two ranks gather their parts to sum them.
MOST_GATHERED = 1 << 17


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

        The logits are gathered in as many messages as a gathered sum takes, half those of MLX's own sum.
        """
        gather = 1.0 if is_gathered(self.sum_bytes, ranks) else 0.5
        sent = self.sums * sent_bytes(self.sum_bytes, ranks) + (ranks - 1) / ranks * self.logit_bytes
        return (self.sums + gather) * network.latency + sent / network.bandwidth


def is_gathered(nbytes: int, ranks: int) -> bool:
    """Whether ranks gather their parts of `nbytes` and sum them themselves.

    In a ring of n ranks that is n - 1 messages one after the other, and 2 (n - 1) where MLX sums. Each rank sends
    (n - 1) times its part, instead of 2 (n - 1) / n times.
    """
    return ranks == 2 or nbytes <= MOST_GATHERED


def sent_bytes(nbytes: int, ranks: int) -> float:
    """What each rank sends to its neighbour for a sum of parts of `nbytes`."""
    return (ranks - 1) * nbytes * (1 if is_gathered(nbytes, ranks) else 2 / ranks)


def traffic(text: TextConfig, tokens: int = 1, *, item_size: int = 2) -> Traffic:
    """What a pass over `tokens` tokens sends: two sums a layer, one of the embedding, and the last token's logits."""
    sums = 2 * text.num_hidden_layers + 1
    return Traffic(sums, tokens * text.hidden_size * item_size, text.vocab_size * item_size)
