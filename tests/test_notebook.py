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


# what only a network or a GPU has is left out; the page is asked, and the signals are looked at
STAND_INS = {
    "install": "import signal; before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)",
    "train": (
        "cifar100 --preset fast --epochs 10 --precision fp16",
        "digits --arch resnet8 --epochs 1 --sizes 8",
    ),
    "page": (', "--share"', ""),
}
AFTERWARDS = """
from urllib.request import urlopen
assert b"gradio" in urlopen("http://127.0.0.1:7860").read()
assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
"""


@pytest.mark.slow
def test_the_notebook_for_colab_runs_in_one_kernel_but_for_network_and_gpu(site, tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "notebooks" / "colab.ipynb", as_version=4)
    for cell in notebook.cells:
        for tag in cell.metadata.get("tags", []):
            change = STAND_INS[tag]
            cell.source = change if isinstance(change, str) else cell.source.replace(*change)
    notebook.cells.append(nbformat.v4.new_code_cell(AFTERWARDS))
    monkeypatch.setenv("PYTHONPATH", str(site))
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    assert text.count("epoch  train loss") == 2 == text.count("Next: sifar-train")
    assert text.count("learner.pkl is written") == 1 and "Traceback" not in text
    pages = [output.get("data", {}).get("text/html", "") for output in outputs]
    assert sum("srcdoc" in page for page in pages) == 1
