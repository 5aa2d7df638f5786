"""Test-time training: the service's path, further methods with their state, and guards.

`service` is what the runner uses. `methods` and `rotation` are functions of one shape over `state`, of a
group of parameters (`groups`), out of the parts in `steps`. `guards` watch over them. When to adapt, and for
how much energy: `moe.gates`, `moe.budget`.
"""

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
    Snapshot,
    adapt,
    configure,
    make_optimizer,
    restore,
    snapshot,
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
    "STATISTICS_MOMENTUM",
    "AdaptationDiverged",
    "AdaptationState",
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
    "Snapshot",
    "Step",
    "Tent",
    "adapt",
    "batch_statistics",
    "collect_params",
    "configure",
    "dynamic_evaluation",
    "eata",
    "fisher_anchor",
    "gradient_rms",
    "make_optimizer",
    "restore",
    "rotation",
    "sar",
    "snapshot",
    "start",
    "tent",
]
