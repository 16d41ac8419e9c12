"""The table of versions: its facts come from pyproject.toml, and what did not run is said."""

from __future__ import annotations

import re

import pytest
from packaging.version import Version

from tools import matrix

JUNIT = """<testsuites><testsuite tests="4" failures="1" errors="1" skipped="1" time="2.5">
<testcase classname="tests.test_fx" name="test_one" /><testcase classname="tests.test_fx" name="test_two"><failure message="no" /></testcase>
<testcase classname="tests.test_fx" name="test_three"><error message="no" /></testcase>
<testcase classname="tests.test_fx" name="test_four"><skipped message="no" /></testcase></testsuite></testsuites>"""


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, "ROWS", tmp_path)
    return tmp_path


def test_every_bound_is_in_the_lowest_versions():
    pins = dict(pin.split("==") for pin in matrix.lowest())
    assert {"torch", "onnx", "onnxruntime", "transformers", "numpy", "pytest", "accelerate", "onnx2torch"} <= pins.keys()
    assert not {"laurel-rewrite", "ruff"} & pins.keys()
    text = (matrix.REPOSITORY / "pyproject.toml").read_text()
    assert all(f'"{name}>={version}' in text for name, version in pins.items())


def test_what_is_tested_lies_within_the_bounds():
    """The pins of constraints.txt, and the newest that are named."""
    pins = dict(re.findall(r"^([\w.-]+)==([\w.]+)$", (matrix.REPOSITORY / "constraints.txt").read_text(), re.MULTILINE))
    pins = {name.lower(): version for name, version in pins.items()}
    low = dict(pin.split("==") for pin in matrix.lowest())
    assert not [name for name, version in low.items() if Version(pins[name.lower()]) < Version(version)]
    assert not [pin for pin in matrix.newest() if Version(pin.split("==")[1]) < Version(low[pin.split("==")[0]])]


def test_a_requirement_without_a_lower_bound_is_refused():
    data = {"project": {"name": "us", "dependencies": ["torch<3"], "optional-dependencies": {"zoo": [], "test": []}}}
    with pytest.raises(ValueError, match="torch has no lower bound"):
        matrix.lowest(data)


def test_the_table_says_what_failed_and_what_did_not_run(rows, monkeypatch):
    monkeypatch.setattr(matrix, "pythons", lambda: ["3.11", "3.12"])
    (rows / "lowest-3.11.xml").write_text(JUNIT)
    matrix.keep("lowest-3.11", "lowest", "3.11", 9.0)
    matrix.keep("newest-3.11", "newest", "3.11", 1.0)
    assert matrix.failed("lowest-3.11") == ["test_fx::test_three", "test_fx::test_two"]
    assert matrix.failed("newest-3.11") == ["the tests did not run"]
    text = matrix.text(matrix.rows(), ["3.13"], "a machine")
    assert "| passed | 1 | did not run |" in text
    assert "| failed | 2 | did not run |" in text
    assert "* lowest, Python 3.11: `test_fx::test_two`" in text
    assert "* Python 3.13: no `python3.13` that starts on this machine." in text
    assert "newest on Python 3.11: its tests did not run" in text
    assert "lowest on Python 3.12: its tests did not run" in text
    assert "lowest on Python 3.11: its tests" not in text


def test_versions_are_those_of_this_environment():
    import torch

    found = matrix.versions()
    assert found["torch"] == torch.__version__
    assert found["onnx"] != "-"


def test_quick_tests_are_there():
    assert all((matrix.REPOSITORY / path).is_file() for path in matrix.QUICK)
