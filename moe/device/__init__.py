"""The card at work: where models run, and the one reader of NVML."""
