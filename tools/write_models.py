"""Write docs/models.md from the registry, and from every pair of curated towers trained anew.

python tools/write_models.py            the registry's tables; the pairs stay as they are
python tools/write_models.py --pairs    every pair too: minutes on two cores
"""

import sys
from pathlib import Path

from mmscale.model.presets import PRESETS
from mmscale.model.registry import TowerEntry, columns, curated_names, entries
from mmscale.parallel.device import FAILING_TOWERS
from tools.tower_pairs import TrainedPair, all_pairs, train_pairs

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
HEADING = (
    "| image tower | width | text tower | width | shared | heads added (parameters) |\n"
    "|---|---|---|---|---|---|\n"
)
INTRODUCTION = """\
# Models

Written by `tools/write_models.py`; a test fails when it is out of date. `mmscale models` prints the
same figures, `mmscale models NAME` those of one model, registered or not.

Every figure is read from the built model. Of a model that is not registered the widths come from
one row through it without values, never from its name. FLOPs are those of one sample forward, two
for each multiply-add, at the tower's own picture size or for a caption of 77 tokens (fewer if the
tower takes fewer). Memory is that of the weights in fp32. Licences are those that model cards
state. *Good on*: trained there by a test. Nothing here was tried on a GPU.

## Settings of a tower

- `name`: `timm:NAME`, `hf:NAME_OR_PATH` or `openclip:NAME`.
- `pooling`: `auto` is the tower's own; `cls`; `mean` (padding never counts); `eos`, the last real
  token, for text; `map`: one learnt query attends to all tokens, as SigLIP pools. That is drawn
  anew, so the tower must not be frozen as a whole. OpenCLIP's towers pool by their options.
- `frozen`: `true`; `N`: what comes before the blocks, and the first N blocks; `-N`: all but the
  last N. Frozen parts are in evaluation mode and have no gradient. Blocks are counted below.
- `adapter`: `{kind: lora, rank: 8}`: the tower keeps its weights and learns small matrices beside
  its linear layers and its attention, through peft (`pip install 'mmscale[adapters]'`). Heads and
  scale are trained as ever. With a number in `frozen`, the blocks that it keeps have the adapter
  and the others are trained themselves. `targets` names layers by the ends of their names
  (`[qkv, proj]`), convolutions too. A run may begin on the weights of one without adapters
  (`model.weights=RUN`). `mmscale export` merges them; `--to adapter` writes peft's own folders.
- `checkpointing`: blocks keep no activations and compute them again in the backward pass, which
  gives the same gradient with less memory.
- `context_length` of a text tower, beyond its table of positions: the first 20 stay, the rest are
  spread (Long-CLIP), so that captions of at most 20 tokens are read as before; to be trained on.
  How many captions were cut is told at the first step, in the log and on the report's page.
- `width`: checked; a wrong one ends with exit 2 and names the true one.

Parameters that the pooled features do not depend on (a mask token, the tower's own pooling when
another is chosen) are never trained, so weight decay does not eat them.

`model.preset=hf:NAME_OR_PATH` takes a whole `CLIPModel`, `SiglipModel` (SigLIP 2 of fixed size is
one), `ChineseCLIPModel`, `AltCLIPModel` or `VisionTextDualEncoderModel`: its projections, pooling,
scale, bias (where a `siglip` term has one), tokenizer and preprocessing. Its weights are its own
(`model.weights=pretrained`) unless `random` or a file is asked for. Positions of CLIPs, SigLIPs and
ViTs are interpolated to another `data.image_size`. Both halves of one such model as two towers,
which would leave out its projections, are refused; SigLIP 2 of any size (NaFlex) is no preset.
`mmscale export --to clip` writes a run back in the class that its preset came from.

What a model's folder says is obeyed, or refused in a sentence: sentence-transformers' pooling,
CLIP's end token, padding, the size of the position table (`data.image_size`); a half of a whole
CLIP is taken without its projection, which is told. A text tower needs its tokenizer's files
beside `config.json`: one that is missing or far too small for the model is refused, and captions
of which it knows next to nothing; from a twentieth of unknown words on it is told.

No code runs and no native kernel is loaded, whatever a folder or a page of the hub asks for, and
weights are never unpickled. A checkpoint keeps the towers' configurations and tokenizers, so that
a run needs neither the folder nor the hub again; `model.text.name=hf:FOLDER` behind a verb takes
another.

"""
DEVICES = """\
## Devices

One policy decides, and the run prints it. Precision: bf16 where the GPU computes it, else fp32.
Asked for on a CPU, bf16 is tried on a small product and a small convolution, and the line says how
many times as long as fp32 they take: without units for it, it is emulated, tens of times slower.
`engine.precision=tf32` rounds the products of fp32 matrices, which fp32 itself never does, not even
in convolutions. AdamW is one fused kernel except on MPS. Attention runs on torch's own choice of
kernel. On MPS, operations that torch lacks there run on the CPU, named in one line at start; a
preset takes another tower for one that is known to fail there; one small update is rehearsed, and
where that fails the run is built on the CPU and says so. Nothing is compiled: captions are trimmed
to their batch, and each length would compile anew.

"""
PAIRS = """\
## Every image tower with every text tower

Each pair with random weights, one block deep and at a small picture size, but of its true widths:
two updates on the CPU. A head is added where a width is not the shared one, here the smaller.

"""


