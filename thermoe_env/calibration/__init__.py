"""Fitting a twin to a card: `python -m thermoe_env.calibration`."""
