"""The data shipped with the package, and the script that cut it."""
