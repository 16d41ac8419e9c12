"""The site: `make docs` builds these pages, one page an operator, and the interface from docstrings, into docs/_build."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import operator_pages  # noqa: E402  # beside this file

import laurel_rewrite  # noqa: E402
from laurel_rewrite import errors  # noqa: E402

project = "laurel-rewrite"
author = copyright = "The laurel-rewrite authors"
version = release = laurel_rewrite.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
smartquotes_action = "D"  # dashes; what a message says is quoted as it is
default_role = "code"  # docstrings have `names` as in Markdown
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_custom_sections = [("Class data", "params_style")]
html_theme = "furo"
pygments_dark_style = "monokai"  # furo's own underlines names of classes, as if they were links
html_title = project
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False

_UPWARD = re.compile(r"\[([^\]]*)\]\((\.\./[^)#]*)[^)]*\)")


class ErrorClass(SphinxDirective):
    """What a class of `laurel_rewrite.errors` says of itself: `{error-class} ConfigError`."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        kind = getattr(errors, self.arguments[0])
        text, _ = self.parse_inline(f"{(inspect.getdoc(kind) or '').partition('Attributes:')[0].strip()} Exit status {kind.exit_code}.")
        return [nodes.paragraph("", "", *text)]


def name_files_outside(app: Sphinx, page: str, source: list[str]) -> None:
    """Links to what lies in the repository and not on the site become the names of the files, which must exist."""

    def named(link: re.Match[str]) -> str:
        text, path = link.groups()
        file = (HERE / page).parent.joinpath(path).resolve()
        if not file.exists():
            logging.getLogger(__name__).warning("there is no %s", path, location=page)
        return link[0] if file.is_relative_to(HERE) else f"{text} (`{file.relative_to(HERE.parent)}`)"

    source[0] = _UPWARD.sub(named, source[0])


def setup(app: Sphinx) -> None:
    app.add_directive("error-class", ErrorClass)
    app.connect("builder-inited", lambda app: operator_pages.write(HERE / "operators"))
    app.connect("source-read", name_files_outside)
