"""How Sphinx builds the site from the pages of the repository: `make docs`.

The source is the whole repository, so that links between pages are the same here and on the site. Two things are read
off the pages instead of being written twice: a page that lists others is a table of contents in the order of its links,
and a page of the API has the documentation of each name in its table.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from lightning_optim import __version__  # noqa: E402

project = "lightning-optim"
author = "The lightning-optim authors"
copyright = f"2026, {author}"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "docs.site.index_pages",
    "docs.site.api_pages",
    "docs.site.mathml",
]
root_doc = "docs/README"
include_patterns = [
    "docs/**.md",
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "examples/**.md",
    "benchmarks/results/cpu.md",
]
exclude_patterns = [".*", "build", "dist", "htmlcov", "lightning_logs", "logs", "lightning_optim", "callbacks", "tests"]

myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
default_role = "literal"  # docstrings quote code in single backticks
nitpicky = True
# Names of other packages, whose inventories would come over the network, and names of ours that are no part of the API.
nitpick_ignore_regex = [("py:.*", ".*")]

html_theme = "furo"
html_title = f"lightning-optim {release}"
html_static_path = ["site/static"]
html_css_files = ["site.css"]
html_extra_path = ["site/root"]
html_copy_source = False
html_use_index = False  # the pages of the API list all names
html_show_sphinx = False
copybutton_exclude = ".linenos, .gp, .go"
