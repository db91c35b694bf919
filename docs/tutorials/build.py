"""Make and execute the notebooks of this folder from the Python files beside them: `make notebooks`.

A cell begins with `# %%`, a text cell with `# %% [markdown]`.
"""

import re
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
NAMES = ("text_classifier", "ppo_experiment", "own_parts")


def cells_of(text: str) -> list[tuple[str, str]]:
    """Return the cells of a Python file: "markdown" or "code", and the content."""
    cells = []
    for part in re.split(r"^# %%", text, flags=re.MULTILINE)[1:]:
        kind, _, body = part.partition("\n")
        if "[markdown]" in kind:
            lines = [line.removeprefix("#").removeprefix(" ") for line in body.strip().splitlines()]
            cells.append(("markdown", "\n".join(lines)))
        else:
            cells.append(("code", body.strip()))
    return cells


def build(name: str) -> None:
    """Execute one notebook and write it; needs the extra `docs`."""
    import nbformat
    from nbclient import NotebookClient

    new = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    cells = [new[kind](content) for kind, content in cells_of((FOLDER / f"{name}.py").read_text())]
    for i, cell in enumerate(cells):
        cell["id"] = f"cell-{i}"
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    NotebookClient(notebook, timeout=3600, kernel_name="python3").execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            if output.get("name") == "stdout":
                output["text"] = re.sub(r"/tmp/[\w/.-]+", "FOLDER", output["text"])
        if "outputs" in cell:  # progress bars and warnings say nothing to a reader
            cell["outputs"] = [o for o in cell["outputs"] if o.get("name") == "stdout"]
    nbformat.write(notebook, FOLDER / f"{name}.ipynb")


if __name__ == "__main__":
    for given in sys.argv[1:] or NAMES:
        build(given)
