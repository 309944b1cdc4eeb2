"""Run the notebooks beside this file, each in a fresh kernel, and keep their outputs: `python notebooks/execute.py`."""

import argparse
import tempfile
import time
from pathlib import Path

import nbformat
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
_SECONDS_A_CELL = 600


def main() -> None:
    """Execute the notebooks named, or all; an error in a cell ends the run and leaves that file as it was."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="such as 1-quickstart; all when none is given")
    parser.add_argument("--check", action="store_true", help="only run them, and write nothing")
    arguments = parser.parse_args()
    files = [FOLDER / f"{name}.ipynb" for name in arguments.names] or sorted(FOLDER.glob("*.ipynb"))
    for file in files:
        started = time.perf_counter()
        notebook = execute(file)
        if not arguments.check:
            nbformat.write(notebook, file)
        print(f"{file.name}: {time.perf_counter() - started:.0f} s", flush=True)


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
