"""Run the notebooks beside this file, each in a fresh kernel: `python notebooks/execute.py`.

What they show is written to build/notebooks/, and the files beside this one stay as they are, unless --keep is given.
"""

import argparse
import re
import tempfile
import time
from pathlib import Path

import nbformat
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
BUILT = FOLDER.parent / "build" / "notebooks"
_SECONDS_A_CELL = 600


def main() -> None:
    """Execute the notebooks named, or all; an error in a cell ends the run, and nothing is written of that notebook."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="such as 1-quickstart; all when none is given")
    parser.add_argument("--keep", action="store_true", help="keep the outputs in the notebooks themselves")
    arguments = parser.parse_args()
    files = [FOLDER / f"{name}.ipynb" for name in arguments.names] or sorted(FOLDER.glob("*.ipynb"))
    for file in files:
        started = time.perf_counter()
        notebook = execute(file)
        target = file if arguments.keep else BUILT / file.name
        other = changed(nbformat.read(file, as_version=4), notebook)
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, target)
        note = f", other text than kept in {', '.join(other)}" if other else ""
        print(f"{file.name}: {time.perf_counter() - started:.0f} s{note}", flush=True)


def changed(kept: nbformat.NotebookNode, made: nbformat.NotebookNode) -> list[str]:
    """Ids of the cells whose printed text differs by more than numbers, which times and memory are."""
    texts = {cell.id: _words(cell) for cell in kept.cells}
    return [cell.id for cell in made.cells if _words(cell) != texts.get(cell.id)]


def _words(cell: nbformat.NotebookNode) -> str:
    printed = "".join(output.get("text", "") for output in cell.get("outputs", []))
    return re.sub(r"[\d.,\s]+", " ", printed)


def execute(file: Path) -> nbformat.NotebookNode:
    """The notebook with fresh outputs, and without what only this run can know: when each cell ran."""
    notebook = nbformat.read(file, as_version=4)
    with tempfile.TemporaryDirectory() as sockets:  # not ports, which others on the machine could listen to
        kernel = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=f"{sockets}/kernel")
        place = {"metadata": {"path": str(FOLDER)}}
        client = NotebookClient(
            notebook,
            km=kernel,
            timeout=_SECONDS_A_CELL,
            coalesce_streams=True,
            shutdown_kernel="immediate",
            resources=place,
        )
        client.execute(cleanup_kc=True)
    notebook.metadata = {key: notebook.metadata[key] for key in ("kernelspec", "language_info")}
    notebook.metadata.language_info = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    return notebook


if __name__ == "__main__":
    main()
