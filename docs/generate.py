"""Write the parts of README.md and docs/ that are read off the classes: `python docs/generate.py`."""

from __future__ import annotations

import re
from pathlib import Path

from lightning_optim.catalog import markdown

ROOT = Path(__file__).parent.parent
PART = re.compile(r"(<!-- optimizers: [^\n]*-->\n).*?(<!-- end of optimizers -->\n)", re.DOTALL)


def readme(text: str) -> str:
    """The README with the tables of optimizers and recipes as they are now."""
    return PART.sub(lambda match: match[1] + "\n" + markdown() + "\n" + match[2], text)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(readme(path.read_text()))
