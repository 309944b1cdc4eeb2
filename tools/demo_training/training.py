"""The training loop: workers of one thread each, every one computing its own batches of the same kinds."""

import json
import os
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import distributed

from tools.demo_training.data import load
from tools.demo_training.export import new_model, write_folder
from tools.demo_training.optimizer import Optimizer
from tools.demo_training.recipe import KINDS, WARMUP, weights_at

KEPT_CHECKPOINTS = 3


@dataclass(frozen=True)
class Settings:
    """Of a run.

    Attributes:
        run: folder of checkpoints and log.
        seed: of the first weights and of all data.
        workers: processes of one thread each.
        steps: when the learning rates reach zero.
        decay: last share of the steps, in which they fall.
        parts: batches per worker and step.
        log, save: every how many steps to write a line, and a checkpoint with its Hugging Face folder.
    """

    run: Path
    seed: int = 0
    workers: int = 2
    steps: int = 13600
    decay: float = 0.5
    parts: int = 2
    log: int = 50
    save: int = 200


class Log:
    """Sums what happened by kind, and appends one JSON line when asked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sums: dict[str, list[np.ndarray]] = defaultdict(list)
        self.started = time.monotonic()

    def add(self, kind: str, *measures: float) -> None:
        """Adds one batch: loss and the MTP layer's loss in nats a token, shares of tokens and of whole rows right."""
        self.sums[kind].append(np.array(measures))

    def write(self, **facts: object) -> None:
        """Writes the means since the last line, with `facts`."""
        kinds = {kind: np.mean(rows, axis=0).round(4).tolist() for kind, rows in sorted(self.sums.items())}
        self.sums.clear()
        line = json.dumps(facts | {"seconds": round(time.monotonic() - self.started, 1), "kinds": kinds})
        with self.path.open("a") as file:
            file.write(line + "\n")


class Trainer:
    """One worker's side of a run."""

    def __init__(self, settings: Settings, rank: int) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.rank = settings, rank
        self.model = new_model()
        self.optimizer = Optimizer(self.model)
        self.log = Log(settings.run / "log.jsonl")
        self.step = self.tokens = 0
        self.draws: Counter[str] = Counter()
        checkpoints = saved(settings.run)
        if checkpoints:
            state = torch.load(checkpoints[-1], weights_only=True)
            self.optimizer.load(state["optimizer"])
            self.step, self.tokens, self.draws = state["step"], state["tokens"], Counter(state["draws"])

    def run(self) -> None:
        """Trains from the last checkpoint to the last step."""
        settings = self.settings
        while self.step < settings.steps:
            self.advance()
            if self.rank == 0 and self.step % settings.log == 0:
                self.log.write(step=self.step, tokens=self.tokens, rate=round(self.fraction(), 4))
            if self.rank == 0 and (self.step % settings.save == 0 or self.step == settings.steps):
                self.save()

    def fraction(self) -> float:
        """Of the peak rates: a linear warmup, a plateau, a linear fall to zero."""
        left = (self.settings.steps - self.step) / (self.settings.decay * self.settings.steps)
        return min(1.0, (self.step + 1) / WARMUP, left)

    def advance(self) -> None:
        """One step over `parts` batches per worker; gradients are the mean over all of them."""
        settings = self.settings
        kinds = np.random.default_rng([settings.seed, self.step]).choice(KINDS, settings.parts, p=weights_at(self.step))
        for kind in map(str, kinds):
            batch = load(kind, settings.seed, self.draws[kind], self.rank, settings.workers)
            self.draws[kind] += 1
            outcome = self.model(batch)
            (outcome.loss / settings.parts).backward()
            missed = (batch.labels >= 0) & ~outcome.right
            rows, tokens = 1 - missed.any(1).float().mean(), 1 - missed.sum() / (batch.labels >= 0).sum()
            self.log.add(kind, outcome.token_loss, outcome.draft_loss, tokens.item(), rows.item())
            self.tokens += batch.input_ids.numel() * settings.workers
        if settings.workers > 1:
            distributed.all_reduce(self.optimizer.gradients)
            self.optimizer.gradients.div_(settings.workers)
        self.optimizer.step(self.fraction())
        self.step += 1

    def save(self) -> None:
        """Writes a checkpoint, drops old ones, and refreshes the Hugging Face folder beside them."""
        run = self.settings.run
        state = {
            "optimizer": self.optimizer.state(),
            "step": self.step,
            "tokens": self.tokens,
            "draws": dict(self.draws),
        }
        target = run / f"step-{self.step:06d}.pt"
        torch.save(state, target.with_suffix(".part"))
        target.with_suffix(".part").replace(target)
        for old in saved(run)[:-KEPT_CHECKPOINTS]:
            old.unlink()
        write_folder(self.model, run / "hf")


def saved(run: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    return sorted(run.glob("step-*.pt"))


def work(rank: int, settings: Settings) -> None:
    """Entry of a worker process: one thread on one core."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    settings.run.mkdir(parents=True, exist_ok=True)
    if settings.workers > 1:
        meeting = settings.run / f"meeting-{os.getppid()}"
        distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=settings.workers)
        distributed.barrier()
        meeting.unlink(missing_ok=True)
    trainer = Trainer(settings, rank)
    if rank == 0:
        facts = {name: str(value) for name, value in asdict(settings).items()}
        trainer.log.write(step=trainer.step, settings=facts)
    trainer.run()
    if settings.workers > 1:
        distributed.destroy_process_group()
