"""Loads a state_dict: torch's own `load_state_dict` between a check, after which nothing fails, and the conversion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_optim.core import checkpoint_source, frozen, muon_files, peer_files, state_check, torch_files
from lightning_optim.core import state_dict as checkpoint
from lightning_optim.core.checkpoint_source import Source
from lightning_optim.core.state_layout import StateLayout
from lightning_optim.core.torch_files import Lent


def into(layout: StateLayout, state_dict: Any, load: Callable[[dict[str, Any]], None], lent: Lent) -> None:
    """Load a state_dict into an optimizer, or change nothing of it.

    Args:
        layout: The optimizer.
        state_dict: The state_dict.
        load: `torch.optim.Optimizer.load_state_dict` of the optimizer, which runs hooks and replaces its groups.
        lent: The tensors that the last `state_dict` has returned for FSDP2 to fill.

    Raises:
        OptionError: for a state_dict that does not fit.
    """
    if isinstance(state_dict, list | tuple):
        state_dict = muon_files.joined(layout, state_dict)
    before: list[dict[str, Any]] = []
    state, groups, waiting = layout.state, layout.param_groups, layout.waiting
    members = [group["params"] for group in groups]
    found: dict[str, Any] = {}
    source = Source(is_own=True)

    def prepare(_: Any, given: dict[str, Any]) -> dict[str, Any]:
        nonlocal source
        found.update(given)
        state_check.check_form(type(layout).__name__, given)
        frozen.drop_groups_not_in(layout, given["param_groups"])
        given = frozen.in_order_of(layout, given)
        frozen.join_as_in(layout, given["param_groups"])
        before[:] = [{k: v for k, v in group.items() if k != "params"} for group in layout.param_groups]
        given = peer_files.translated(layout, given)
        other = checkpoint_source.other_class(layout, given)
        is_own = any("state_bits" in group for group in given["param_groups"])
        regrouped = torch_files.regrouped(layout, given)
        scheduled = any("initial_lr" in group for group in before)
        source = Source(is_own, other, regrouped is not given, scheduled)
        given = regrouped
        if other:
            given = checkpoint_source.without_misfits(layout, torch_files.with_options_of(layout, given), other)
        given = torch_files.without_lent(given, lent)
        given = state_check.check(layout, given, partial=bool(other or layout.has_slots_of_matrices))
        found.update(given)
        numbers = {index for group in given["param_groups"] for index in group["params"]}
        # Without the state of parameters: torch would cast all of it to their dtypes.
        return {**given, "state": {key: value for key, value in given["state"].items() if key not in numbers}}

    # After hooks that change what is loaded, before hooks that read the result.
    hooks = (
        layout.register_load_state_dict_pre_hook(prepare),
        layout.register_load_state_dict_post_hook(
            lambda _: checkpoint.adopt(layout, found, before, source), prepend=True
        ),
    )
    try:
        load(state_dict)
    except BaseException:
        layout.state, layout.param_groups = state, groups  # torch replaces both and changes neither
        frozen.undo(layout, waiting, members)
        raise
    finally:
        for hook in hooks:
            hook.remove()
