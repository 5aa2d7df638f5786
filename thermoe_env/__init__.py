"""ThermalMoE: a Gymnasium environment of MoE inference under power and thermal limits.

Importing registers three ids and does nothing else:

- `ThermalMoE-v0`: the live world where CUDA and NVML answer, else the twin;
- `ThermalMoETwin-v0`: the calibrated twin, deterministic;
- `ThermalMoELive-v0`: real forward passes, read by NVML (on a CPU by the twin's device model).
"""

from gymnasium.envs.registration import register

_ENTRY = "thermoe_env.env:ThermalMoEEnv"

register("ThermalMoE-v0", _ENTRY, nondeterministic=True, max_episode_steps=300, kwargs={"world": "auto"})
register(
    "ThermalMoETwin-v0",
    _ENTRY,
    max_episode_steps=300,
    vector_entry_point="thermoe_env.vector:ThermalMoEVectorEnv",
    kwargs={"world": "twin"},
)
register("ThermalMoELive-v0", _ENTRY, nondeterministic=True, max_episode_steps=300, kwargs={"world": "live"})
