"""The twin: services at measured cost, heat, and the compiled core over both."""
