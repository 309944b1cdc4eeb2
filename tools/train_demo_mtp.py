"""Train the demo's MTP layer alone: `python -m tools.train_demo_mtp --run FOLDER`, all other weights left as they are.

It goes on with the layer that the bundled checkpoint has, and teaches it to give the model's own distributions in four
drafts one after the other: a quarter of an hour's work of one core. `python -m tools.ship_demo FOLDER/hf` puts the
result into the package. The layer that is bundled was trained so with the default settings; it began as
`tools.train_demo` had trained it, for one draft, and when that still gave it the states before the final norm.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from mlx_qwen.demo import demo_folder
from tools.demo_training.drafting import Settings, train
from tools.export_demo import export


def main() -> None:
    """Parse the command line, rebuild the bundled model's Hugging Face folder and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of the log and the Hugging Face folder `hf`")
    parser.add_argument("--model", type=Path, help="an unquantized checkpoint of ours (default: the bundled one)")
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--steps", type=int, default=Settings.steps, help="batches until the learning rate is zero")
    options = parser.parse_args()
    model = options.model or demo_folder()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)
        export(model, source)
        train(Settings(options.run, source, seed=options.seed, steps=options.steps))


if __name__ == "__main__":
    main()
