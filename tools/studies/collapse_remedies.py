"""What is tried against each failure: every remedy of the source document that heads allow."""

REMEDIES: dict[str, tuple[str, ...]] = {
    "none": (),
    "VICReg": ('+{"kind": "vicreg", "weight": 0.04}',),
    "Barlow Twins": ('+{"kind": "barlow", "weight": 0.01}',),
    "decorrelation": ('+{"kind": "decorrelation", "weight": 0.2}',),
    "queue": ("negatives.queue.size=1024", "negatives.queue.source=online"),
    "larger batch": ("train.global_batch_size=512",),
    "negatives harder by and by": (
        'loss.terms=[{"kind": "hinge", "hardness": {"from": 0, "to": 1, "over": "100 steps"}}]',
    ),
    "fixed temperature": (
        "model.logit_scale.init=14.2857",
        "model.logit_scale.max=100",
        "model.logit_scale.learn=false",
    ),
    "CLIP's loss and scale": (
        'loss.terms=[{"kind": "infonce"}]',
        "model.logit_scale.init=14.2857",
        "model.logit_scale.max=100",
        "model.logit_scale.learn=true",
        "optim.lr_scale.scale=1",
    ),
    "feature scaling": ("model.head.standardize=2048",),
    "BatchNorm head": ("model.head.batch_norm=true",),
    "orthogonal head": ("model.head.init=orthogonal",),
    "a tenth of the rate": ("optim.lr/=10",),
    "supervised start": (
        '+{"kind": "regression", "weight": {"from": 1, "to": 0, "over": "50 steps"}}',
    ),
}
"""Words over the failure's own; `+TERM` adds a term, `KEY/=N` divides a setting."""
