"""The `mmscale` command: one thin function a verb, a file for each group of verbs."""

from mmscale.cli.command import app
from mmscale.cli.entry import main

__all__ = ["app", "main"]
