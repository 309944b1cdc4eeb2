"""A token of a model that ranks share, at each delay of the network between them, beside what `plan` says of it."""

import json
import os
import sys
from pathlib import Path

from mlx_qwen.bench.table import Table
from mlx_qwen.bench.timing import OURS, PEER
from mlx_qwen.config import ModelConfig
from mlx_qwen.convert import convert
from tools.benchmarks.far_hosts import FarHosts
from tools.benchmarks.peer import WITHOUT_TORCH
from tools.benchmarks.rings import run_together
from tools.benchmarks.small_model import small_config
from tools.benchmarks.synthetic import write_random_checkpoint

# Of the network, in seconds.
ROUND_TRIPS = (0.0, 5e-5, 2e-4, 1e-3)
_PORT = 5000


def bench_round_trip(
    folder: Path,
    *,
    config: ModelConfig | None = None,
    ranks: int = 2,
    round_trips: tuple[float, ...] = ROUND_TRIPS,
    turns: int = 3,
    tokens: int = 16,
) -> Table:
    """Time a token at each of `round_trips` seconds, of the network's part and of the whole, measured and planned."""
    config = config or small_config(24, hidden_size=512, intermediate_size=1024, heads=8, head_dim=32)
    write_random_checkpoint(config, folder / "source")
    convert(folder / "source", folder / "model", quantize=False, dtype="float32")
    rows = []
    for round_trip, found in zip(round_trips, _run(folder, ranks, round_trips, turns, tokens), strict=True):
        alone, ours, predicted = found["alone"], found["ours"], found["predicted"]
        rows.append(
            [
                f"{1e3 * round_trip:g} ms",
                f"{1e3 * found['sum']:.3f} ms",
                f"{1e3 * alone:.1f} ms",
                *(f"{1e3 * seconds:.1f} ms" for seconds in (ours - alone, predicted)),
                f"{predicted / (ours - alone):.2f}",
                *(f"{1e3 * seconds:.1f} ms" for seconds in (ours, alone + predicted)),
                f"{(alone + predicted) / ours:.2f}",
                f"{1e3 * found['theirs']:.1f} ms",
            ]
        )
    cores = os.cpu_count() or 1
    where = "each on a core" if ranks <= cores else f"on {cores} cores, which sleep while they wait"
    note = (
        f"{ranks} ranks of {config.text.num_hidden_layers} layers of width {config.text.hidden_size}, fp32, {where}, "
        f"in network namespaces with a delay between them; medians of {turns} turns of {tokens} tokens. A rank "
        "alone computes its share and waits for none. What it takes longer with the others is the network's part, "
        "beside what `plan` expects of sums as they were measured at that delay."
    )
    waiting, whole = ("waiting", "planned", "ratio"), (f"{OURS}, a token", "planned", "ratio")
    header = ("added round trip", "a sum", "a rank alone", *waiting, *whole, f"{PEER}, a token")
    return Table("A token beside the network's round trip", note, header, rows)


def _run(folder: Path, ranks: int, round_trips: tuple[float, ...], turns: int, tokens: int) -> list[dict[str, float]]:
    """What rank 0 found at each round trip."""
    ring = folder / "ring.json"
    results = [folder / f"rank-{rank}.json" for rank in range(ranks)]
    environments = [
        {**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(ring), "OPENBLAS_NUM_THREADS": "1"}
        for rank in range(ranks)
    ]
    with FarHosts(ranks) as hosts:
        ring.write_text(json.dumps([[f"{address}:{_PORT}"] for address in hosts.addresses]), encoding="utf-8")
        given = (
            f"Path({str(folder / 'model')!r}), Path({str(hosts.delay_file)!r}), {ranks}, {list(round_trips)}, {turns}, "
            f"{tokens}"
        )
        start = f"{WITHOUT_TORCH}from pathlib import Path; from tools.benchmarks.far_rank import main; "
        scripts = [f"{start}main({given}, Path({str(result)!r}))" for result in results]
        run_together(
            [hosts.command(rank, [sys.executable, "-c", script]) for rank, script in enumerate(scripts)], environments
        )
    found: list[dict[str, float]] = json.loads(results[0].read_text(encoding="utf-8"))
    return found
