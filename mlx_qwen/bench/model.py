"""Whole models beside mlx-lm's, with equal weights: prefill, decode, and the host's share of a decoded token."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_qwen.bench.peer import cache_arrays, random_pair
from mlx_qwen.bench.table import Table
from mlx_qwen.bench.turns import OURS, PEER, median_times
from mlx_qwen.config import ModelConfig
from mlx_qwen.sizes import reduced

_DECODED = 16


def bench_model(*, prompt_tokens: int = 512, repeats: int = 5) -> Table:
    """Prefill and decode of a small dense model: 8 layers of width 512, fp32."""
    ours, theirs = random_pair(_small(8, hidden_size=512, intermediate_size=1536, heads=8, head_dim=128))
    prompt = mx.random.randint(0, 1024, (1, prompt_tokens))
    prefill = median_times({OURS: lambda: _Run(ours).feed(prompt), PEER: lambda: _Run(theirs).feed(prompt)}, repeats)
    runs = {OURS: _Run(ours), PEER: _Run(theirs)}
    for run in runs.values():
        run.feed(prompt)
    decode = median_times({name: run.decode for name, run in runs.items()}, repeats)
    rows = [
        (f"prefill, {prompt_tokens} tokens", *_compared(prefill, prompt_tokens)),
        ("decode", *_compared(decode, _DECODED)),
    ]
    note = "8 layers of width 512 with equal random weights, fp32; tokens a second, medians in alternation."
    return Table("Whole model", note, ("", OURS, PEER, "ratio"), rows)


def bench_host_time(*, repeats: int = 30) -> Table:
    """Time the host spends on a decoded token, with 0.8B's layers at widths whose arithmetic is negligible."""
    ours, theirs = random_pair(_small(24, hidden_size=64, intermediate_size=64, heads=2, head_dim=32))
    prompt, token = mx.array([[1, 2, 3, 4, 5]]), mx.array([[6]])
    runs = {OURS: _Run(ours), PEER: _Run(theirs)}
    for run in runs.values():
        run.feed(prompt)
    whole = median_times({name: _feeding(run, token) for name, run in runs.items()}, repeats)
    settle = {name: run.settle for name, run in runs.items()}
    built = median_times({name: run.build for name, run in runs.items()}, repeats, after=settle)
    rows = [
        ("building the graph", *_milliseconds(built)),
        ("the whole step", *_milliseconds(whole)),
    ]
    note = "One decoded token through 24 layers of width 64, fp32; medians in alternation."
    return Table("Host time", note, ("", OURS, PEER, "ratio"), rows)


@dataclass
class _Run:
    """One model with a cache of its own."""

    model: Any

    def __post_init__(self) -> None:
        self.cache = self.model.make_cache()
        self._pending: list[mx.array] = []

    def feed(self, ids: mx.array) -> mx.array:
        """Run on `ids` and evaluate the last token's logits and the cache."""
        logits: mx.array = self._last_logits(ids)
        mx.eval(logits, self._arrays())
        return logits

    def decode(self) -> None:
        """Write a few tokens greedily, one after the other."""
        token = mx.array([[1]])
        for _ in range(_DECODED):
            token = mx.argmax(self.feed(token), axis=-1)[None]

    def build(self) -> None:
        """Build one step's graph; `settle` evaluates it."""
        self._pending = [self._last_logits(mx.array([[6]]))]

    def settle(self) -> None:
        """Evaluate what `build` left, so that the next graph is one step's again."""
        mx.eval(self._pending, self._arrays())

    def _last_logits(self, ids: mx.array) -> mx.array:
        if hasattr(self.model, "hidden_states"):
            logits: mx.array = self.model.logits(self.model.hidden_states(ids, self.cache)[:, -1:])[:, 0]
        else:
            logits = self.model(ids, cache=self.cache)[:, -1]
        return logits

    def _arrays(self) -> list[mx.array]:
        return self.cache.arrays() if hasattr(self.cache, "arrays") else cache_arrays(self.cache)


def _feeding(run: _Run, token: mx.array) -> Callable[[], object]:
    return lambda: run.feed(token)


def _compared(seconds: dict[str, float], tokens: int) -> tuple[str, str, str]:
    return f"{tokens / seconds[OURS]:.1f}", f"{tokens / seconds[PEER]:.1f}", f"{seconds[PEER] / seconds[OURS]:.2f}"


def _milliseconds(seconds: dict[str, float]) -> tuple[str, str, str]:
    return f"{1e3 * seconds[OURS]:.2f} ms", f"{1e3 * seconds[PEER]:.2f} ms", f"{seconds[OURS] / seconds[PEER]:.2f}"


def _small(layers: int, *, hidden_size: int, intermediate_size: int, heads: int, head_dim: int) -> ModelConfig:
    """0.8B's architecture with the given number of layers and widths, text only."""
    changes = {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 4),
        "head_dim": 2 * head_dim,
        "linear_num_key_heads": heads // 2,
        "linear_num_value_heads": heads,
        "linear_key_head_dim": head_dim,
        "linear_value_head_dim": head_dim,
        "vocab_size": 1024,
    }
    return reduced("0.8B", num_layers=layers, changes=changes)
