"""Every optimizer, one page each."""

from lightning_optim.optimizers.acprop import ACProp
from lightning_optim.optimizers.adabelief import AdaBelief
from lightning_optim.optimizers.adafactor import Adafactor
from lightning_optim.optimizers.adagrad import Adagrad
from lightning_optim.optimizers.adam import Adam
from lightning_optim.optimizers.adamax import AdaMax
from lightning_optim.optimizers.adamw import AdamW
from lightning_optim.optimizers.adan import Adan
from lightning_optim.optimizers.adapnm import AdaPNM
from lightning_optim.optimizers.ademamix import AdEMAMix
from lightning_optim.optimizers.adopt import ADOPT
from lightning_optim.optimizers.diffgrad import DiffGrad
from lightning_optim.optimizers.generalized_signsgd import GeneralizedSignSGD
from lightning_optim.optimizers.koala_m import KoalaM
from lightning_optim.optimizers.koala_v import KoalaV
from lightning_optim.optimizers.lamb import LAMB
from lightning_optim.optimizers.lars import LARS
from lightning_optim.optimizers.lion import Lion
from lightning_optim.optimizers.mars import MARS
from lightning_optim.optimizers.moment_estimation_sgd import MomentEstimationSGD
from lightning_optim.optimizers.muon import Muon
from lightning_optim.optimizers.nadam import NAdam
from lightning_optim.optimizers.padam import Padam
from lightning_optim.optimizers.pnm import PNM
from lightning_optim.optimizers.prodigy import Prodigy
from lightning_optim.optimizers.radam import RAdam
from lightning_optim.optimizers.rmsprop import RMSprop
from lightning_optim.optimizers.scalar_rmsprop import ScalarRMSprop
from lightning_optim.optimizers.schedule_free_adamw import ScheduleFreeAdamW
from lightning_optim.optimizers.schedule_free_radam import ScheduleFreeRAdam
from lightning_optim.optimizers.schedule_free_sgd import ScheduleFreeSGD
from lightning_optim.optimizers.sgd import SGD
from lightning_optim.optimizers.sgdw import SGDW
from lightning_optim.optimizers.soap import SOAP

__all__ = [
    "ADOPT",
    "LAMB",
    "LARS",
    "MARS",
    "PNM",
    "SGD",
    "SGDW",
    "SOAP",
    "ACProp",
    "AdEMAMix",
    "AdaBelief",
    "AdaMax",
    "AdaPNM",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adan",
    "DiffGrad",
    "GeneralizedSignSGD",
    "KoalaM",
    "KoalaV",
    "Lion",
    "MomentEstimationSGD",
    "Muon",
    "NAdam",
    "Padam",
    "Prodigy",
    "RAdam",
    "RMSprop",
    "ScalarRMSprop",
    "ScheduleFreeAdamW",
    "ScheduleFreeRAdam",
    "ScheduleFreeSGD",
]
