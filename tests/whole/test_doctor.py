"""The doctor as a command: on anybody's embeddings, and on a run that has only begun."""

import json

import numpy as np
import torch

from tests.whole.command import explain, run
from tests.whole.small_run import ALONE, words_for, write_settings


def rows(num, seed):
    """Images and captions that share what they mean."""
    rng = np.random.default_rng(seed)
    meaning = rng.normal(size=(num, 32))
    return [meaning + 0.3 * rng.normal(size=(num, 32)) for _ in range(2)]


def test_half_of_the_captions_of_strangers_files_are_mixed_up(tmp_path):
    image, text = rows(400, 0)
    text[:200] = np.roll(text[:200], 1, axis=0)[np.random.default_rng(1).permutation(200)]
    names = np.array([f"photos/{number}.jpg" for number in range(400)])
    order = np.random.default_rng(2).permutation(400)
    np.savez(
        tmp_path / "pairs.npz",
        image=image,
        text=text[order],
        image_ids=names,
        text_ids=names[order],
    )
    told = tmp_path / "told.json"
    page = tmp_path / "page.html"
    done = run(["mmscale", "doctor", tmp_path / "pairs.npz", "--json", told, "--out", page])
    assert done.returncode == 3, explain(done)
    diagnosis = json.loads(told.read_text("utf-8"))
    assert diagnosis["verdict"] == "shuffled_pairs"
    evidence = diagnosis["evidence"]
    assert 0.4 < evidence["matched_share_low"] <= 0.5 <= evidence["matched_share_high"] < 0.7
    assert "Images and captions do not belong together row by row" in done.stdout
    assert "good near 1" in done.stdout
    assert diagnosis["pairs"] == 400
    assert "mispaired_z below 2.5" in diagnosis["would_change"]
    shown = page.read_text("utf-8")
    for words in ("Shuffled pairs", "on 400 pairs", "good near 1", "image to text", "What would"):
        assert words in shown
    # Settings are of no use to who trained with other code.
    assert diagnosis["remedies"]
    assert not any("=" in remedy.split()[0] for remedy in diagnosis["remedies"])


def test_the_doctor_names_a_file_that_it_cannot_read(tmp_path):
    image, text = rows(64, 0)
    image[7] = 0.0
    np.savez(tmp_path / "zeros.npz", image=image, text=text)
    torch.save({"image": torch.tensor(text), "text": torch.tensor(text)}, tmp_path / "pairs.pt")
    for name, code, words in (
        ("absent.npz", 2, "no such run, checkpoint or npz"),
        ("zeros.npz", 4, "1 row (7) of `image` holds only zeros"),
        ("pairs.pt", 4, "is a torch file; write numpy arrays: np.savez("),
    ):
        done = run(["mmscale", "doctor", tmp_path / name])
        assert done.returncode == code, explain(done)
        assert words in done.stderr
        assert not done.stdout


def test_a_run_of_28_updates_is_too_early_to_diagnose(synthetic, tmp_path):
    words = [
        *words_for(synthetic, write_settings(tmp_path)),
        f"data.eval={synthetic.train}",
        "train.duration=28 steps",
        "optim.warmup=100 steps",
        "checkpoint.every=null",
        f"run.dir={tmp_path / 'run'}",
    ]
    done = run([*ALONE, *words])
    assert done.returncode == 0, explain(done)
    assert "too few updates" in done.stderr
    diagnosis = json.loads((tmp_path / "run" / "doctor.json").read_text("utf-8"))
    assert (diagnosis["verdict"], diagnosis["also"]) == ("too_few_samples", [])
    assert "Too early to say: 28 updates, still in the warm-up" in diagnosis["causes"][0]
    assert not any("warmup" in remedy for remedy in diagnosis["remedies"])
    done = run(["mmscale", "doctor", tmp_path / "run"])
    assert done.returncode == 3, explain(done)
    assert "Too early to say" in done.stdout
    assert "collapse" not in done.stdout.split("causes")[0]
