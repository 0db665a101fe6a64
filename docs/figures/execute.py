"""Runs a notebook from top to bottom and writes it back with its outputs, without times and warnings.

python docs/figures/execute.py docs/quickstart.ipynb
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

path = Path(sys.argv[1])
notebook = nbformat.read(path, as_version=4)
NotebookClient(notebook, timeout=280, record_timing=False).execute()
for cell in notebook.cells:
    if "outputs" in cell:
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
nbformat.write(notebook, path)