def page(rows: list[str]) -> str:
    """The whole page, with the pairs' rows as given."""
    known = entries()
    pairs = [entry for entry in known.values() if entry.part == "pair"]
    return "".join(
        [
            INTRODUCTION,
            "## Image towers\n\n" + markdown([known[n] for n in curated_names("vision")]),
            "## Text towers\n\n" + markdown([known[n] for n in curated_names("text")]),
            "## Presets\n\n" + presets(),
            DEVICES,
            PAIRS + HEADING + "\n".join(rows) + "\n\n",
            "## OpenCLIP's models\n\nAs `model.preset=openclip:NAME`. Parameters are those of both "
            "towers with their projections;\nweights carry their own licence. Pictures are resized "
            "and normalised as `preprocess_cfg` says; the\nweights bring their scale, and their "
            "bias where the loss has one (`siglip`).\n\n",
            markdown(pairs).rstrip() + "\n",
        ]
    )


def markdown(chosen: list[TowerEntry]) -> str:
    """A table with a row a model."""
    rows = [columns(entry, FAILING_TOWERS) for entry in chosen]
    lines = [" | ".join(rows[0]), " | ".join("---" for _ in rows[0])]
    lines += [" | ".join([f"`{row.pop('name')}`", *row.values()]) for row in rows]
    return "".join(f"| {line} |\n" for line in lines) + "\n"


def presets() -> str:
    """A row a preset."""
    known = entries()
    lines = ["| preset | image tower | width | text tower | width | shared width |\n"]
    lines.append("|---|---|---|---|---|---|\n")
    for name, settings in PRESETS.items():
        vision, text = (known[settings[part]["name"]] for part in ("vision", "text"))
        lines.append(
            f"| `{name}` | `{vision.name}` | {vision.width} | `{text.name}` | {text.width} | "
            f"{settings['embed_dim']} |\n"
        )
    return "".join(lines) + "\n"


def row(pair: TrainedPair) -> str:
    """A trained pair's line."""
    return (
        f"| `{pair.vision}` | {pair.vision_width} | `{pair.text}` | {pair.text_width} | "
        f"{pair.shared} | {pair.added()} |"
    )


def written() -> list[str]:
    """The pairs' rows of the page as it is."""
    return PAGE.read_text("utf-8").split(HEADING)[1].split("\n\n")[0].split("\n")


def main(words: list[str]) -> None:
    if words == ["--pairs"]:
        rows = [row(pair) for pair in train_pairs(all_pairs(), lambda p: print(row(p), flush=True))]
    else:
        rows = written()
    PAGE.write_text(page(rows), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
