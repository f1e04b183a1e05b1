"""Trains two towers with open_clip's own trainer on a data set as it was downloaded.

PYTHONPATH=.venv/peers python tools/train_open_clip.py SOURCE OUT VISION_WEIGHTS TEXT_FOLDER [--...]

The image tower is timm's mobilenetv2_100 with `pad_type=same` and pixels from -1 to 1, the text
tower a Hugging Face model with the mean of its tokens, both under linear heads. Every caption of
the training split is a row, as the trainer's csv format has it; words that are not named here go
to the trainer as they are. Leaves `pairs.npz` of the validation split, for `mmscale doctor`.
"""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from open_clip_train.main import main as train
from PIL import Image
from timm.models import register_model
from torch import nn

from mmscale.contracts import World
from mmscale.data.sources import Record, read_source
from mmscale.diagnostics.pairs import Pairs, save_npz
from mmscale.diagnostics.retrieval import recalls
from mmscale.model.weights import load_strictly, read_weights
from mmscale.parallel.peers import connect

MODEL = "mobilenetv2-same-minilm"
WIDTH, ROWS = 256, 100
HALF = ("0.5", "0.5", "0.5")


@register_model
def mobilenetv2_same(pretrained: bool = False, **options: Any) -> nn.Module:
    """open_clip passes no `pad_type` on."""
    return timm.create_model("mobilenetv2_100", pad_type="same", **options)


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains two towers with open_clip's trainer.")
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("vision_weights")
    parser.add_argument("text_folder")
    parser.add_argument("--pixels", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    known, words = parser.parse_known_args()
    known.out.mkdir(parents=True)
    torch.set_num_threads(known.threads)
    add_model(known.out, known.text_folder, known.pixels)
    start = write_start(known.out, known.vision_weights)
    records = read_source(known.source).records
    rows = write_rows(known.out, [record for record in records if record.split == "train"])
    given = {
        "--model": [MODEL],
        "--resume": [str(start)],
        "--train-data": [str(rows)],
        "--dataset-type": ["csv"],
        "--csv-separator": [","],
        "--image-mean": list(HALF),
        "--image-std": list(HALF),
        "--device": ["cpu"],
        "--precision": ["fp32"],
        "--logs": [str(known.out)],
        "--name": ["run"],
    }
    train([word for name, values in given.items() for word in (name, *values)] + words)
    last = max((known.out / "run" / "checkpoints").glob("epoch_*.pt"), key=epoch_of)
    model, _, preprocess = open_clip.create_model_and_transforms(
        MODEL, image_mean=(0.5,) * 3, image_std=(0.5,) * 3
    )
    state = torch.load(last, map_location="cpu", weights_only=True)["state_dict"]
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    held_out = [record for record in records if record.split == "val"]
    pairs = embed(model.eval(), preprocess, held_out)
    save_npz(known.out / "pairs.npz", pairs)
    for name, value in recalls(pairs, connect(World())).items():
        print(f"{name} = {value:.1f}")


def epoch_of(path: Path) -> int:
    return int(path.stem.removeprefix("epoch_"))


def add_model(out: Path, text_folder: str, pixels: int) -> None:
    """Tell open_clip of the two towers, by a file of its own kind."""
    towers = {
        "embed_dim": WIDTH,
        "vision_cfg": {
            "timm_model_name": "mobilenetv2_same",
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": pixels,
        },
        "text_cfg": {
            "hf_model_name": text_folder,
            "hf_tokenizer_name": text_folder,
            "hf_proj_type": "linear",
            "hf_pooler_type": "mean_pooler",
        },
    }
    path = out / f"{MODEL}.json"
    path.write_text(json.dumps(towers))
    open_clip.add_model_config(path)


def write_start(out: Path, vision_weights: str) -> Path:
    """The model before its first update; only the heads are random."""
    model = open_clip.create_model(MODEL, pretrained_hf=True)
    tensors = read_weights(vision_weights, "VISION_WEIGHTS")
    load_strictly(model.visual.trunk, tensors, vision_weights)
    path = out / "start.pt"
    torch.save(model.state_dict(), path)
    return path


def write_rows(out: Path, records: list[Record]) -> Path:
    path = out / "train.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("filepath", "title"))
        for record in records:
            writer.writerows((record.image, caption) for caption in record.captions)
    return path


@torch.inference_mode()
def embed(model: Any, preprocess: Any, records: list[Record]) -> Pairs:
    """Unit rows of all images and of all captions."""
    tokenize = open_clip.get_tokenizer(MODEL)
    images, texts = [], []
    for first in range(0, len(records), ROWS):
        part = records[first : first + ROWS]
        pixels = torch.stack([preprocess(Image.open(record.image)) for record in part])
        images.append(model.encode_image(pixels, normalize=True))
        captions = [caption for record in part for caption in record.captions]
        texts.append(model.encode_text(tokenize(captions), normalize=True))
    ids = torch.arange(len(records))
    counts = torch.tensor([len(record.captions) for record in records])
    return Pairs(torch.cat(images), torch.cat(texts), ids, ids.repeat_interleave(counts))


if __name__ == "__main__":
    main()
