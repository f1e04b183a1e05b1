"""Which members of a sample are its image and its captions, where a user says so."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import yaml
from pydantic import ValidationError

from mmscale.config.data import KeysConfig
from mmscale.data.tar import ANY, IMAGE_BYTES, IMAGE_SUFFIXES, TEXT_BYTES, WANTED, TarSample
from mmscale.errors import ConfigError

# What JPEG, PNG and WebP files begin with.
_JPEG, _PNG, _RIFF, _WEBP = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF", b"WEBP"


@dataclass(frozen=True)
class Choice:
    """What `data.keys` says; without words: images and captions by their usual names.

    Attributes:
        keys: The user's words.
    """

    keys: KeysConfig = field(default_factory=KeysConfig)

    @cached_property
    def images(self) -> tuple[str, ...]:
        """Endings of images, best first."""
        return self.keys.image or IMAGE_SUFFIXES

    @cached_property
    def texts(self) -> list[tuple[str, float]]:
        """Endings of texts that hold captions, with their shares of the draws."""
        return self.keys.shares()[: len(self.keys.text)]

    @cached_property
    def fields(self) -> list[tuple[str, float]]:
        """Names in the json that captions stand under, with their shares of the draws."""
        return self.keys.shares()[len(self.keys.text) :]

    @cached_property
    def is_usual(self) -> bool:
        """Whether nothing was chosen."""
        return self.keys == KeysConfig()

    @cached_property
    def draws(self) -> bool:
        """Whether captions come from several places, of which each turn draws one."""
        return len(self.texts) + len(self.fields) > 1

    @cached_property
    def names(self) -> tuple[Any, ...]:
        """What is read, whatever the shares are: on it depends what a manifest counts."""
        texts, fields = ([name for name, _ in part] for part in (self.texts, self.fields))
        return self.keys.image, texts, fields, self.keys.lines

    @cached_property
    def wanted(self) -> Mapping[str, int]:
        """Most bytes of the members that are read, by their endings."""
        if self.is_usual:
            return WANTED
        texts = [name for name, _ in self.texts] or ([] if self.fields else ["txt"])
        return {
            **dict.fromkeys(self.images, IMAGE_BYTES),
            **dict.fromkeys(["json", *texts], TEXT_BYTES),
        }

    def image_of(self, found: TarSample) -> bytes:
        """The encoded image of a sample; empty without one."""
        members = found.members
        for name in self.images:
            if name == ANY:
                if image := next((c for c in members.values() if _begins_as_image(c)), b""):
                    return image
            elif name in members:
                return members[name]
        return b""


def _begins_as_image(content: bytes) -> bool:
    is_webp = content[:4] == _RIFF and content[8:12] == _WEBP
    return is_webp or content.startswith((_JPEG, _PNG))


USUAL = Choice()


def parse_choice(text: str | None) -> Choice:
    """From YAML such as `{image: [jpg], json: [caption, re_caption:0.3]}`; None: the usual names.

    Raises:
        ConfigError: It is none.
    """
    if text is None:
        return USUAL
    try:
        return Choice(KeysConfig.model_validate(yaml.safe_load(text)))
    except (yaml.YAMLError, ValidationError, RecursionError) as error:
        fault = error.errors()[0] if isinstance(error, ValidationError) else None
        reason = "no YAML" if fault is None else fault["msg"].removeprefix("Value error, ")
        raise ConfigError(
            f"--keys {text}: {reason}; write names for image, text or json, such as "
            "'{image: [jpg], json: [caption, re_caption:0.3]}'"
        ) from error
