"""Train the demo checkpoint: `python -m tools.train_demo --run FOLDER`, continued when the folder holds a run.

Two cores take less than three hours. tcmalloc preloaded (`LD_PRELOAD=libtcmalloc_minimal.so.4`) saves a third of it.
"""

import argparse
from pathlib import Path

from torch.multiprocessing.spawn import spawn

from tools.demo_training.training import Settings, work


def main() -> None:
    """Parse the command line and start the workers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of checkpoints, log and Hugging Face folder")
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--workers", type=int, default=Settings.workers, help="processes of one thread")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="when the learning rate reaches zero")
    parser.add_argument("--decay", type=float, default=Settings.decay, help="last share of the steps in which it falls")
    parser.add_argument("--parts", type=int, default=Settings.parts, help="batches per worker and step")
    settings = Settings(**vars(parser.parse_args()))
    spawn(work, args=(settings,), nprocs=settings.workers)


if __name__ == "__main__":
    main()
