"""Specs of optimizers that are wrong, and what is said of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

CYCLE: list[Any] = []
CYCLE.append(CYCLE)
HUGE = 10**5000  # Python does not print it


class Unprintable:
    def __repr__(self) -> str:
        raise ValueError


BAD: list[tuple[Any, str]] = [
    ("adam2", r"There is no optimizer named 'adam2'. Did you mean adam.*\? There are acprop, .*sgdw"),
    ("lamp", r"no optimizer named 'lamp'. Did you mean lamb"),
    ("Adan", r"no optimizer named 'Adan'. Did you mean adan\?"),
    ("KoalaV", r"no optimizer named 'KoalaV'. Did you mean koala_v\?"),
    ({"lr": 0.1}, r"optimizer=\{'lr': 0.1\} has no 'name'. Write a word, such as adan, or a mapping"),
    ({"name": ["adan"]}, r"no optimizer named \['adan'\]"),
    (5, r"optimizer=5 must be a word, such as adan, or a mapping, such as \{name: adan, lr: 0.002\}"),
    (
        {"name": "adan", "lrr": 0.1},
        r"optimizer 'adan' has no option 'lrr'. Did you mean lr\? Its options are lr, betas",
    ),
    ({"name": "adan", "no_decays": []}, r"no option 'no_decays'. Did you mean no_decay.*groups, .*schedule"),
    ({"name": "lion", "foreach": True}, r"no option 'foreach' \(engine='auto' already runs a whole group"),
    ({"name": "adan", "lr": "fast"}, r"optimizer 'adan': lr='fast' must be a number"),
    ({"name": "adan", "lr": True}, r"optimizer 'adan': lr=True must be a number"),
    ({"name": "adan", "betas": 0.9}, r"betas=0.9 must be a list of 3 numbers"),
    ({"name": "adan", "betas": [0.9, 0.99]}, r"betas=\[0.9, 0.99\] must be a list of 3 numbers"),
    ({"name": "adan", "no_prox": 1}, r"no_prox=1 must be true or false"),
    ({"name": "koala_v", "r": "auto"}, r"r='auto' must be a number or null"),
    ({"name": "adan", "lr": -0.1}, r"lr=-0.1 is out of range; allowed is >= 0"),
    ({"name": "adan", "lr": float("nan")}, r"lr=nan is out of range; allowed is >= 0"),
    ({"name": "adamw", "betas": [0.9, 1.0]}, r"betas=\(0.9, 1.0\) is out of range; allowed is \[0, 1\) for each item"),
    ({"name": "adamw", "eps": -1e-8}, r"eps=-1e-08 is out of range; allowed is >= 0"),
    ({"name": "adamw", "weight_decay": -1}, r"weight_decay=-1.0 is out of range; allowed is >= 0"),
    ({"name": "adan", "state_bits": 7}, r"state_bits=7 must be one of 32, "),
    ({"name": "adan", "state_bits": "8"}, r"state_bits='8' must be one of 32, "),
    ({"name": "adan", "engine": "warp"}, r"engine 'warp'|engine='warp'"),
    (
        {"name": "adan", "no_decay": "bias"},
        r"no_decay='bias' must be a list of roles \(bias, norm, embedding\) or name",
    ),
    ({"name": "adan", "no_decay": 1}, r"no_decay=1 must be a list of roles"),
    ({"name": "adan", "groups": [{"lr": 0.1}]}, r"groups: \{'lr': 0.1\} needs 'params', a role or a pattern of names"),
    ({"name": "adan", "groups": {"params": "net.*", "lr": 0.1}}, r"groups=\{.*\} must be a list of mappings"),
    ({"name": "adan", "groups": ["net.*"]}, r"groups: 'net.\*' needs 'params'"),
    (
        {"name": "adan", "groups": [{"params": "net.*", "lrr": 0.1}]},
        r"group 'net.\*' has no option 'lrr'. Did you mean lr",
    ),
    (
        {"name": "adan", "groups": [{"params": "bias", "betas": [1, 1, 1]}]},
        r"group 'bias': betas=\(1.0, 1.0, 1.0\) is out of range",
    ),
    (
        {"name": "adan", "schedule": "cosinus"},
        r"schedule 'cosinus' is not one of constant, .*, plateau. Did you mean cos",
    ),
    ({"name": "adan", "schedule": {"name": "linear", "warm_up": 5}}, r"no option 'warm_up'. Did you mean warmup"),
    (
        {"name": "adan", "schedule": {"name": "linear", "warmup_steps": -5}},
        r"schedule: warmup_steps=-5 must be an integer of at least 0",
    ),
    (
        {"name": "adan", "schedule": {"name": "linear", "warmup_steps": "some"}},
        r"schedule: warmup_steps='some' must be an integer of at least 0",
    ),
    ({"name": "adan", "schedule": {"name": "linear", "final": "low"}}, r"schedule: final='low' must be a number"),
    (
        {"name": "adan", "schedule": 5},
        r"schedule=5 must be one of constant, linear, cosine, .*, plateau, or a mapping",
    ),
    # words that belong elsewhere
    ({"name": "adan", "gradient_clip_val": 1.0}, r"no option 'gradient_clip_val': it is an option of the Trainer"),
    ({"name": "adan", "warmup_steps": 10}, r"no option 'warmup_steps': it belongs to the schedule, such as"),
    ({"name": "adan", "lr_scheduler": "cosine"}, r"no option 'lr_scheduler': write it as schedule"),
    ({"name": "adan", "callbacks": []}, r"no option 'callbacks': list them in the Trainer"),
]

# What Python, NumPy or torch would have words of their own for, and no YAML can say.
FOREIGN: list[tuple[Any, str]] = [
    ({"name": "adan", "self": 1}, r"no option 'self'"),
    ({"name": "adan", "params": []}, r"no option 'params'"),
    ({"name": "adan", 1: 2, None: 3}, r"no option '1'"),
    ({"name": "adan", "lr": 10**400}, r"lr=1000+\.\.\. must be a number"),
    ({"name": "adan", "lr": HUGE}, r"lr=an int must be a number"),
    ({"name": "adafactor", "min_dim_size_to_factor": HUGE}, r"min_dim_size_to_factor=an int is out of range"),
    ({"name": "adan", "lr": None}, r"lr=None must be a number"),
    ({"name": "adan", "lr": torch.ones(2)}, r"lr=tensor\(\[1., 1.\]\) must be a number"),
    ({"name": "adan", "lr": torch.tensor(1j)}, r"lr=tensor\(0.\+1.j\) must be a number"),
    ({"name": "adan", "lr": torch.ones((), device="meta")}, r"lr=tensor\(..., device='meta', size=\(\)\) must be a"),
    ({"name": "adan", "lr": np.ones(2)}, r"lr=array\(\[1., 1.\]\) must be a number"),
    ({"name": "adan", "state_bits": np.array([8, 8])}, r"state_bits=array\(\[8, 8\]\) must be one of"),
    ({"name": "adan", "lr": Unprintable()}, r"lr=an? Unprintable must be a number"),
    ({"name": Unprintable()}, r"no optimizer named an? Unprintable"),
    (Unprintable(), r"optimizer=an? Unprintable must be a word"),
    (CYCLE, r"optimizer=\[\[...\]\] must be a word"),
    ({"name": "adan", "groups": CYCLE}, r"groups: \[\[...\]\] needs 'params'"),
    ({"name": "adan", "groups": torch.ones(2)}, r"groups: tensor\(1.\) needs 'params'"),
    ({"name": "adan", "groups": [{"params": [], "lr": 1.0}]}, r"needs 'params', .* or a list of them"),
    ({"name": "adan", "groups": [{"params": ["bias", 1], "lr": 1.0}]}, r"needs 'params', .* or a list of them"),
    ({"name": "adan", "groups": [{"params": "bias", "name": 1}]}, r"groups: name=1 must be a string"),
    ({"name": "adan", "groups": [{"params": "bias", "engine": "auto"}]}, r"group 'bias': engine is one for all groups"),
    ({"name": "adan", "no_decay": CYCLE}, r"no_decay=\[\[...\]\] must be a list of roles"),
    ({"name": "adan", "no_decay": np.ones(2)}, r"no_decay=array\(\[1., 1.\]\) must be a list of roles"),
    ({"name": "adan", "schedule": {}}, r"schedule=\{\} has no 'name'"),
    ({"name": "adan", "schedule": {"name": []}}, r"schedule \[\] is not one of"),
    ({"name": "adan", "schedule": {"name": "linear", "final": HUGE}}, r"schedule: final=an int must be a number"),
    ({"name": "adan", "schedule": {"name": "linear", 1: 2}}, r"schedule 'linear' has no option 1"),
    ({"name": "adan", "communication": {"kind": {}}}, r"communication \{\} is not one of bf16"),
    ({"name": "adan", "communication": {"kind": "powersgd", 1: 2}}, r"communication 'powersgd' has no option 1"),
    ({"name": "adan", "communication": {"kind": "powersgd", "rank": -HUGE}}, r"rank=an int must be an integer of at"),
]
