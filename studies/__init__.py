"""Experiments behind the research questions; each module is a command with its tables and figures."""
