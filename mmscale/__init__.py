"""mmscale: a distributed trainer for image-text dual encoders.

Importing this package costs nothing: torch is imported by what needs it, so that a mistake in a
configuration is told in well under a second.
"""

__version__ = "0.1.0"
