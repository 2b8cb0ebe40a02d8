"""Pages of the API: a table of the public names of a module. On the site the docstring of each name follows."""

from __future__ import annotations

import importlib
import inspect

from docs.parts.markdown import table
from docs.parts.optimizer_pages import join
from lightning_optim.core.optimizer import OPTIMIZERS
from lightning_optim.language.docstrings import sections

MODULES = {
    "lightning_optim": (
        "The package",
        "Optimizers take parameters and options, as those of `torch.optim` do. Each has [a page](../optimizers.md) "
        "with formula, advice and cost.",
    ),
    "lightning_optim.callbacks": ("Callbacks", "What each does, when and at what cost: [callbacks](../callbacks.md)."),
    "lightning_optim.analysis": (
        "Functions of a loss and its parameters",
        "They need no Trainer: a closure that computes the loss, and parameters. Pages with pictures: "
        "[curvature](../curvature.md), [the Hessian's diagonal](../local_geometry.md), "
        "[the noise scale](../gradient_noise_scale.md), [stationarity](../stationarity.md), "
        "[rules between batch sizes](../curvature_schedule.md).",
    ),
    "lightning_optim.nn": (
        "Modules",
        "More in [StableEmbedding](../stable_embedding.md) and [TransformerBlock](../pre_and_post_norm.md).",
    ),
}


def file_name(module: str) -> str:
    return module.rpartition(".")[2] + ".md"


def page(module: str) -> str:
    """The page of a module. Optimizers come after what is used with all of them."""
    title, about = MODULES[module]
    loaded = importlib.import_module(module)
    of_optimizers = {cls.__name__ for cls in OPTIMIZERS.values()}
    tables = [[name for name in loaded.__all__ if (name in of_optimizers) == chosen] for chosen in (False, True)]
    filled = [
        table(["name", "what it is"], [[f"`{name}`", first_sentence(loaded, name)] for name in names])
        for names in tables
        if names
    ]
    marks = f"<!-- written by `make docs` from docstrings -->\n<!-- api: {module} -->"
    return join(f"# {title}: `{module}`", marks, about, *filled)


def first_sentence(module: object, name: str) -> str:
    thing = getattr(module, name)
    if not (inspect.isclass(thing) or inspect.isroutine(thing)):
        return "What `optimizer` may be: a word, a mapping with `name` and options, or an `OptimizerStrategy`."
    return " ".join(sections(inspect.getdoc(thing))[""].split("\n\n")[0].split())
