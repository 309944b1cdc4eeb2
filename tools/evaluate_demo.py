"""Held-out accuracy of the demo, through transformers and here: `python -m tools.evaluate_demo`.

Rows are tasks, columns the bundled checkpoint in transformers (fp32, from the Hugging Face folder rebuilt of it) and in
this runtime as it is (bf16) and converted to 8 and 4 bits (with activations in fp32, as packed matrices take many times
longer in bf16 on a CPU). The last row is how often the MTP layer's draft is the token
that the model takes. Needs the test extra.
"""

import argparse
import json
import tempfile
from pathlib import Path

import mlx.core as mx

from mlx_qwen.convert import convert
from mlx_qwen.demo import demo_folder
from mlx_qwen.loading import load
from tools.demo_training.engines import accepted_drafts, runtime, transformers_from
from tools.demo_training.grading import MEASURED, Engine, accuracy, batches, held_out
from tools.export_demo import export

DRAFTS = "MTP drafts accepted"
_COLUMN = 14


def main() -> None:
    """Measure, print one row a task as soon as it is known, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="another checkpoint than the bundled one")
    parser.add_argument("--questions", type=int, default=300, help="held-out questions of each task (default: 300)")
    parser.add_argument("--tasks", nargs="+", choices=MEASURED, default=list(MEASURED), metavar="TASK")
    parser.add_argument("--without-transformers", action="store_true", help="this runtime alone, several times faster")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    options = parser.parse_args()
    folder = options.folder or demo_folder()
    with tempfile.TemporaryDirectory() as place:
        engines = _engines(folder, Path(place), with_transformers=not options.without_transformers)
        _row("", list(engines))
        table = {}
        for task in options.tasks:
            questions = held_out(task, options.questions)
            table[task] = {name: accuracy(engine, questions) for name, engine in engines.items()}
            _row(task, [f"{share:.1%}" for share in table[task].values()])
    drafts = _accepted(folder, options.tasks, options.questions)
    _row(DRAFTS, [f"{drafts:.1%}"])
    if options.json:
        content = {"questions": options.questions, "accuracy": table, "mtp_acceptance": drafts}
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _engines(folder: Path, place: Path, *, with_transformers: bool) -> dict[str, Engine]:
    engines: dict[str, Engine] = {}
    if with_transformers:
        export(folder, place / "published")
        engines["transformers"] = transformers_from(place / "published")
    engines["bf16"] = runtime(load(folder)[0])
    for bits in (8, 4):
        target = place / f"{bits} bits"
        convert(folder, target, bits=bits, progress=False)
        engines[f"{bits} bits"] = runtime(load(target, dtype=mx.float32)[0])
    return engines


def _accepted(folder: Path, tasks: list[str], count: int) -> float:
    model, _ = load(folder)
    counts = [accepted_drafts(model, batch) for task in tasks for batch in batches(held_out(task, count))]
    return sum(right for right, _ in counts) / sum(total for _, total in counts)


def _row(name: str, cells: list[str]) -> None:
    print(f"{name:<30}" + "".join(f"{cell:>{_COLUMN}}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
