"""The notebooks of the docs, from top to bottom. A cell that holds settings is made small."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "docs" / "notebooks").glob("*.ipynb"))
SMALL = {"finetune.images_per_round": 64, "finetune.num_fake": 64, "finetune.eval_every": 32, "metric.num_images": 64}


def small(source: str) -> str:
    for key, value in SMALL.items():
        source = re.sub(rf'("{re.escape(key)}": )\d+', rf"\g<1>{value}", source)
    return source.replace("5256", "5032")


def test_there_is_one():
    assert NOTEBOOKS
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert all(not cell.get("outputs") for cell in cells), f"{path}: clear its outputs"
        for cell in cells:
            if cell["cell_type"] == "code":
                compile("".join(cell["source"]), str(path), "exec")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.source = small(cell.source)
    nbclient.NotebookClient(notebook, timeout=180, resources={"metadata": {"path": str(tmp_path)}}).execute()
    texts = [
        output.text for cell in notebook.cells for output in cell.get("outputs", []) if output.get("name") == "stdout"
    ]
    assert re.search(r"fd_embedded: \d+\.\d -> \d+\.\d", "".join(texts))
    assert (tmp_path / "mine.safetensors").is_file()
