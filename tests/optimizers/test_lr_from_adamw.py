"""`lr_from_adamw` of each page is what its advice and docs/from_adamw.md say in words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lightning_optim.core.optimizer import OPTIMIZERS

ROOT = Path(__file__).parents[2]
SGD = OPTIMIZERS["sgd"].lr_from_adamw or 0.0
WORDS = {
    "all of it": 1.0,
    "a third": 1 / 3,
    "a fifth": 0.2,
    "a tenth": 0.1,
    "twice": 2.0,
    "three times": 3.0,
    "3 times": 3.0,
}
SAME = r"(Keep|the same|AdamW's rate in long|Take) ?(AdamW's)? learning rate|AdamW's learning rate transfers"


def span(text: str) -> tuple[float, float] | None:
    """The lowest and highest ratio that a sentence on learning rates names."""
    text = re.sub(r"(,| and) [^,;]*weight decay.*", "", text.partition(";")[0])
    found = [(float(a), float(b)) for a, b in re.findall(r"(\d+) to (\d+) times", text)]
    named = [ratio for word, ratio in WORDS.items() if word in text and not found]
    if re.search(SAME, text):
        named.append(1.0)
    values = [*named, *(x for pair in found for x in pair)]
    if re.search(r"[Uu]p to (twice|3 times)", text):
        values.append(1.0)
    scale = SGD if "SGD" in text.partition("From AdamW")[0] and "From AdamW" not in text else 1.0
    return (scale * min(values), scale * max(values)) if values else None


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_the_ratio_lies_within_the_advice(name: str) -> None:
    page = OPTIMIZERS[name]
    assert any("lr_from_adamw" in vars(cls) for cls in page.__mro__[:2]), "it says none of its own"
    alone = re.search(r"does not carry over|Keep lr at 1", page.advice)
    assert (page.lr_from_adamw is None) == bool(alone)
    bounds = span(page.advice)
    if bounds and page.lr_from_adamw is not None:
        assert bounds[0] * 0.999 <= page.lr_from_adamw <= bounds[1] * 1.001, page.advice


def test_the_ratio_lies_within_the_table_for_users_of_adamw() -> None:
    page = (ROOT / "docs" / "from_adamw.md").read_text()
    rows = re.findall(r"^\| AdamW[^|]*\| (`[^|]*`) \| ([^|]*) \|", page, re.MULTILINE)
    checked = 0
    for names, text in rows:
        bounds = span(text)
        for name in re.findall(r"`(\w+)`", names):
            ratio = OPTIMIZERS[name].lr_from_adamw
            if bounds and ratio is not None:
                assert bounds[0] * 0.999 <= ratio <= bounds[1] * 1.001, (name, text)
                checked += 1
    assert checked >= 9
