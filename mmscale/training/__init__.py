"""The trainer: from a configuration to a run, and the loop that runs it."""
