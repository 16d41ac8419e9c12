"""Each error has its section on the page of troubleshooting, and the command names it."""

from __future__ import annotations

import ast
import inspect
import re

import pytest
from pages import ROOT

from laurel_rewrite import errors
from laurel_rewrite.app import cli
from laurel_rewrite.app.command_help import EPILOG
from laurel_rewrite.lab.candidates import NoLayerError

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.LaurelError)]


@pytest.mark.parametrize("kind", KINDS)
def test_each_error_has_a_section_with_what_its_class_says_of_it(kind):
    assert kind.section() in {heading.lower() for heading in re.findall(r"^## (\w+)$", PAGE, re.M)}
    assert f"## {kind.__name__}\n\n```{{error-class}} {kind.__name__}\n```\n\n" in PAGE


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_ends_with_the_section_and_the_exit_status_of_the_error(kind, monkeypatch, capsys):
    def fails(*_, **__):
        raise kind("It is so.")

    monkeypatch.setattr(cli.rewrite, "callback", fails)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["model.py"])
    assert stopped.value.code == kind.exit_code
    assert capsys.readouterr().err.endswith(f": It is so. (docs: troubleshooting#{kind.__name__.lower()})\n")
    assert str(kind.exit_code) in dict(EPILOG["Exit status"])


def test_an_error_from_elsewhere_has_the_section_of_its_base():
    assert NoLayerError.section() == "configerror"


def test_an_internal_error_has_a_section_too(monkeypatch, capsys):
    monkeypatch.setattr(cli.rewrite, "callback", lambda *_, **__: {}["nothing"])
    with pytest.raises(SystemExit) as stopped:
        cli.main(["model.py"])
    assert stopped.value.code == 70
    assert capsys.readouterr().err.endswith("(docs: troubleshooting#internal-error)\n")
    assert "\n## Internal error\n" in PAGE


def test_what_the_page_quotes_is_in_the_source_of_a_message():
    texts = []
    for path in [*(ROOT / "laurel_rewrite").rglob("*.py"), *(ROOT / "passes").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    rows = [row.split("|")[1] for row in PAGE.splitlines() if row.startswith('| "')]
    quoted = [quote for row in rows for quote in re.findall(r'"(.+?)"', row)]
    assert len(quoted) > 25
    assert [quote for quote in quoted if not any(re.search(re.escape(quote).replace(r"\.\.\.", ".*"), text) for text in texts)] == []
