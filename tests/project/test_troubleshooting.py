"""Messages say what to do, or the page on troubleshooting does; and its entries are messages that there are."""

from __future__ import annotations

import re
from pathlib import Path

from docs.parts.messages import messages

PAGE = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text()
OURS = PAGE.split("## Of Lightning and torch")[0]
# What to do, what is allowed, what there is, or a question about the likely cause.
DO = "add install build call choose convert give keep leave let load lower make move name pass put raise remove return"
DO += " run save set split start take train tune turn use wait write"
STATE = (
    "must",
    "needs",
    "allowed is",
    "there are",
    "options are",
    "keys are",
    "at most",
    "at least",
    "goes on",
    "anew",
    "instead",
    "says more",
    "which is no",
    "left out",
    "and not ",
    "twice",
    "` lists",
    "?",
)
# The cause says it all.
CAUSES = ("have no elements", "have different numbers", "has a stage named", "is no list of them", "gives no batch")


def entries() -> list[str]:
    return re.findall(r"^### (.+)$", OURS, re.MULTILINE)


def pattern(entry: str) -> re.Pattern[str]:
    """An entry as it is searched for in a message: three dots are anything."""
    return re.compile(".*".join(re.escape(part.strip()) for part in entry.split("...")), re.DOTALL)


def helps(text: str) -> bool:
    """Whether it says what to do or what is allowed, or passes on what another says."""
    words = re.findall(r"[a-z]+", text.lower())
    told = any(word in words for word in DO.split()) or any(word in text.lower() for word in STATE)
    told = told or ". " in text.strip(". ") or len(words) > 7  # a cause, and what follows from it
    return told or text.rstrip(". ").endswith("…")


def test_every_entry_is_a_message() -> None:
    texts = [message.text for message in messages()]
    assert len(entries()) > 30
    assert [entry for entry in entries() if not any(map(pattern(entry).search, texts))] == []


def test_every_message_helps() -> None:
    """Where this fails: say in the message what to do, or write an entry, or add it to CAUSES."""
    known = [*map(pattern, entries()), *map(re.compile, CAUSES)]
    lost = [message for message in messages() if not helps(message.text)]
    assert [message for message in lost if not any(one.search(message.text) for one in known)] == []
