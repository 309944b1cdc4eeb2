"""Whole models beside mlx-lm's, with equal weights: prefill, decode, and the host's share of a decoded token."""

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import mlx.core as mx

from mlx_qwen.bench.table import Table
from mlx_qwen.bench.timing import OURS, PEER, median_times
from mlx_qwen.checkpoint.released import reduced
from mlx_qwen.config import ModelConfig
from tools.benchmarks.peer import cache_arrays, random_pair

_DECODED = 16


def bench_model(*, prompt_tokens: int = 256, repeats: int = 5) -> Table:
    """Prefill and decode of a small dense model: 8 layers of width 256, fp32."""
    ours, theirs = random_pair(small_config(8, hidden_size=256, intermediate_size=768, heads=8, head_dim=64))
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
    note = "8 layers of width 256 with equal random weights, fp32; tokens a second, medians in alternation."
    return Table("Whole model", note, ("", OURS, PEER, "ratio"), rows)


def bench_host_time(*, repeats: int = 9) -> Table:
    """Time the host spends on a decoded token, with 0.8B's layers at widths whose arithmetic is negligible.

    A turn is a run of tokens, as in decoding: the other model's step in between would empty the processor's caches.
    """
    config = small_config(24, hidden_size=64, intermediate_size=64, heads=2, head_dim=32)
    runs = {name: _Run(model) for name, model in zip((OURS, PEER), random_pair(config, bits=4), strict=True)}
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for run in runs.values():
        run.feed(mx.array([[1, 2, 3, 4, 5]]))
    for turn in range(repeats + 1):
        for name, run in runs.items():
            times = run.host_times(_DECODED)
            if turn:
                turns[name].append(times)
    built, whole = ({name: median(t[part] for t in times) for name, times in turns.items()} for part in (0, 1))
    rows = [
        ("building the graph", *_milliseconds(built)),
        ("the whole step", *_milliseconds(whole)),
    ]
    note = f"A token through 24 layers of width 64 at 4 bits; turns of {_DECODED} tokens in alternation, medians."
    return Table("Host time", note, ("", OURS, PEER, "ratio"), rows)


@dataclass
class _Run:
    """One model with a cache of its own."""

    model: Any

    def __post_init__(self) -> None:
        self.cache = self.model.make_cache()

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

    def host_times(self, tokens: int) -> tuple[float, float]:
        """Seconds a token spent on building its graph, and on the whole step."""
        built, started = 0.0, time.perf_counter()
        for _ in range(tokens):
            before = time.perf_counter()
            logits = self._last_logits(mx.array([[6]]))
            built += time.perf_counter() - before
            mx.eval(logits, self._arrays())
        return built / tokens, (time.perf_counter() - started) / tokens

    def _last_logits(self, ids: mx.array) -> mx.array:
        if hasattr(self.model, "hidden_states"):
            logits: mx.array = self.model.logits(self.model.hidden_states(ids, self.cache)[:, -1:])[:, 0]
        else:
            logits = self.model(ids, cache=self.cache)[:, -1]
        return logits

    def _arrays(self) -> list[mx.array]:
        return self.cache.arrays() if hasattr(self.cache, "arrays") else cache_arrays(self.cache)


def _compared(seconds: dict[str, float], tokens: int) -> tuple[str, str, str]:
    return f"{tokens / seconds[OURS]:.1f}", f"{tokens / seconds[PEER]:.1f}", f"{seconds[PEER] / seconds[OURS]:.2f}"


def _milliseconds(seconds: dict[str, float]) -> tuple[str, str, str]:
    return f"{1e3 * seconds[OURS]:.2f} ms", f"{1e3 * seconds[PEER]:.2f} ms", f"{seconds[OURS] / seconds[PEER]:.2f}"


def small_config(layers: int, *, hidden_size: int, intermediate_size: int, heads: int, head_dim: int) -> ModelConfig:
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
