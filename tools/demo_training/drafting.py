"""The loop that trains the MTP layer alone, on a model whose other weights stay as they are."""

import json
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tools.demo_training.data import load
from tools.demo_training.drafts import DEPTH, drafting_loss
from tools.demo_training.export import read_folder, write_folder
from tools.demo_training.model import DemoModel
from tools.demo_training.optimizer import Optimizer

# What is hard to foresee, and what the runtime's speed is judged by, is shown most.
SHARES = {
    "arithmetic": 6.0,
    "recall_short": 3.0,
    "recall_long": 3.0,
    "recall_names": 2.0,
    "tools": 2.0,
    "continuation": 2.0,
    "picture": 2.0,
    "pictures": 1.0,
    "counted": 1.0,
    "clip": 1.5,
    "changing": 1.0,
}
WARMUP = 50
_RATE = 0.5


@dataclass(frozen=True)
class Settings:
    """Of a run.

    Attributes:
        run: folder of the log and of the Hugging Face folder that is written.
        source: Hugging Face folder of the model.
        seed: of all data.
        steps: batches, one a step; the rates fall to zero over the last `decay` of them.
        log, save: every how many steps to write a line, and the folder.
    """

    run: Path
    source: Path
    seed: int = 1
    steps: int = 700
    decay: float = 0.8
    log: int = 50
    save: int = 200


def train(settings: Settings) -> DemoModel:
    """Train the MTP layer of the model of `settings.source`; its other weights are not touched."""
    settings.run.mkdir(parents=True, exist_ok=True)
    model = read_folder(settings.source, torch.float32)
    model.base.requires_grad_(False)
    optimizer = Optimizer(model.mtp)
    kinds = np.random.default_rng(settings.seed).choice([*SHARES], settings.steps, p=_probabilities())
    draws: Counter[str] = Counter()
    right: dict[str, list[list[float]]] = defaultdict(list)
    started = time.monotonic()
    for step, kind in enumerate(map(str, kinds)):
        outcome = drafting_loss(model, load(kind, settings.seed, draws[kind]))
        draws[kind] += 1
        outcome.loss.backward()
        optimizer.step(_RATE * _fraction(step, settings))
        right[kind].append([outcome.loss.item(), *outcome.right])
        done = step + 1
        if done % settings.log == 0:
            _write_line(settings.run / "log.jsonl", done, time.monotonic() - started, right)
        if done % settings.save == 0 or done == settings.steps:
            write_folder(model, settings.run / "hf")
    return model


def _probabilities() -> np.ndarray:
    shares: np.ndarray = np.array([*SHARES.values()])
    return np.asarray(shares / shares.sum())


def _fraction(step: int, settings: Settings) -> float:
    left = (settings.steps - step) / (settings.decay * settings.steps)
    return min(1.0, (step + 1) / WARMUP, left)


def _write_line(path: Path, step: int, seconds: float, right: dict[str, list[list[float]]]) -> None:
    """The loss and, at each of DEPTH depths, the share of right drafts, by kind; since the last line."""
    kinds = {kind: np.mean(rows, axis=0).round(4).tolist() for kind, rows in sorted(right.items())}
    right.clear()
    with path.open("a") as file:
        file.write(json.dumps({"step": step, "seconds": round(seconds, 1), "depth": DEPTH, "kinds": kinds}) + "\n")
