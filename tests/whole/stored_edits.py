"""Edits of a checkpoint's stored configuration, tried one after another and watched from inside.

python -m tests.whole.stored_edits RUN TRIAL SEED COUNT URL FOUND.json train WORDS...
python -m tests.whole.stored_edits RUN TRIAL SEED COUNT URL FOUND.json eval WORDS...

Each edit is sealed with a digest that fits. A child forked for it runs the verb over the edited run
and reports what it started, opened and asked for; the first child runs over the run as it is, and
what that one starts is no finding.
"""

import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

from mmscale.checkpoint.files import step_folders
from tests.sealed import read_state_of, seal

PROCESSES = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn")
CANARY = "canary"


def hostile(draw: random.Random, url: str, trial: Path) -> Any:
    """A value that would be worth something to whoever stores it."""
    canary, marker = trial / CANARY, trial / "made"
    return draw.choice(
        [
            f"pipe:touch {marker}; cat {canary}/train-000000.tar",
            f"{url}/data",
            f"{url}/train-{{000000..000003}}.tar",
            "s3://attacker/data",
            "hf://datasets/attacker/data",
            str(canary),
            f"{canary}/secret.safetensors",
            f"{canary}/config.yaml",
            f"hf:{canary}",
            "hf:attacker/model",
            f"openclip:local-dir:{canary}",
            "openclip:hf-hub:attacker/model",
            f"timm:local-dir:{canary}",
            "timm:hf-hub:attacker/model",
            "pretrained",
            "online",
            True,
            None,
            -1,
            1e9,
            f"../../{CANARY}",
            [f"pipe:touch {marker}"],
            {"shards": f"pipe:touch {marker}"},
            {"trust_remote_code": True, "auto_map": {"AutoModel": "evil.Model"}},
        ]
    )


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place within a JSON value."""
    found = [path] if path else []
    if isinstance(value, dict):
        for key, inner in value.items():
            found += places(inner, (*path, key))
    return found


def edit(config: dict[str, Any], draw: random.Random, url: str, trial: Path) -> list[str]:
    """Change a stored configuration at one to three places; returns what was done."""
    done = []
    # What names something, more often than the rest: numbers open nothing.
    naming = ("name", "weights", "preset", "train", "eval", "table", "deepspeed", "cache", "wandb")
    for _ in range(draw.randint(1, 3)):
        known = places(config)
        worth = [path for path in known if str(path[-1]).endswith(naming)]
        path = draw.choice(worth if draw.random() < 0.7 else known)
        holder: Any = config
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = hostile(draw, url, trial)
        done.append(f"{'.'.join(map(str, path))}={holder[path[-1]]!r}")
    if draw.random() < 0.5:
        config["data"] |= {"allow_pipe": True}
        done.append("data.allow_pipe=True")
    return done


def watched(trial: Path, verb: str, words: list[str], pipe: int) -> None:
    """Run a verb in this process, which ends; its findings go to the pipe."""
    found: list[str] = []
    seen = (str(trial / CANARY), str(trial / "made"))

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        if event in PROCESSES:
            found.append(f"{event} {arguments[:2]}")
        elif event == "open" and isinstance(arguments[0], str) and arguments[0].startswith(seen):
            found.append(f"open {arguments[0]}")
        elif event == "socket.connect" and isinstance(arguments[1], tuple):
            found.append(f"connect {arguments[1]}")

    sys.addaudithook(look)
    said = os.open(trial / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    if verb == "train":
        from mmscale.train import main

        code = main(words)
    else:
        from mmscale.cli import main as command

        sys.argv = ["mmscale", *words]
        try:
            code = command() or 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    os.write(pipe, json.dumps({"code": code, "found": found}).encode())
    os._exit(0)


def attempt(trial: Path, verb: str, words: list[str]) -> dict[str, Any]:
    """Run a verb in a child; its exit code and what it did."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            watched(trial, verb, words, write)
        finally:
            os._exit(99)
    os.close(write)
    with os.fdopen(read, "rb") as results:
        content = results.read()
    os.waitpid(child, 0)
    result: dict[str, Any] = json.loads(content) if content else {"code": 1, "found": []}
    result["said"] = (trial / "said.txt").read_text("utf-8", "replace")
    return result


def main() -> None:
    """Try the edits; write what each did that the run as it is does not do."""
    run, trial, seed, count, url, to, verb, *words = sys.argv[1:]
    draw, folder = random.Random(int(seed)), Path(trial)
    import torch  # noqa: F401 - once for all children

    usual: set[str] = set()
    results = []
    for number in range(int(count) + 1):
        copy = folder / "run"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run, copy)
        checkpoint = step_folders(copy)[0]
        state, done = read_state_of(checkpoint), []
        if number:
            done = edit(state["config"], draw, url, folder)
            seal(checkpoint, state)
        result = attempt(folder, verb, words)
        usual |= set() if number else set(result["found"])
        result["found"] = [each for each in result["found"] if each not in usual]
        results.append({"edit": done, **result})
    Path(to).write_text(json.dumps(results), "utf-8")


if __name__ == "__main__":
    main()
