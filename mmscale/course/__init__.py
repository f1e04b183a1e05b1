"""The course of a run: what is decided between two updates, and how a run ends."""
