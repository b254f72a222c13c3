"""Sphinx configuration: the guide, the API and the specification as one site."""

import importlib.metadata
import pathlib
import re
import shutil

from sphinx.application import Sphinx

HERE = pathlib.Path(__file__).parent

project = "qmoecodec"
author = "The qmoecodec developers"
copyright = "the qmoecodec developers"  # noqa: A001 - Sphinx reads this name
version = release = importlib.metadata.version("qmoecodec")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_click"]
html_theme = "furo"
html_title = f"qmoecodec {release}"
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 4
# The specification also points at files that are no pages (schema, vectors): links for readers of the repository.
suppress_warnings = ["myst.xref_missing"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_mock_imports = ["cupy"]  # there is no device where the site is built

# spec/ stands on its own beside docs/, with links and includes relative to itself. A copy inside the source
# directory keeps them working on the site too; it is ignored by git and made anew by every build.
shutil.rmtree(HERE / "spec", ignore_errors=True)
shutil.copytree(HERE.parent / "spec", HERE / "spec", ignore=shutil.ignore_patterns("__pycache__"))


def list_arrays(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Turn a docstring's block of `name : dtype[shape]  meaning` lines into a list, one item per line."""
    laid_out: list[str] = []
    in_block = False
    for line in lines:
        match = re.match(r"([a-z_][\w, *]*) : (\S+(?: \S+)*)(?: {2,}(.*))?$", line)
        continues = in_block and line.startswith("  ")
        if bool(match) != in_block and not continues:
            laid_out.append("")
            in_block = bool(match)
        if match:
            names, kind, meaning = match.groups(default="")
            laid_out.append(f"* ``{names}`` : ``{kind}`` {meaning}".rstrip())
        else:
            laid_out.append(f"  {line.strip()}" if continues else line)
    lines[:] = laid_out


def setup(app: Sphinx) -> None:
    """Register what is above."""
    app.connect("autodoc-process-docstring", list_arrays)
