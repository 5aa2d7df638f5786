"""Where models run: the torch device, its name, and the number format of served weights."""

from __future__ import annotations

import platform

import torch


def serving_dtype(device: torch.device) -> torch.dtype:
    """Return the type to compute in: bfloat16 on CUDA, where only it makes grouped_mm fast, else float32."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def pick_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu`` or ``cuda`` into a device.

    Raises:
        ValueError: CUDA is asked for and absent.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("device 'cuda' needs an NVIDIA GPU and a CUDA build of torch; use --device cpu")
    return torch.device(name)


def one_thread_on_cpu(device: torch.device) -> None:
    """Keep torch to one thread on a CPU, in this process.

    The models for a CPU are so small that more threads gain nothing, and cost a thousandfold where another
    process holds one of the cores.
    """
    if device.type == "cpu":
        torch.set_num_threads(1)


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor architecture."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"


def uuid_of(device: torch.device) -> str:
    """Return the UUID of a CUDA device, as NVML writes it."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"
