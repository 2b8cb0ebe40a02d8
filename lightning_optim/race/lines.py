"""Values in one line of text."""

from __future__ import annotations

from typing import Any

import yaml


def in_yaml(value: Any) -> str:
    """A plain value as YAML in one line.

    Example:
        >>> in_yaml({"name": "lion", "lr": 0.1, "groups": [{"params": "bias"}]})
        '{name: lion, lr: 0.1, groups: [{params: bias}]}'
    """
    if value is None or isinstance(value, bool | int | float | str | dict | list | tuple):
        text: str = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, sort_keys=False, width=float("inf"))
        return text.removesuffix("\n").removesuffix("\n...")
    return str(value)


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # PyYAML has no types
    """Writes what has no form in YAML as its text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_multi_representer(object, lambda dumper, value: dumper.represent_str(str(value)))
_Dumper.add_representer(tuple, lambda dumper, value: dumper.represent_list(list(value)))
