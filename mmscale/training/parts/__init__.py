"""What is optional in a run, a file each, in the order that `build.py` lists them in."""
