"""The tables and the picture of docs/schedules.md, from the classes of schedules."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from docs.parts.markdown import linked, table, yaml_value
from lightning_optim.config.schedule import KINDS, read
from lightning_optim.training.lengths import Length, Timeline
from lightning_optim.training.shapes import SHAPES, Shape, options_of

PICTURE = Path(__file__).parents[2] / "docs" / "pictures" / "schedules.svg"
TOTAL, EPOCHS = 400, 20  # of the picture
LOSSES = (1.0, 0.8, 0.7, *[0.65] * 7, 0.5, 0.45, *[0.44] * 8)  # that a plateau sees in it, one for each epoch


def overview() -> str:
    """What each schedule does, and a spec of each."""
    rows = [
        [f"[`{name}`](#{name})", linked(_about(shape)), "yes" if read(_spec(name)).needs_end() else "no"]  # type: ignore[union-attr]
        for name, shape in SHAPES.items()
    ]
    return table(
        [
            "schedule",
            "factor on the learning rate, after the warm-up",
            "needs the length of training, with its defaults",
        ],
        rows,
    )


def options() -> str:
    """A section for each schedule with its options."""
    parts = []
    for name, shape in SHAPES.items():
        rows = [
            [f"`{key}`", _default(key, option.default), _allowed(option.metadata["kind"]), option.metadata["about"]]
            for key, option in options_of(shape).items()
        ]
        spec = ", ".join(f"{key}: {yaml_value(value)}" for key, value in _spec(name).items())
        word = f"`schedule: {name}`" if name != "plateau" else f"`schedule: {{{spec}}}`"
        parts.append(f"### {name}\n\n{word}\n\n" + table(["option", "default", "allowed", "meaning"], rows))
    return "\n\n".join(parts)


def _about(shape: type[Shape]) -> str:
    return re.sub(r"\s+", " ", (shape.__doc__ or "").split("\n\n")[0].strip())


def _spec(name: str) -> dict[str, Any]:
    return {"name": name, **({"monitor": "val/loss"} if name == "plateau" else {})}


def _default(key: str, value: Any) -> str:
    if key == "monitor":
        return "required"
    values = value if isinstance(value, tuple) else [value]
    texts = [str(one) if isinstance(one, Length) else yaml_value(one) for one in values]
    return "`" + (f"[{', '.join(texts)}]" if isinstance(value, tuple) else texts[0]) + "`"


def _allowed(kind: str) -> str:
    return {"length": "a length", "duration": "a length above 0", "duration or null": "a length above 0, or null"}.get(
        kind, "a list of moments above 0" if kind == "milestones" else KINDS[kind][1].replace("'", "`")
    )


def factors(name: str, **options: Any) -> list[float]:
    """The factor at each step of a training of 400 steps in 20 epochs."""
    shape = read({**_spec(name), **options})
    assert shape is not None
    timeline = Timeline(lambda: TOTAL, lambda epochs: epochs * TOTAL / EPOCHS)
    found = [shape.at(step, timeline) for step in range(TOTAL)]
    return [factor * fall for factor, fall in zip(found, _plateau(shape), strict=True)] if name == "plateau" else found


def _plateau(shape: Any) -> list[float]:
    import torch

    from lightning_optim.config.scheduler import PlateauScheduler

    weight = torch.zeros(1, dtype=torch.float32, device="cpu", requires_grad=True)
    scheduler = PlateauScheduler(torch.optim.SGD([weight], lr=1.0), shape)
    found = []
    for loss in LOSSES:
        found += [scheduler.reduction] * (TOTAL // EPOCHS)
        scheduler.step(loss)
    return found


def draw() -> None:
    """Write the picture: each schedule by its word, and with a warm-up of a tenth of training."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams.update({"svg.hashsalt": "schedules", "svg.fonttype": "none"})
    changes: dict[str, dict[str, Any]] = {"plateau": {"patience": 3}}
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(3, 4, sharex=True, sharey=True).flatten()
    time = [step / TOTAL for step in range(TOTAL)]
    for axis, name in zip(axes, SHAPES, strict=False):
        options = changes.get(name, {})
        axis.plot(time, factors(name, **options), color="#2b6cb0", label="by its word")
        if name != "one_cycle":
            axis.plot(time, factors(name, warmup=0.1, **options), "--", color="#dd6b20", label="warmup: 0.1")
        axis.set_title(name, fontsize=11)
        axis.grid(alpha=0.3)
    axes[-1].axis("off")
    axes[-1].legend(*axes[0].get_legend_handles_labels(), loc="center", frameon=False)
    figure.supxlabel("fraction of training")
    figure.supylabel("factor on the learning rate")
    figure.savefig(PICTURE, metadata={"Date": None})
