"""What a run needs of the Hugging Face hub, brought into the cache before it starts."""

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import CacheNotFound, constants, scan_cache_dir

from mmscale.checkpoint.files import Checkpoint
from mmscale.checkpoint.resume import first_weights
from mmscale.config.rules import trained_terms
from mmscale.config.schema import Config
from mmscale.config.taught import TeacherTerm
from mmscale.model.build import build_model
from mmscale.model.kept import tower_files
from mmscale.model.presets import fill_preset
from mmscale.training.prepare import towers_of
from mmscale.training.teachers import open_teacher


def fetch_for(config: Config) -> None:
    """Open everything that a run of `config` would, so that the cache holds it.

    Raises:
        ConfigError: Something cannot be had, or a setting is wrong.
        CheckpointError: A file that was had does not fit.
    """
    model = fill_preset(config.model)
    first = first_weights(model)
    build_model(model, config.data.image_size, config.run.seed, fill=first is None)
    tower_files(towers_of(model, first if isinstance(first, Checkpoint) else None))
    terms = trained_terms(config)
    for name in {term.model: None for term in terms if isinstance(term, TeacherTerm)}:
        open_teacher(name)


def cached_pages() -> Mapping[str, int]:
    """Bytes of each page of the hub in this user's cache."""
    try:
        return {page.repo_id: page.size_on_disk for page in scan_cache_dir().repos}
    except CacheNotFound:
        return {}


def cache_folder() -> Path:
    """Where pages of the hub are kept: `HF_HUB_CACHE`, or `hub` in `HF_HOME`."""
    return Path(constants.HF_HUB_CACHE)
