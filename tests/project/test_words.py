"""Words that were replaced (the glossary of ARCHITECTURE.md) do not return to the package or to its pages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    "ARCHITECTURE.md",
    "docs/*.md",
    "callbacks/*.py",
    "lightning_optim/**/*.py",
    "lightning_optim/**/*.h",
)

# A pattern that has no use, and the word to write instead.
REPLACED = {
    r"\bPiece\b|\b[Pp]iece_of|\bpieces? of (a|the|its) (tensor|parameter|slot)|\bpiece by piece\b": "shard, or chunk",
    r"\blocal part\b|\b(their|its) parts? of (a|the) tensor\b": "shard, or local parameter",
    r"\bclass Rows?\b|\bRows?[(.\[]|\brow_of\(|\brows_of\b": "local parameter, batch",
    r"\bJobs?\b|\bjobs\b": "step, or batch",
    r"\brosters?\b": "batches",
    r"\bguests?\b": "stage",
    r"\bGrouping\b|\bGroup\b|\b_Plan\b": "plan, launch",
    r"\bLayout\b|\bColumn\b|\b_kinds_of_": "signature",
    r"\bsites?\b": "global index",
    r"\bthe places? of (an?|the|its|each) elements?\b|\bplace(\[|:)": "global index, or index",
    r"\bhow manieth\b": "number i of",
    r"\bbooks?\b": "codebook",
    r"(?<!C\+\+ )\bheaders\b": "scales",
    r"\bkept in codes\b|\bcoded (slots?|state|values?|moments?)\b": "quantized",
    r"\b(un)?codable\b": "quantized",
    r"\b(torch|slots|storage|format|form|values|state|tensor)\.(de|en)code\(": "quantize, dequantize",
    r"\bdraws? of (rounding|noise)\b|\brounding draws?\b|\bdraws\b": "random bits, normal numbers",
    r"\bclocks?\b": "step counter",
    r"\brehearsals?\b": "dry run",
    r"\bfused (parameters?|tensors?|shards?|buffers?)\b|\bis_fused\b|\bFused\b": "flat parameter",
    r"\beveryone\b": "all ranks, or all parameters",
    r"\.formula\(p\b|\bprogram\.formula\b|\bformula: Update\b": "update",
    r"\bengines\.known\b": "engines.check_name",
    r"\bhold_for\b|\bknown = _|\bknown\[": "cache",
    r"\bis told (of|about|in)\b": "a plain verb: has, receives, reads",
    r"\bthat go by addresses\b|\bgoes by\b": "uses",
    r"\bis of use\b|\bof no use\b": "useful",
    r"\bwhere the tensors are\b": "on the device of the tensors",
}

# Lines that may keep such a word: a part of the path, and a part of the line.
ALLOWED = (
    ("docs/README.md", "build/site"),
    ("core/aliasing.py", "in both places"),
    ("training/second_moment.py", "is taken for"),
)


def files() -> Iterator[Path]:
    return (path for pattern in PAGES for path in sorted(ROOT.glob(pattern)) if path.is_file())


def found(text: str, name: str = "") -> list[str]:
    """What to replace in a text, with the line and the word to write instead."""
    places = []
    for number, line in enumerate(text.splitlines(), 1):
        if any(path in name and words in line for path, words in ALLOWED):
            continue
        for pattern, word in REPLACED.items():
            if match := re.search(pattern, line):
                places.append(f"{name}:{number}: {match[0]!r}: write {word}")
    return places


def test_replaced_words_do_not_return() -> None:
    assert [line for path in files() for line in found(path.read_text(), path.relative_to(ROOT).as_posix())] == []


@pytest.mark.parametrize(
    "old",
    [
        "the reductions of a level, each with its place: the how manieth of its kind it is",
        "books = {form.codebook.name: form.codebook for form in kernel.formats}",
        "Programs differ between jobs, so places tell which belong together",
        "new = self.batch.program.formula(param, grad, s, h)",
        "engine = engines.known(options.pop('engine'))",
        "sites: Which elements of which tensor each parameter holds here.",
        "self.everyone = [*self.params, *idle]",
        "    for asked in draws: ...",
        "codes and headers of a block",
        "the fused parameters of FSDP1",
        "refuse state on another device: engines that go by addresses",
    ],
)
def test_an_old_line_is_found(old: str) -> None:
    assert found(old)


@pytest.mark.parametrize(
    "line",
    [
        "torch's fused AdamW, AdamW(fused=True) and its fused kernels",
        "tables of codebooks; C++ headers; update parameters in place",
        "the row means of a matrix, and a placement of DTensor",
    ],
)
def test_a_line_in_the_words_of_now_passes(line: str) -> None:
    assert not found(line)
