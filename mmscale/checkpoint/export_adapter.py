"""To folders in peft's layout: what adapters have learnt, without the models below them."""

import copy
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from mmscale.checkpoint.export import Exported, InexpressibleError, require_equal
from mmscale.model.adapters import NAME, adapted, drop_adapter, is_adapters

REST = "trained.safetensors"
_README = """# Adapters of an image-text dual encoder

Each folder is one of peft's and goes on the tower that its name says, built by that tower's own
library as it was before training ({towers}):

```python
from peft import PeftModel

tower = PeftModel.from_pretrained(tower, "PATH OF THIS FOLDER/vision")
```

`trained.safetensors` holds what else was trained, by its name in mmscale: heads, the log of the
logit scale, blocks without an adapter.
"""


def write_adapters(what: Exported, folder: Path) -> None:
    """A folder for each tower with an adapter; loaded back by peft and compared.

    Raises:
        ConfigError: peft builds another tower of it.
    """
    model = what.encoder.model
    towers = {part: model.get_submodule(part) for part in ("vision", "text")}
    towers = {part: tower for part, tower in towers.items() if adapted(tower)}
    for part, tower in towers.items():
        source, _, path = str(getattr(what.config.model, part).name).partition(":")
        # A checkpoint's own copy of a tower's configuration is no place for others to look.
        base = path if source == "hf" and what.page is None else None
        _write(tower, folder / part, base)
    rest = {
        name: parameter.detach().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not is_adapters(name)
    }
    save_file(rest, folder / REST)
    named = ", ".join(f"{part}: {getattr(what.config.model, part).name}" for part in towers)
    (folder / "README.md").write_text(_README.format(towers=named))
    for part, tower in towers.items():
        _check(what, part, tower, folder / part)


def _write(tower: Any, folder: Path, base: str | None) -> None:
    from peft import get_peft_model_state_dict

    trunk = tower.trunk
    config = copy.deepcopy(trunk.peft_config[NAME])
    config.inference_mode = True
    config.base_model_name_or_path = base
    config.save_pretrained(folder)
    tensors = get_peft_model_state_dict(trunk, adapter_name=NAME, save_embedding_layers=False)
    save_file(
        {f"base_model.model.{key}": tensor.contiguous() for key, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
    )


def _check(what: Exported, part: str, tower: nn.Module, folder: Path) -> None:
    import peft

    below: Any = copy.deepcopy(tower)
    drop_adapter(below)
    peft.PeftModel.from_pretrained(below.trunk, str(folder))
    below.eval()
    pixels, tokens = what.sample()
    row = (pixels,) if part == "vision" else (tokens, tokens != what.spec.pad_token)
    try:
        require_equal(tower(*row), below(*row), f"the adapter of the {part} tower")
    except InexpressibleError as error:
        if not any(isinstance(module, nn.MultiheadAttention) for module in below.modules()):
            raise
        raise InexpressibleError(
            f"model.{part}.adapter stands beside torch's own attention, and peft "
            f"{peft.__version__} would give other embeddings: it adds the adapter of an "
            f"attention's output projection twice"
        ) from error
