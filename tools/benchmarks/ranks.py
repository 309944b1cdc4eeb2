"""Models divided among ranks of MLX's ring over loopback, beside mlx-lm's division of the same checkpoints."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_qwen.bench.table import Table
from tools.benchmarks.peer import WITHOUT_TORCH
from tools.benchmarks.rank_models import KINDS, PRECISIONS
from tools.benchmarks.rank_tables import Found, computed, taken
from tools.benchmarks.rings import ring, run_together

TOKENS = 64
RANKS = (2, 4, 8)
# More ranks than these share cores with too many others to be timed, and answer in fp32 alone.
_MOST_TIMED = 4


def bench_ranks(
    folder: Path,
    *,
    kinds: Sequence[str] = (),
    precisions: tuple[str, ...] = tuple(PRECISIONS),
    ranks: tuple[int, ...] = RANKS,
    turns: int = 3,
    tokens: int = TOKENS,
) -> list[Table]:
    """What each number of `ranks` computes beside one rank, and what it takes: time, memory and what is sent.

    `kinds` are of `KINDS`, all of them where none is named.
    """
    subjects = [KINDS[kind](kind, folder) for kind in kinds or KINDS]
    cases = {
        (subject.name, precision): {
            "model": str(subject.converted(precision, folder)),
            "prompt": str(subject.prompt),
            "judged": None,
            "tokens": tokens,
            "turns": turns,
            "theirs": True,
        }
        for subject in subjects
        for precision in precisions
    }
    alone = _run(1, cases, folder)
    asked = {name: {**case, "judged": alone[name].seen["judged"]} for name, case in cases.items()}
    found = [alone]
    for count in ranks:
        some = asked
        if count > _MOST_TIMED:
            in_fp32 = {name: case for name, case in asked.items() if name[1] == "fp32"}
            some = {name: {**case, "turns": 0, "theirs": False} for name, case in in_fp32.items()}
        found.append(_run(count, some, folder))
    return [computed(found, tokens), taken(found, turns)]


def _run(count: int, cases: Mapping[tuple[str, str], dict[str, Any]], folder: Path) -> dict[tuple[str, str], Found]:
    """What rank 0 of `count` found, each in a process of its own; without models that so many ranks do not divide."""
    place = folder / f"{count}-ranks"
    place.mkdir()
    asked = place / "asked.json"
    asked.write_text(json.dumps(list(cases.values())), encoding="utf-8")
    results = [[place / f"{case}-{rank}.json" for case in range(len(cases))] for rank in range(count)]
    environments = [dict(os.environ)] if count == 1 else ring(count, place)
    run_together([[sys.executable, "-c", _script(asked, files)] for files in results], environments)
    found = {}
    for name, *files in zip(cases, *results, strict=True):
        first, *others = (json.loads(file.read_text(encoding="utf-8")) for file in files)
        if first is not None:
            assert all(rank["answers"] == first["answers"] for rank in others), "ranks wrote different tokens"
            found[name] = Found(count, first, dict(np.load(files[0].with_suffix(".npz"))))
    return found


def _script(asked: Path, results: list[Path]) -> str:
    call = f"main(Path({str(asked)!r}), [Path(name) for name in {list(map(str, results))}])"
    return f"{WITHOUT_TORCH}from pathlib import Path; from tools.benchmarks.one_rank import main; {call}"
