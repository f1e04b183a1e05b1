"""mmscale: a distributed trainer for image-text dual encoders.

Importing this package costs nothing: torch is imported by what needs it, so that a mistake in a
configuration is told in well under a second.
"""

__version__ = "0.1.0"


def load(path):  # type: ignore[no-untyped-def]
    """The model, the evaluation transform and the tokenizer of a run or checkpoint.

    Args:
        path: A run folder or one of its checkpoints.
    """
    from mmscale.loading import load as load_run

    return load_run(path)
