"""Decisions and their evaluation: policies by rule and by learning, rollout, metrics, figures, report."""

import os

DISTRIBUTION = "thermalmoe"
"""Whose `agents` this is: other packages have one too (`thermoe_env.commands`)."""

# The twin and torch bring an OpenMP pool each. By default the threads of one spin on the cores that the other
# needs, which on a busy machine costs a factor of ten; the choice is read when the libraries load.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
