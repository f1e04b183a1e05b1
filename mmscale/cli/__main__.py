"""`python -m mmscale.cli`."""

from mmscale.cli.entry import main

main()
