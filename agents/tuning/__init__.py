"""Search for the settings of rules and gates."""
