"""`python -m thermoe_env.calibration`."""

import sys

from thermoe_env.calibration.command import main

sys.argv[0] = "python -m thermoe_env.calibration"  # what its help calls it
main()
