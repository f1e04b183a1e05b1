"""Settings of the terms that compare with frozen weights; `loss.py` has all others."""

from typing import ClassVar, Literal

from pydantic import model_validator

from mmscale.config.paths import PathSetting
from mmscale.config.term import Needs, Term
from mmscale.config.values import Positive, PositiveFloat


class TaughtTerm(Term):
    """What terms have that compare with a frozen model's rows of the same pairs."""

    form: Literal["affinity", "feature"] = "affinity"
    """`affinity`: find alike what it finds alike; `feature`: its rows, of one width with ours."""
    temperature: PositiveFloat | None = None
    """Of our similarities in `affinity`; null: the model's."""
    teacher_temperature: PositiveFloat | None = None
    """Of the teacher's similarities in `affinity`; null: the teacher's own."""

    def contrasts_in(self, mined: bool) -> Literal["strips"] | None:
        """Of the batch with itself, as both see it."""
        return "strips" if self.form == "affinity" else None

    @model_validator(mode="after")
    def _check_form(self) -> "TaughtTerm":
        if self.form == "feature" and (self.temperature or self.teacher_temperature):
            raise ValueError(
                "given its temperatures with form=affinity alone: form=feature has none; take them "
                "out"
            )
        return self


class TeacherTerm(TaughtTerm):
    """Distillation from a frozen model that encodes the same pictures and captions."""

    needs: ClassVar[Needs] = Needs(pictures=True)

    kind: Literal["teacher"]
    """The teacher is not trained, and no checkpoint keeps its weights."""
    model: PathSetting
    """`hf:NAME_OR_PATH`, `openclip:NAME[@WEIGHTS]`, or a run's, checkpoint's or export's folder."""
    cache: PathSetting | None = None
    """Folder that keeps its features of `data.train`, made once; with `data.augment=none`."""


class AnchorTerm(TaughtTerm):
    """Stay near what the run began with: its start is the teacher."""

    needs: ClassVar[Needs] = Needs(start=True)

    kind: Literal["anchor"]
    """Checkpoints keep the weights of the start, before any stage."""
    form: Literal["affinity", "feature"] = "feature"
    """`feature`: rows stay where they were; `affinity`: what was alike stays alike."""
    data: PathSetting | None = None
    """Packed folder whose pairs stay where they were, trained on or not; null: the batch's own."""
    rows: Positive | None = None
    """Pairs of `data` in an update, over all ranks; null: 64."""

    @property
    def given_rows(self) -> int:
        """Pairs of `data` in an update."""
        return self.rows or 64

    @model_validator(mode="after")
    def _check_rows(self) -> "AnchorTerm":
        if self.rows is not None and self.data is None:
            raise ValueError("given rows with data alone, whose pairs they count; take rows out")
        return self


class L2StartTerm(Term):
    """Squared distance of the trained weights to those that the run began with (L2-SP)."""

    needs: ClassVar[Needs] = Needs(
        start=True, once="it is the same distance twice; add up their weights"
    )

    kind: Literal["l2_start"]
    """A sum over all trained parameters, not a mean: `weight` is half of the paper's alpha."""
