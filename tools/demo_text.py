"""Write held-out text of the demo's tasks to a file, for comparisons: `python -m tools.demo_text FILE`.

Conversations without pictures and plain texts, as the model reads them, in an order that mixes the tasks.
"""

import argparse
import random
from pathlib import Path

from tools.demo_training.grading import MEASURED, held_out
from tools.demo_training.rendering import render


def main() -> None:
    """Write the text and say how long it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="text file to write")
    parser.add_argument("--questions", type=int, default=60, help="held-out questions of each task (default: 60)")
    options = parser.parse_args()
    text = held_out_text(options.questions)
    options.file.write_text(text, encoding="utf-8")
    print(f"{options.file}: {len(text):,} characters")


def held_out_text(questions: int) -> str:
    """The first `questions` held-out examples of every task in MEASURED that shows no pictures, shuffled."""
    examples = [question.example for task in MEASURED for question in held_out(task, questions)]
    texts = [render(example) for example in examples if not example.pictures and not example.clips]
    random.Random(0).shuffle(texts)
    return "\n".join(texts)


if __name__ == "__main__":
    main()
