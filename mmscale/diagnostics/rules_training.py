"""Rules about how the loss stands: the scale at its ends, training rows known by heart."""

from mmscale.diagnostics.finding import Figures, Finding, below, decided, picked
from mmscale.diagnostics.rules_pairing import unaligned_surely

# Where the scale is clamped by default; at 100 a trained CLIP is healthy and far from its floor.
CLAMP = 100.0
# Share of the way from chance to the floor at which nothing is left to learn from a batch.
DONE = 0.99
# Share of the chance loss that the scale itself forbids to go below.
LEAST_FLOOR = 0.5
# Loss progress on training rows, and how far held-out rows of the same number may lag behind it.
LEARNT = 0.9
LARGEST_GAP = 0.4


def scale_saturated(figures: Figures) -> Finding:
    """The scale is at its limit and the loss at its floor: gradients vanish."""
    if "logit_scale" not in figures:
        return Finding(False, 1.0, {})
    beyond = 1 - below(figures["logit_scale"], 1.05 * CLAMP, 0.01 * CLAMP)
    at_limit = 1 - below(figures["logit_scale"], 0.99 * CLAMP, 0.005 * CLAMP)
    done = 1 - below(figures["loss_progress"], DONE, 0.002)
    causes = (
        "The scale rose to its clamp while the batch is already told apart: the negatives are too "
        "easy or too few",
        "The scale learns faster than the towers, or started too high",
        "The limit of the scale was raised",
    )
    remedies = (
        "optim.lr_scale.scale=0.1",
        "model.logit_scale.max=50",
        "model.logit_scale.init=14.2857",
        "train.global_batch_size=1024",
        "negatives.queue.size=4096",
    )
    evidence = picked(figures, "logit_scale", "loss", "loss_progress")
    return decided(max(beyond, min(at_limit, done)), evidence, causes, remedies)


def scale_stuck_low(figures: Figures) -> Finding:
    """Pairs are aligned, but the scale keeps the loss near chance whatever the towers learn."""
    if "logit_scale" not in figures:
        return Finding(False, 1.0, {})
    share = figures["loss_floor"] / figures["loss_chance"]
    low = 1 - below(share, LEAST_FLOOR, 0.02)
    causes = (
        "The logit scale is not trained: missing from the optimizer, or its rate is zero",
        "Weight decay pulls it down",
        "It started low and the run was too short to raise it",
    )
    remedies = (
        "model.logit_scale.init=14.2857",
        "optim.lr_scale.scale=1.0",
    )
    evidence = picked(figures, "logit_scale", "loss", "loss_floor", "loss_chance")
    return decided(min(low, 1 - unaligned_surely(figures)), evidence, causes, remedies)


def overfit(figures: Figures) -> Finding:
    """Batches of training rows are told apart, held-out rows are not.

    Needs the run's own training figures (`train_loss_progress`); loss progress counts as many rows
    on both sides.
    """
    if "train_loss_progress" not in figures or "heldout_loss_progress" not in figures:
        return Finding(False, 1.0, {})
    gap = figures["train_loss_progress"] - figures["heldout_loss_progress"]
    learnt = 1 - below(figures["train_loss_progress"], LEARNT, 0.02)
    causes = (
        "The model knows its training pairs by heart: too many trained parameters for the pairs, "
        "or too many epochs",
        "Training and held-out pairs come from different sources",
        "The captions of the training file are joined to the wrong images, and were memorised",
    )
    remedies = (
        "train.duration=5 epochs",
        "model.vision.frozen=true",
        "data.augment=crop",
        "data.captions=random",
        "optim.weight_decay=0.2",
    )
    evidence = picked(figures, "train_loss_progress", "heldout_loss_progress", "train_auc", "auc")
    return decided(min(learnt, 1 - below(gap, LARGEST_GAP, 0.05)), evidence, causes, remedies)
