"""Hand-written policies, and the protocol that trained ones follow too."""
