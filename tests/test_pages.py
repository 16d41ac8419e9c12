"""The README and the pages of `docs` run: their Python blocks in order, and their commands parse."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from pages import FRESH, PAGES, ROOT, blocks, every_block, run

from laurel_rewrite.app import cli

README, DOCS = PAGES[0], ROOT / "docs"
COMMANDS = {line for page in PAGES for text in blocks(page, "sh") for line in text.splitlines() if line.startswith("laurel-rewrite")}
PRINTS = {
    "README.md": ("x the baseline's latency", "layers.2.laurel_1 identity (2, 16, 64) stream 0, position 5"),
    "decoders.md": ("True\n", "decoding: "),
    "compare.md": ("one more layer", "baseline"),
    "lightning.md": ("'laurel/model.layers.1.laurel_1/uv':",),
    "transformers.md": ("{'laurel/transformer.h.1.laurel_1/a': ", "transformer.h.0.laurel_0"),
}
"""What a page's blocks print among other things."""


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=page.name, marks=[pytest.mark.engines] * (page != README)) for page in PAGES if blocks(page, "python")],
)
def test_the_python_blocks_run(page, tmp_path):
    done = run(page, tmp_path)
    assert done.returncode == 0, done.stderr
    for text in PRINTS.get(page.name, ()):
        assert text in done.stdout
    if blocks(page, "python", FRESH):
        again = run(page, tmp_path, FRESH)
        assert again.returncode == 0, again.stderr
        assert again.stdout.startswith("the quick brown")


def test_the_fragment_is_a_model_file(tmp_path):
    (fragment,) = blocks(DOCS / "rewrite.md", "python", "a model's file")
    (tmp_path / "fragment.py").write_text(
        "import torch\nclass MyModel(torch.nn.Linear):\n    def __init__(self): super().__init__(64, 64)\n" + fragment
    )
    code = "from laurel_rewrite.sources.models import build; print(type(build('fragment.py').model).__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "MyModel", done.stderr


@pytest.mark.parametrize("line", sorted(COMMANDS))
def test_the_commands_parse(line):
    words = shlex.split(line, comments=True)[1:]
    command = cli.COMMANDS.get(words[0], cli.rewrite)
    context = command.make_context("laurel-rewrite", words[words[0] in cli.COMMANDS :])
    assert isinstance(context, click.Context)


def test_the_explanation_is_what_the_command_prints():
    assert (ROOT / "tests" / "golden" / "explain_gpt.txt").read_text().strip() in (DOCS / "residuals.md").read_text()


def test_every_make_target_that_is_named_exists():
    makefile = (ROOT / "Makefile").read_text()
    texts = [path.read_text() for path in (README, ROOT / "CONTRIBUTING.md", ROOT / ".github" / "PULL_REQUEST_TEMPLATE.md")]
    targets = set(re.findall(r"(?:^|`)make ([\w-]+)", "\n".join(texts), re.M))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M)


def test_the_readme_leads_to_every_page():
    named = set(re.findall(r"\]\(docs/([\w-]+\.md)", README.read_text()))
    assert named == {page.name for page in PAGES[1:]} - {"index.md"}


@pytest.mark.engines
def test_the_first_five_minutes_work_to_the_letter(tmp_path):
    """In an empty folder: files are written, commands are run and what is shown of their output is in it, block after block."""
    folder, printed = tmp_path / "five", ""
    folder.mkdir()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for block in every_block(DOCS / "start.md"):
        if block.language == "python":
            (folder / block.test).write_text(block.text)
        elif block.language == "text":
            shown = [" ".join(line.split()) for line in block.text.splitlines() if line != "..."]
            assert [line for line in shown if line not in printed] == []
        elif not block.text.startswith("python3.11 -m venv"):  # the environment is this one
            done = subprocess.run(
                block.text, shell=True, cwd=folder, capture_output=True, text=True, check=False, env={**os.environ, "PATH": path}
            )
            assert done.returncode == 0, done.stderr
            printed = " ".join(done.stdout.split())
    assert (folder / "laurel_out" / "report.html").is_file()


def test_the_notebook_runs(tmp_path):
    """Its cells of code as one script: nothing in them needs Jupyter."""
    notebook = json.loads((ROOT / "tools" / "examples" / "rewrite_and_train.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in notebook["cells"])  # what it printed once is not kept
    (tmp_path / "notebook.py").write_text("\n".join(cells))
    done = subprocess.run([sys.executable, "notebook.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "onnxruntime computes the same\nLaurel False\n" in done.stdout


def test_the_page_of_examples_has_every_example():
    page = (DOCS / "examples.md").read_text()
    for path in (ROOT / "tools" / "examples").glob("*.*"):
        assert f"](../tools/examples/{path.name})" in page


def test_the_page_on_passes_has_each_pass_of_the_lowering():
    from laurel_rewrite import lowering

    assert re.findall(r"^\| `([a-z]+-[a-z]+)` \|", (DOCS / "own-pass.md").read_text(), re.M) == [*lowering._PASSES]


def test_the_citation_has_the_version():
    import laurel_rewrite

    assert f"\nversion: {laurel_rewrite.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_every_export_is_documented():
    import inspect

    import laurel_rewrite

    for name in laurel_rewrite.__all__:
        assert inspect.getdoc(getattr(laurel_rewrite, name)), name
