"""The doctor's verdicts in words, and how loud each one is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """A verdict as the page shows it.

    Attributes:
        tone: `good`, `warn`, `bad` or `none`.
        title: Two to four words for the badge.
        sentence: What it means for this run.
    """

    tone: str
    title: str
    sentence: str


NOT_DIAGNOSED = Verdict("none", "Not diagnosed", "The doctor has not looked at this run.")

VERDICTS = {
    "healthy": Verdict(
        "good", "Healthy", "Images and captions share one space, and matched pairs stand out in it."
    ),
    "too_few_samples": Verdict(
        "none", "Too few samples", "There were not enough pairs to tell signal from chance."
    ),
    "complete_collapse": Verdict(
        "bad", "Complete collapse", "All embeddings have become nearly the same vector."
    ),
    "dead_tower": Verdict(
        "bad", "Dead tower", "One tower gives the same embedding whatever it is shown."
    ),
    "dimensional_collapse": Verdict(
        "bad",
        "Dimensional collapse",
        "The embeddings use only a few of the directions that they could.",
    ),
    "shuffled_pairs": Verdict(
        "bad",
        "Shuffled pairs",
        "Both towers carry structure, but images and captions are not matched row by row.",
    ),
    "unaligned": Verdict(
        "bad",
        "Unaligned",
        "Matched pairs are no closer than unmatched ones: the towers have not found each other.",
    ),
    "scale_saturated": Verdict(
        "warn", "Logit scale saturated", "The logit scale sits at its limit, so gradients are tiny."
    ),
    "scale_stuck_low": Verdict(
        "warn",
        "Logit scale stuck low",
        "The logit scale is too small for the loss to tell pairs apart.",
    ),
    "overfit": Verdict(
        "warn", "Overfit", "The model matches its training pairs far better than held-out ones."
    ),
    "false_negatives": Verdict(
        "warn", "False negatives", "Many pairs treated as negatives are really matches."
    ),
    "hubness": Verdict(
        "warn", "Hubness", "A few items are the nearest neighbours of too many others."
    ),
}


def describe(name: str | None) -> Verdict:
    """The verdict of that name; one that this version does not know keeps its name."""
    if name is None:
        return NOT_DIAGNOSED
    return VERDICTS.get(name, Verdict("warn", name.replace("_", " ").capitalize(), ""))
