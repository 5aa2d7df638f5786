"""Test-time training: methods with their state, guards, and the adapter that a service holds.

`methods` and `rotation` are functions of one shape over `state`, of a group of parameters (`groups`), out of
the parts in `steps`; `service` is the step of the default one. `guards` watch over them, and `adapter` puts
all of it together for one model. When to adapt, and for how much energy:
`moe.service.gates`, `moe.service.budget`.
"""

from moe.ttt.adapter import METHODS, Adapter
from moe.ttt.groups import GROUPS, Group, collect_params
from moe.ttt.guards import Guard, GuardCounters, GuardSettings
from moe.ttt.methods import (
    batch_statistics,
    dynamic_evaluation,
    eata,
    fisher_anchor,
    gradient_rms,
    sar,
    tent,
)
from moe.ttt.rotation import rotation
from moe.ttt.service import (
    LEARNING_RATE,
    STATISTICS_MOMENTUM,
    AdaptationDiverged,
    adapt,
)
from moe.ttt.state import (
    AdaptationState,
    BatchStatistics,
    DynamicEvaluation,
    Eata,
    RmsDynamicEvaluation,
    Rotation,
    Sar,
    Saved,
    Tent,
    start,
)
from moe.ttt.steps import Step

__all__ = [
    "GROUPS",
    "LEARNING_RATE",
    "METHODS",
    "STATISTICS_MOMENTUM",
    "AdaptationDiverged",
    "AdaptationState",
    "Adapter",
    "BatchStatistics",
    "DynamicEvaluation",
    "Eata",
    "Group",
    "Guard",
    "GuardCounters",
    "GuardSettings",
    "RmsDynamicEvaluation",
    "Rotation",
    "Sar",
    "Saved",
    "Step",
    "Tent",
    "adapt",
    "batch_statistics",
    "collect_params",
    "dynamic_evaluation",
    "eata",
    "fisher_anchor",
    "gradient_rms",
    "rotation",
    "sar",
    "start",
    "tent",
]
