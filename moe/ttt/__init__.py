"""Test-time training: methods with their state, guards, and the adapter that a service holds.

`methods`, `roid`, `eva` and `rotation` are functions of one shape over `state`, of a group of parameters
(`groups`), out of the parts in `steps`; `service` is the step of the default one. `neo` and `bank` stand on
another of them. `settings` says how each is set, and its type picks the method. `guards` watch over them,
and `adapter` puts all of it together for one model. When to adapt, and for how much energy:
`moe.service.gates`, `moe.service.budget`.
"""

from moe.ttt.adapter import METHODS, Adapter
from moe.ttt.bank import bank, features
from moe.ttt.eva import eva
from moe.ttt.groups import GROUPS, Group, collect_params
from moe.ttt.guard_settings import GuardCounters, GuardSettings
from moe.ttt.guards import Guard
from moe.ttt.methods import (
    batch_statistics,
    dynamic_evaluation,
    eata,
    fisher_anchor,
    gradient_rms,
    sar,
    tent,
)
from moe.ttt.neo import neo
from moe.ttt.roid import roid
from moe.ttt.rotation import rotation
from moe.ttt.service import (
    LEARNING_RATE,
    STATISTICS_MOMENTUM,
    AdaptationDiverged,
    adapt,
)
from moe.ttt.settings import (
    Bank,
    BankRoomError,
    BatchStatistics,
    DynamicEvaluation,
    Eata,
    Eva,
    Neo,
    RmsDynamicEvaluation,
    Roid,
    Rotation,
    Sar,
    Settings,
    Tent,
    step_share,
)
from moe.ttt.state import AdaptationState, Saved, start
from moe.ttt.steps import Step

__all__ = [
    "GROUPS",
    "LEARNING_RATE",
    "METHODS",
    "STATISTICS_MOMENTUM",
    "AdaptationDiverged",
    "AdaptationState",
    "Adapter",
    "Bank",
    "BankRoomError",
    "BatchStatistics",
    "DynamicEvaluation",
    "Eata",
    "Eva",
    "Group",
    "Guard",
    "GuardCounters",
    "GuardSettings",
    "Neo",
    "RmsDynamicEvaluation",
    "Roid",
    "Rotation",
    "Sar",
    "Saved",
    "Settings",
    "Step",
    "Tent",
    "adapt",
    "bank",
    "batch_statistics",
    "collect_params",
    "dynamic_evaluation",
    "eata",
    "eva",
    "features",
    "fisher_anchor",
    "gradient_rms",
    "neo",
    "roid",
    "rotation",
    "sar",
    "start",
    "step_share",
    "tent",
]
