"""The model card of a pushed model: what its run knows, in Markdown under the hub's YAML."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import ModelCard, ModelCardData

from mmscale.checkpoint.files import Checkpoint
from mmscale.config.load import stage_config
from mmscale.config.schema import Config
from mmscale.contracts import InputSpec
from mmscale.loss.objective import named
from mmscale.report.facts import Recalls, collect_recalls
from mmscale.report.metrics import read_metrics
from mmscale.report.verdicts import NOT_DIAGNOSED, read_doctor, verdict_of

_OPEN_CLIP = """import open_clip

model, _, transform = open_clip.create_model_and_transforms("hf-hub:{page}"{revision})
tokenizer = open_clip.get_tokenizer("hf-hub:{page}")"""
_TRANSFORMERS = """from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("{page}"{revision})
processor = AutoImageProcessor.from_pretrained("{page}"{revision})
tokenizer = AutoTokenizer.from_pretrained("{page}"{revision})"""
_SENTENCE_TRANSFORMERS = """from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{page}"{revision})
rows = model.encode(["a caption"])  # or pictures of PIL's"""
_ONNX = """from huggingface_hub import snapshot_download
from onnxruntime import InferenceSession

folder = snapshot_download("{page}"{revision})
image = InferenceSession(f"{{folder}}/image.onnx")  # pixels as `preprocess` in mmscale.json says
text = InferenceSession(f"{{folder}}/text.onnx")  # tokens and mask"""
_ADAPTER = """from huggingface_hub import snapshot_download
from peft import PeftModel

folder = snapshot_download("{page}"{revision})
tower = PeftModel.from_pretrained(tower, f"{{folder}}/vision")  # or text"""
# By target: the hub's name of the library, and how the model is loaded.
_LOADED = {
    "open_clip": ("open_clip", _OPEN_CLIP),
    "hf": ("transformers", _TRANSFORMERS),
    "clip": ("transformers", _TRANSFORMERS),
    "sentence_transformers": ("sentence-transformers", _SENTENCE_TRANSFORMERS),
    "onnx": ("onnx", _ONNX),
    "adapter": ("peft", _ADAPTER),
}
_CLASSIFIES = ("open_clip", "hf", "clip")
# Of OpenCLIP's names: a folder, or a page.
_SCHEMES = ("local-dir:", "hf-hub:")


@dataclass(frozen=True)
class Pushed:
    """What a card is about.

    Attributes:
        page: ORG/NAME.
        to: The format, one of `export.FORMATS`.
        revision: Branch; None for the page's own.
        licence: That the user gives the model; None: nothing is said of one.
    """

    page: str
    to: str
    revision: str | None = None
    licence: str | None = None


def model_card(pushed: Pushed, checkpoint: Checkpoint, spec: InputSpec) -> str:
    """Text of `README.md`: how the model is loaded, its recalls, its diagnosis, how it was trained.

    No line names a folder of this machine by its absolute path, nor a password of an address.

    Raises:
        DataError: A file of the run's folder cannot be read.
    """
    library, code = _LOADED[pushed.to]
    # As the run named its towers, not as they were found now.
    config = stage_config(checkpoint.config, checkpoint.state.stage)
    data = ModelCardData(
        license=pushed.licence,
        library_name=library,
        pipeline_tag="zero-shot-image-classification" if pushed.to in _CLASSIFIES else None,
        tags=["mmscale", "image-text-retrieval", "clip"],
        base_model=_pages(config) or None,
    )
    revision = f', revision="{pushed.revision}"' if pushed.revision else ""
    if pushed.to == "open_clip":
        # It loads a page's main branch only.
        revision = ""
    run = _run_of(checkpoint)
    parts = [
        f"# {pushed.page.partition('/')[2]}",
        "An image-text dual encoder: images and captions become vectors of "
        f"{config.model.embed_dim} numbers, compared by their cosine.",
        "## Use",
        f"```python\n{code.format(page=pushed.page, revision=revision)}\n```",
        "## Retrieval",
        _retrieval(run, config, checkpoint),
        "## Embedding space",
        _diagnosis(run),
        "## Training",
        _table(("", ""), _training(config, checkpoint, spec)),
    ]
    text = "\n\n".join(parts)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n"))


def _run_of(checkpoint: Checkpoint) -> Path | None:
    """The run's folder, if the checkpoint still lies in it."""
    folder = checkpoint.folder.resolve().parent
    return folder.parent if folder.name == "checkpoints" else None


