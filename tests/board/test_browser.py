"""The log of the demo in a real TensorBoard, as a person sees it in a browser."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from lightning_optim.cli import main
from tests.harness.browser import MISSING, Page, browser, tensorboard

DEMO = Path(__file__).parents[2] / "examples/digits/adan.yaml"


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
@pytest.mark.timeout(600)  # on a busy machine a browser takes its time
def test_the_demo_as_a_person_sees_it(tmp_path: Path) -> None:
    """With fewer epochs and a schedule, and once more with another optimizer."""
    short = ["--trainer.max_epochs=4", f"--trainer.logger.init_args.save_dir={tmp_path}"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a run warns of is tested with the command
        for options in (["--model.optimizer.schedule=cosine"], ["--model.optimizer=lamb"]):
            main(["fit", f"--config={DEMO}", "--trainer.enable_progress_bar=false", *short, *options])
    with tensorboard(tmp_path) as address, browser(address) as page:
        sees_what_matters_first(page)
        sees_settings_beside_results(page)
        sees_memory_in_one_picture(page)


def position(text: list[str], *pieces: str) -> int:
    """Where these pieces follow each other."""
    return next(i for i in range(len(text)) if text[i : i + len(pieces)] == list(pieces))


def sees_what_matters_first(page: Page) -> None:
    """The first group is open: loss, the accuracy of both weights in one chart, the rate with its schedule's name."""
    page.open("#timeseries")
    text = page.wait(
        lambda text: "digits/version_0/raw" in text[text.index("Overview") :] if "Overview" in text else False
    )
    groups = ["Overview", "iterate_averaging", "learning_rate", "optimizer_state", "test", "train", "val"]
    places = [text.index(group) for group in groups]
    assert places == sorted(places)
    assert text[text.index("Pinned") + 2] == "Overview"
    charts = [("Overview/lr", "/cosine"), ("Overview/train", "/loss"), ("Overview/val", "/accuracy")]
    first = [position(text, *chart) for chart in charts]
    assert all(places[0] < place < places[1] for place in first)
    beside = text[first[2] : position(text, "Overview/val", "/loss")]
    assert {"digits/version_0", "digits/version_0/raw"} <= set(beside)
    assert text[text.index("optimizer_state") + 1] == "5 cards"  # three numbers, and a picture of each run
    assert "epoch" not in text
    assert "hp_metric" not in text


def sees_settings_beside_results(page: Page) -> None:
    """A row for each run, in plain words."""
    page.open("#hparams")
    text = page.wait(lambda text: "adan" in text and "lamb" in text)
    columns = text[text.index("Trial ID") : text.index("digits/version_0")]
    for name in ("optimizer", "lr", "schedule", "weight_decay", "state_bits", "val/accuracy", "test/accuracy"):
        assert name in columns, name
    rows = {
        run: text[text.index(run) : text.index(run) + len(columns) - 1]
        for run in ("digits/version_0", "digits/version_1")
    }
    assert {"adan", "cosine", "0.0010000"} <= set(rows["digits/version_0"])
    assert {"lamb", "constant"} <= set(rows["digits/version_1"])
    assert "hp_metric" not in text
    assert "_instantiator" not in text


def sees_memory_in_one_picture(page: Page) -> None:
    """Of each run."""
    page.open("#images")
    text = page.wait(lambda text: "optimizer_state/bars" in text)
    assert [piece for piece in text if piece.startswith("optimizer_state/")].count("optimizer_state/bars") >= 2
    assert not [piece for piece in text if piece.startswith("optimizer_state/") and piece != "optimizer_state/bars"]
