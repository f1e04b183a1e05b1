"""Save, load, prune and resume: one format for every engine, world and ZeRO stage."""
