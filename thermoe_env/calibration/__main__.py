"""`python -m thermoe_env.calibration`."""

from thermoe_env.calibration.command import main

main()
