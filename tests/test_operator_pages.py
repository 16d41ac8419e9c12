"""The pages of operators are made of the registry alone."""

from __future__ import annotations

import importlib.util

from pages import ROOT, blocks

from laurel_rewrite.operators import registry
from laurel_rewrite.operators.protocol import NEEDS, STARTS

_spec = importlib.util.spec_from_file_location("operator_pages", ROOT / "docs" / "operator_pages.py")
assert _spec is not None and _spec.loader is not None
made = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(made)


def test_each_operator_has_a_page_with_what_the_registry_knows():
    texts = made.pages()
    operators = {name: one for name, one in registry.operators().items() if one.connection.__module__.startswith(registry.__package__)}
    assert len(texts) == len(operators) + 1
    for name, operator in operators.items():
        page = texts[made.file_name(name)]
        assert operator.formula in page
        assert operator.paper in page
        assert all(f"`--{key.replace('_', '-')}`" in page for key in operator.options)
        assert f"]({made.file_name(name)})" in texts["index.md"]


def test_every_need_and_start_has_words():
    assert set(made.NEEDS) == set(NEEDS)
    assert set(made.WHEN) == set(STARTS)


def test_the_command_lines_of_pages_parse(tmp_path):
    from laurel_rewrite.app import cli

    made.write(tmp_path)
    for path in tmp_path.glob("*.md"):
        for text in blocks(path, "sh"):
            for line in text.splitlines():
                words = line.split()[1:]
                command = cli.COMMANDS.get(words[0], cli.rewrite)
                command.make_context("laurel-rewrite", words[words[0] in cli.COMMANDS :])


def test_pages_of_operators_that_are_gone_go(tmp_path):
    (tmp_path / "gone.md").write_text("# gone\n")
    made.write(tmp_path)
    assert not (tmp_path / "gone.md").exists()
