"""Puts a trained Hugging Face folder into the package: `python -m tools.ship_demo FOLDER`.

The bundled checkpoint is the converter's output, unquantized, so that every step from transformers to generation is the
one that users take.
"""

import argparse
from pathlib import Path

from mlx_qwen.convert import convert
from mlx_qwen.demo import DEMO_FOLDER

MOST_BYTES = 6_000_000


def main() -> None:
    """Convert the folder named on the command line and check the size of the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what training wrote: config, weights, tokenizer, processor settings")
    print(convert(parser.parse_args().folder, DEMO_FOLDER, quantize=False, overwrite=True).table())
    size = sum(file.stat().st_size for file in DEMO_FOLDER.iterdir())
    if size > MOST_BYTES:
        raise SystemExit(f"The checkpoint takes {size:,} bytes, more than {MOST_BYTES:,}. Train a smaller model.")


if __name__ == "__main__":
    main()
