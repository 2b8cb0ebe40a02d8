"""A page with the comment `<!-- contents -->` is a table of contents: of the pages that it links to, in this order.

The links stand in tables and sentences that read well by themselves. On the first page each heading with links is a
caption of the menu. Other such pages list a folder alone: optimizers.md that of the optimizers, a README.md its own.
"""

from __future__ import annotations

import posixpath
import re

from sphinx.application import Sphinx

MARK = "<!-- contents -->"
ROOT = "docs/README"
LINK = re.compile(r"\]\(([^)#:]+)\.md\)")


def contents(docname: str, text: str, seen: set[str]) -> str:
    """The page with a hidden toctree at the end of each section that links to pages not yet seen."""
    parts = re.split(r"(?m)^(?=## )", text)
    for i, part in enumerate(parts):
        folder = posixpath.dirname(docname)
        targets = [posixpath.normpath(posixpath.join(folder, link)) for link in LINK.findall(part)]
        new = [target for target in dict.fromkeys(targets) if target not in seen and target != docname]
        new = [target for target in new if docname == ROOT or target.startswith(f"{docname.removesuffix('/README')}/")]
        seen.update(new)
        if new:
            caption = re.match(r"## (.*)", part)
            options = [":hidden:", *([f":caption: {caption[1]}"] if caption and docname == ROOT else [])]
            lines = [*options, "", *(f"/{target}" for target in new)]
            parts[i] = part.rstrip("\n") + "\n\n```{toctree}\n" + "\n".join(lines) + "\n```\n\n"
    return "".join(parts)


def read(app: Sphinx, docname: str, source: list[str]) -> None:
    if MARK in source[0]:
        source[0] = contents(docname, source[0], set())


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
