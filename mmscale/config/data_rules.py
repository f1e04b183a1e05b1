"""Rules between the settings of the data."""

from collections.abc import Iterator

from mmscale.config.schema import DataConfig
from mmscale.config.sources import SourceConfig


def data_faults(data: DataConfig) -> Iterator[str]:
    """One sentence for each contradiction."""
    if data.allow_pipe is False:
        for place in places(data.train):
            if place.startswith("pipe:"):
                yield (
                    f"data.train={place}: runs a command, which is not allowed; set "
                    "data.allow_pipe=true if you trust it"
                )
    if not data.resampled:
        if data.epoch_samples is not None:
            yield (
                f"data.epoch_samples={data.epoch_samples} is the length of a resampled epoch; set "
                "data.resampled=true, or remove it"
            )
        return
    needs_all = {
        "captions": data.captions == "flat",
        "match": data.match != "image",
        "positive_share": data.positive_share is not None,
        "feature_cache": data.feature_cache is not None,
        "hard_batches.table": data.hard_batches.table is not None,
    }
    for name in (name for name, is_set in needs_all.items() if is_set):
        yield (
            f"data.{name} needs to know every sample, data.resampled=true reads shards without a "
            "manifest; set one of the two to its default"
        )


def places(where: str | list[str] | list[SourceConfig]) -> list[str]:
    """Every folder, pattern, URL or command that a setting names."""
    if isinstance(where, str):
        return [where]
    found: list[str] = []
    for entry in where:
        found += [entry] if isinstance(entry, str) else places(entry.shards)
    return found
