"""ThermalMoE: a Gymnasium environment of MoE inference under power and thermal limits.

Importing registers five ids and does nothing else:

- `ThermalMoE-v0`: the live world where CUDA and NVML answer, else the twin;
- `ThermalMoETwin-v0`: the calibrated twin, deterministic;
- `ThermalMoELive-v0`: real forward passes, read by NVML (on a CPU by the twin's device model);
- `ThermalMoETwinMO-v0`, `ThermalMoELiveMO-v0`: the same two with a vector of objectives for a reward.
"""

from typing import Any

from gymnasium.envs.registration import register

_ENTRY = "thermoe_env.env:ThermalMoEEnv"
_VECTOR_REWARD = "thermoe_env.objectives:ThermalMoEMultiObjectiveEnv"

# The environment itself refuses a step before a reset, and `check_env` is part of the tests: wrappers that do
# either on every step would only cost time. It ends its episodes too, after the scenario's length: a limit
# registered here would cut longer ones.
_PLAIN: dict[str, Any] = {"order_enforce": False, "disable_env_checker": True}

register("ThermalMoE-v0", _ENTRY, nondeterministic=True, kwargs={"world": "auto"}, **_PLAIN)
register(
    "ThermalMoETwin-v0",
    _ENTRY,
    vector_entry_point="thermoe_env.vector:ThermalMoEVectorEnv",
    kwargs={"world": "twin"},
    **_PLAIN,
)
register("ThermalMoELive-v0", _ENTRY, nondeterministic=True, kwargs={"world": "live"}, **_PLAIN)
register("ThermalMoETwinMO-v0", _VECTOR_REWARD, kwargs={"world": "twin"}, **_PLAIN)
register("ThermalMoELiveMO-v0", _VECTOR_REWARD, nondeterministic=True, kwargs={"world": "live"}, **_PLAIN)
