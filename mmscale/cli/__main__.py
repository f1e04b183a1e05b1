"""`python -m mmscale.cli`."""

from mmscale.cli.entry import main

if __name__ == "__main__":
    main()
