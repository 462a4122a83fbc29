from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["explore", "own_pictures"])
def test_the_notebook_runs_from_top_to_bottom(name):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    path = ROOT / "notebooks" / f"{name}.ipynb"
    assert path.stat().st_size < 300_000, "its outputs are small"
    notebook = nbformat.read(path, as_version=4)
    assert sum(o.cell_type == "code" for o in notebook.cells) >= 8
    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    text = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert text.count("predicted:") == 8 and "Traceback" not in text
