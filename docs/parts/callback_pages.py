"""What pages of callbacks state as facts: options from the signature, cost from committed results, a table of all."""

from __future__ import annotations

import inspect
import json
import statistics

from docs.parts.facts import RESULTS
from docs.parts.markdown import table, yaml_value
from docs.parts.optimizer_pages import snake
from lightning_optim import callbacks
from lightning_optim.language.docstrings import arguments, sections

JOBS = {"digits": "digits, 10,026 parameters", "language": "language model, 10.2 M parameters"}


def names() -> list[str]:
    """The callbacks that the package exports."""
    return list(callbacks.__all__)


def parts(name: str) -> dict[str, str]:
    """The generated parts of a callback's page by the name of their markers."""
    return {f"options of {name}": options(name), f"cost of {name}": cost(name)}


def options(name: str) -> str:
    """The table of options: names and defaults from the signature, meanings from the docstring."""
    cls = getattr(callbacks, name)
    helps = arguments(cls.__doc__)
    given = [p for p in inspect.signature(cls).parameters.values() if p.name in helps]
    if not given:
        return "It has no options."
    rows = [
        [f"`{p.name}`", "required" if p.default is p.empty else f"`{yaml_value(p.default)}`", helps[p.name]]
        for p in given
    ]
    return table(["option", "default", "meaning"], rows)


def cost(name: str) -> str:
    """What it adds to a step, as far as it was measured."""
    return "\n\n".join(text for text in (hooks(name), looks(name)) if text) or "Its time has not been measured."


def hooks(name: str) -> str:
    """Milliseconds in hooks and in the optimizer's step, beside the same fit without the callback."""
    rows = []
    for file in ("trainer_overhead.json", "noise_and_stationarity_overhead.json"):
        fits = json.loads((RESULTS / file).read_text())["fits"]
        for job, title in JOBS.items():
            own = [fit for fit in fits if fit["job"] == job and fit["setting"] == f"ours AdamW + {name}"]
            bare = [fit for fit in fits if fit["job"] == job and fit["setting"] == "ours AdamW"]
            if own and bare:
                more = median(own, "update_ms") - median(bare, "update_ms")
                step = median(bare, "step_ms")
                rows.append([title, f"{step:.3g}", f"{median(own, 'hooks_ms'):.3f}", f"{more:+.2f}"])
    if not rows:
        return ""
    return "Measured in fits with AdamW on one thread, medians in ms ([speed](speed.md#in-a-trainer)):\n\n" + table(
        ["fit", "a step without it", "its hooks, each step", "the optimizer's step, more or less"], rows
    )


def median(fits: list[dict[str, float]], key: str) -> float:
    return statistics.median(fit[key] for fit in fits)


def looks(name: str) -> str:
    """What a look costs, in steps of training."""
    found = json.loads((RESULTS / "looks.json").read_text())
    rows = []
    for task, key in (("digits", "cost"), ("language model", "cost_on_language")):
        for setting, measured in found[key].items():
            if setting.split(",")[0] == name:
                rows.append(
                    [
                        f"{task}{setting.removeprefix(name)}",
                        f"{measured['steps_per_look']:.0f}",
                        f"{100 * measured['share_at_1000']:.1f} %",
                    ]
                )
    if not rows:
        return ""
    return "Measured on one thread (`python -m benchmarks.looks cost`):\n\n" + table(
        ["fit", "a look takes as long as so many steps", "share of the time with a look every 1000 steps"], rows
    )


def index() -> str:
    """The table of all callbacks, with the first sentence of each class."""
    rows = []
    for name in names():
        first = sections(getattr(callbacks, name).__doc__)[""].split("\n\n")[0].replace("\n", " ")
        rows.append([f"[`{name}`]({snake(name)}.md)", first])
    return table(["callback", "what it does"], rows)
