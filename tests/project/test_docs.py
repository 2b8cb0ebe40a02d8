"""The examples on the pages of callbacks run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI

DOCS = Path(__file__).parent.parent.parent / "docs"


@pytest.mark.parametrize("page", ["gradient_noise", "iterate_averaging", "lookahead_sync"])
def test_python_and_yaml_say_the_same(page: str, tmp_path: Path) -> None:
    text = (DOCS / f"{page}.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    scope: dict[str, Any] = {}
    exec(code, scope)
    (yaml,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    config = tmp_path / "config.yaml"
    config.write_text(yaml)
    cli = LightningCLI(LightningModule, run=False, args=["--config", str(config)], seed_everything_default=False)
    mine = scope["trainer"].callbacks[0]
    theirs = next(callback for callback in cli.trainer.callbacks if type(callback) is type(mine))  # type: ignore[attr-defined]
    options = {name: value for name, value in vars(mine).items() if not name.startswith("_")}
    assert options == {name: vars(theirs)[name] for name in options}
