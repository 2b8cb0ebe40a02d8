"""Each snippet of README, docs and examples, and each config in a docstring, runs as it stands.

A snippet that needs more than one machine without a GPU says so in its first line: `# needs: 4 GPUs`. It is parsed.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tomllib
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI

from lightning_optim.cli import main
from tests.harness.data import Data
from tests.harness.modules import Configured
from tests.harness.trainers import QUIET

ROOT = Path(__file__).parents[2]
WHOLE = ("start.md", "fsdp2.md")  # whose snippets belong together; test_start.py and test_fsdp2.py run them
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(set(ROOT.glob("docs/*.md")) - {ROOT / "docs" / name for name in WHOLE}),
    *sorted(ROOT.glob("examples/*/*.md")),
]
NOT_RUN = ("math", "text")


class Snippet(NamedTuple):
    page: str
    language: str
    text: str

    @property
    def needs(self) -> str:
        """What it needs beyond one machine without a GPU."""
        found = re.match(r"# needs: (.+)", self.text)
        return found[1] if found else ""


def fenced() -> list[Snippet]:
    return [
        Snippet(page.relative_to(ROOT).as_posix(), language, text)
        for page in PAGES
        for language, text in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    ]


def in_docstrings() -> list[Snippet]:
    """Configs, which doctest does not run."""
    found = []
    for file in sorted((ROOT / "callbacks").glob("*.py")):
        for indent, text in re.findall(
            r"^( *)\.\. code-block:: yaml\n\n(.*?)(?:\n\n|\n *\"\"\")", file.read_text(), re.DOTALL | re.MULTILINE
        ):
            lines = [line.removeprefix(f"{indent}    ") for line in text.splitlines()]
            found.append(Snippet(f"callbacks/{file.name}", "yaml", "\n".join(lines)))
    return found


def of(*languages: str) -> pytest.MarkDecorator:
    found = [snippet for snippet in [*fenced(), *in_docstrings()] if snippet.language in languages]
    assert found
    return pytest.mark.parametrize("snippet", found, ids=lambda s: f"{s.page}: {' '.join(s.text.split())[:40]}")


def test_no_snippet_is_left_out() -> None:
    languages = {snippet.language for snippet in fenced()} - set(NOT_RUN)
    assert languages == {"python", "yaml", "console", "bash"}
    assert len(in_docstrings()) == sum(
        file.read_text().count("code-block:: yaml") for file in (ROOT / "callbacks").glob("*.py")
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@of("python")
def test_python(snippet: Snippet, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_optim.config.recipes.REGISTERED", {})  # what a page registers is of that page
    code = compile(snippet.text, snippet.page, "exec")
    if not snippet.needs:
        exec(code, {"__name__": "snippet"})


@of("yaml")
@pytest.mark.filterwarnings("ignore")  # a training of one step is shorter than what they are for
def test_yaml(snippet: Snippet, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A config trains, with a module where it names one of the user's, and one of ours where it names none."""
    (folder / "my_project.py").write_text(
        "from torch.optim import SGD as MyOptimizer\nfrom tests.harness.modules import Configured as Classifier\n"
    )
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setitem(sys.modules, "my_project", None)
    monkeypatch.delitem(sys.modules, "my_project")  # that of another page; no trace is left of either
    (folder / "config.yaml").write_text(snippet.text)
    by_class = "class_path" in (yaml.safe_load(snippet.text).get("model") or {})
    kind: Any = LightningModule if by_class else Configured
    made = LightningCLI(
        kind,
        Data,
        run=False,
        args=["--config", "config.yaml", "--trainer.fast_dev_run=1", "--trainer.devices=1"],
        subclass_mode_model=by_class,
        trainer_defaults=QUIET,
        save_config_callback=None,
    )
    made.trainer.fit(made.model, made.datamodule)
    assert made.trainer.global_step == 1


@of("console", "bash")
@pytest.mark.filterwarnings("ignore")  # a logger beside fast_dev_run, workers of loaders
def test_commands(snippet: Snippet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    lines = [words for line in snippet.text.splitlines() if (words := shlex.split(line, comments=True))]
    assert lines
    for words in lines:
        run(words, snippet.needs)


def race(words: list[str]) -> None:
    """One step with one seed and learning rate."""
    short = ["--trainer.fast_dev_run=1", "--trainer.accelerator=cpu", "--seeds=1", "--grid=1", "--extend=0"]
    with tempfile.TemporaryDirectory() as folder, pytest.raises(SystemExit) as end:
        main([*words[1:], *short, f"--out={folder}"])
    assert not end.value.code


def run(words: list[str], needs: str) -> None:
    """Run a command where it is ours, with one step instead of its epochs; otherwise look at what it names."""
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = [extra for word in words for extra in re.findall(r"^\.\[(.*)\]$", word)]
        assert set(named) <= set(extras)
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2])
    elif words[:2] == ["fabric", "run"]:
        assert needs
        assert (ROOT / next(word for word in words if word.endswith(".py"))).exists()
    elif words[0] == "sbatch":
        assert needs
        subprocess.run(["bash", "-n", words[1]], cwd=ROOT, check=True)
    elif words[0] == "torchrun":
        assert needs
        run(words[words.index("--no-python") + 1 :], needs)
    else:
        assert words[0] == "lightning-optim"
        # test_digits.py resumes, and runs two processes; so does test_multi_gpu.py.
        elsewhere = needs or {"--ckpt_path", "ddp"} & set(words) or any("examples/multi_gpu/" in word for word in words)
        if words[1] == "compare":
            race(words)
            return
        more = ["--print_config"] if elsewhere else ["--trainer.fast_dev_run=1", "--trainer.accelerator=cpu"]
        looks = words[1] in ("memory", "optimizers")
        if looks or elsewhere:
            with pytest.raises(SystemExit) as end:
                main(words[1:] if looks else [*words[1:], *more])
            assert not end.value.code
        else:
            main([*words[1:], *more])
