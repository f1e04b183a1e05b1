"""Frozen teachers: each encodes the batch that the objective compares with it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mmscale.config.taught import TaughtTerm
from mmscale.config.values import StepsOf
from mmscale.contracts import START, Batch, Features, InputSpec, LossInput, Taught
from mmscale.engine.inference import Inference
from mmscale.errors import ConfigError
from mmscale.parallel.device import DevicePolicy
from mmscale.training.part import Json, Part, Step
from mmscale.training.teachers import Repainted, Teacher


class Teachers(Part):
    """Encodes this rank's rows with every teacher that a term looks at in the coming update.

    A teacher is whole on every rank, however the trained model is sharded; rows are gathered where
    the objective gathers. No checkpoint keeps its weights: their digest is compared instead.
    """

    name = "teacher"

    def __init__(
        self,
        teachers: Sequence[Teacher],
        terms: Mapping[str, Sequence[TaughtTerm]],
        policy: DevicePolicy,
        spec: InputSpec,
        micro_rows: int,
        steps_of: StepsOf,
    ):
        """Take the teachers to the device.

        Args:
            teachers: All that the terms name.
            terms: Of each teacher; their weights say when it is looked at.
            policy: Device and precision of the forward.
            spec: What the trained model is fed.
            micro_rows: Rows forwarded at once.
            steps_of: A duration in updates of this run.
        """
        self._teachers = {teacher.name: teacher for teacher in teachers}
        self._calls = {t.name: Inference(t.model, policy).call for t in teachers}
        self._pixels = {t.name: Repainted(spec, t.spec, policy.device) for t in teachers}
        self._terms, self._micro_rows, self._steps_of = terms, micro_rows, steps_of
        self._rows: dict[str, Taught] = {}

    def before(self, step: Step, batch: Batch) -> None:
        # Before the trained model's forward, so that its activations are not held beside these.
        def is_wanted(name: str) -> bool:
            terms = self._terms[name]
            return any(term.weight.at(step.number, self._steps_of) for term in terms)

        wanted = [name for name in self._teachers if is_wanted(name)]
        self._rows = {name: self.encode(name, batch) for name in wanted}

    def inputs(self, rows: LossInput, features: Features, batch: Batch) -> LossInput:
        return replace(rows, teachers=self._rows)

    def encode(self, name: str, batch: Batch) -> Taught:
        """What a teacher makes of the batch's pictures and captions, without a graph.

        Args:
            name: Of the teacher.
            batch: This rank's rows, on the device.
        """
        call, pixels = self._calls[name], self._pixels[name]
        features = batch.teacher_features.get(name)
        if name == START and batch.mask is None:
            features = batch.image, batch.tokens
        if features is not None:
            image, text, scale, _ = call("heads", *features)
            return Taught(image.unit, text.unit, scale)
        images, texts, scale = [], [], None
        for start in range(0, len(batch), self._micro_rows):
            rows = slice(start, start + self._micro_rows)
            tokens, mask = self._captions(name, batch, rows)
            found = call("both", pixels(batch.image[rows]), tokens, mask)
            image, text, scale, _ = found
            images.append(image.unit)
            texts.append(text.unit)
        assert scale is not None, "a batch has rows"
        return Taught(torch.cat(images), torch.cat(texts), scale)

    def _captions(self, name: str, batch: Batch, rows: slice) -> tuple[Tensor, Tensor]:
        """Tokens and mask of some rows."""
        if name == START:
            assert batch.mask is not None, "cached features have no tokens"
            return batch.tokens[rows], batch.mask[rows]
        tokens = batch.teacher_tokens[name][rows]
        mask = tokens >= 0
        return tokens.masked_fill(~mask, self._teachers[name].spec.pad_token), mask

    def state(self) -> dict[str, Json]:
        named = [teacher for teacher in self._teachers.values() if teacher.name != START]
        return {"digests": {teacher.name: teacher.digest for teacher in named}}

    def load(self, state: Mapping[str, Json]) -> None:
        for name, digest in state["digests"].items():
            if name in self._teachers and self._teachers[name].digest != digest:
                raise ConfigError(
                    f"loss.terms holds teacher with model={name}, which is not the model that the "
                    f"run was trained with: its weights or its tokenizer have changed; put it "
                    f"back (of a run that goes on, name a checkpoint), or start another run.dir"
                )
