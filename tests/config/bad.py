"""Specs of optimizers that are wrong, and what is said of them."""

from __future__ import annotations

from typing import Any

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
    ({"name": "adan", "no_decays": []}, r"no option 'no_decays'. Did you mean no_decay.*groups, schedule"),
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
        r"schedule 'cosinus' is not one of constant, .*, flat_linear. Did you mean cos",
    ),
    ({"name": "adan", "schedule": {"name": "linear", "warmup": 5}}, r"no option 'warmup'. Did you mean warmup_steps\?"),
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
        r"schedule=5 must be one of constant, linear, cosine, inverse_sqrt, flat_linear, or a",
    ),
]
