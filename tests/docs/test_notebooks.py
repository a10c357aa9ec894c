"""The notebooks, from top to bottom in a Jupyter kernel (whose event loop runs), every cell that trains run twice."""

from __future__ import annotations

import asyncio
import copy
import json

import nbformat
import pytest
from doc_blocks import ROOT
from nbclient import NotebookClient

NOTEBOOKS = ROOT / "examples" / "notebooks"
BACKENDS = [pytest.param("hf", marks=pytest.mark.both), pytest.param("unsloth", marks=pytest.mark.unsloth)]


def executed(name, folder, *, backend):
    """The notebook with 3 steps and this backend, and each cell that trains twice, after it was run."""
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    cells = []
    for cell in notebook.cells:
        cell.source = cell.source.replace('BACKEND = "hf"', f'BACKEND = "{backend}"')
        cell.source = cell.source.replace("STEPS = 80", "STEPS = 3").replace("STEPS = 10", "STEPS = 3")
        cells.append(cell)
        if "train(" in cell.source and cell.cell_type == "code":
            cells.append(copy.deepcopy(cell))
            cells[-1]["id"] = f"{cell['id']}-again"
    notebook.cells = cells
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    asyncio.run(client.async_execute())
    return {cell["id"]: cell for cell in notebook.cells}


def text(cell):
    return "".join(out.get("text", "") + out.get("data", {}).get("text/plain", "") for out in cell.outputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_quickstart(workplace, backend):
    cells = executed("quickstart", workplace, backend=backend)
    runs = sorted((workplace / "outputs").glob("*/summary.json"))
    assert len(runs) == 2  # the cell was run twice, and nothing was written over
    first, second = (json.loads(path.read_text()) for path in runs)
    assert first["backend"] == second["backend"] == backend
    assert first["eval_before"] == second["eval_before"]
    assert f"{second['eval_before']['exact_match']:.3f} →" in "".join(
        text(cell) for cell in cells.values() if "outputs" in cell
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_switch_backend(workplace, backend):
    cells = executed("switch_backend", workplace, backend=backend)
    printed = "".join(text(cell) for cell in cells.values() if "outputs" in cell)
    assert f"alpha {32 if backend == 'unsloth' else 16}" in printed
    assert "exact_match" in printed
    assert (workplace / "outputs" / "switch" / "adapter" / "adapter_config.json").is_file()


def test_notebooks_are_kept_without_outputs():
    for path in NOTEBOOKS.glob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            assert not cell.get("outputs")
            assert cell.get("execution_count") is None