def _retrieval(run: Path | None, config: Config, checkpoint: Checkpoint) -> str:
    updates = checkpoint.state.updates
    recalls = _recalls_until(run, checkpoint.state.step)
    if recalls is None:
        return "The run holds no evaluation on held-out pairs."
    held_out = public_name(config.data.eval) if config.data.eval else "held-out pairs"
    rows = [
        (name, *(f"{recall} ({chance})" for recall, chance in figures))
        for name, figures in recalls.rows
    ]
    return (
        f"Recall in percent (by chance) on {recalls.images} images and {recalls.captions} captions "
        f"of {held_out}, evaluated after step {recalls.step}; the weights are those after "
        f"{updates:,} updates.\n\n" + _table(("", "R@1", "R@5", "R@10"), rows)
    )


def _recalls_until(run: Path | None, step: int) -> Recalls | None:
    log = run / "metrics.jsonl" if run else None
    if log is None or not log.exists():
        return None
    return collect_recalls([line for line in read_metrics(log) if line.get("step", step) <= step])


def _diagnosis(run: Path | None) -> str:
    doctor = read_doctor(run / "doctor.json") if run else {}
    verdict = verdict_of(doctor)
    if verdict is NOT_DIAGNOSED:
        return verdict.sentence
    confidence = doctor.get("confidence")
    sure = "" if confidence is None else f" (confidence {confidence:.2f})"
    return f"{verdict.title}{sure}. {verdict.sentence}".strip()


def _training(config: Config, checkpoint: Checkpoint, spec: InputSpec) -> list[tuple[str, str]]:
    model, state = config.model, checkpoint.state
    size = f"{spec.image_size} x {spec.image_size} pixels, {spec.resize} side resized"
    if spec.resize == "squash":
        size = f"{spec.image_size} x {spec.image_size} pixels, both sides resized"
    return [
        ("image tower", _tower(model.vision.name, model.vision.weights)),
        ("text tower", _tower(model.text.name, model.text.weights)),
        *([("preset", public_name(model.preset))] if model.preset else []),
        ("first weights", public_name(model.weights)),
        *((f"licence of {name}", text) for name, text in _licences(config)),
        ("pictures", size),
        ("captions", f"at most {spec.context_length} tokens"),
        ("training data", public_name(config.data.train)),
        ("updates", f"{state.updates:,}"),
        ("pairs seen", f"{state.samples:,}"),
        ("global batch size", f"{config.train.global_batch_size:,}"),
        ("objective", ", ".join(named(config.loss.terms))),
        ("learning rate", f"{config.optim.lr:g}"),
    ]


def _tower(name: str | None, weights: str) -> str:
    return f"{public_name(name or '')} ({public_name(weights)} weights)"


def _licences(config: Config) -> Iterator[tuple[str, str]]:
    """Of the towers whose model cards state one, where their weights were taken."""
    from mmscale.model.registry import find

    for tower in (config.model.vision, config.model.text):
        entry = find(str(tower.name))
        if entry is not None and entry.licence and tower.weights == "pretrained":
            yield public_name(str(tower.name)), entry.licence


def _pages(config: Config) -> list[str]:
    """Pages of the hub whose weights the run began with."""
    pages = []
    for tower in (config.model.vision, config.model.text):
        source, _, name = str(tower.name).partition(":")
        drawn = "random" in (tower.weights, config.model.weights if config.model.preset else "")
        is_page = re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
        if source == "hf" and is_page and not Path(name).exists() and not drawn:
            pages.append(name)
    return list(dict.fromkeys(pages))


def public_name(value: Any) -> str:
    """What a setting names, without where it lies on this machine and without passwords.

    Args:
        value: A name, path, address or command, or a list of these or of `SourceConfig`.
    """
    if isinstance(value, (list, tuple)):
        return ", ".join(public_name(getattr(entry, "shards", entry)) for entry in value)
    text = str(value)
    if text.startswith("pipe:"):
        return "a command's output"
    if "://" in text:
        address = urlsplit(text)
        return f"{address.scheme}://{address.hostname or ''}{address.path}"
    source, colon, rest = text.rpartition(":")
    path = PurePosixPath(rest)
    if not path.is_absolute() and not rest.startswith("~"):
        return text
    kept = [part for part in path.parts[-2:] if part not in ("/", "~", Path.home().name)]
    prefix = f"{source}{colon}" if colon else ""
    for scheme in _SCHEMES:
        prefix = prefix.removesuffix(scheme)
    return prefix + "/".join(kept)


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
