"""The run directory, the interface between the commands, and what is written into it."""
