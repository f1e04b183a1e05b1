"""`mmscale plan`: what it predicts where it can be worked out by hand, and what it refuses."""

import json
import sys

import pytest
import torch
from PIL import Image

from mmscale.cli import entry
from mmscale.config.cluster import read_cluster
from mmscale.config.load import load_config
from mmscale.engine.footprint import footprint
from mmscale.engine.forecast import device_bytes, forecast
from mmscale.engine.memory import TOWER_ACTIVATIONS, UNZEROED, Workload, activations, holdings
from mmscale.engine.plan import plan_batch
from mmscale.engine.wire import Transfer, transfers
from mmscale.errors import ConfigError, explained
from mmscale.model.build import build_model
from mmscale.model.outline import outline
from mmscale.report.console import duration
from mmscale.report.forecast import tables
from tests.unit.model.whole_hf import save_whole

# Text of 48 tokens and images of 36 patches through transformers of known shape.
DEMO = ["demo", "engine.precision=fp32"]


def plan(*words, world=8, samples=100_000, cluster="a100", tokens=None):
    config = load_config([*DEMO, *words])
    return forecast(config, world, read_cluster(cluster), samples, tokens)


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["mmscale", "plan", *words])
    return explained(entry._invoke)


def test_the_outline_is_the_model():
    config = load_config(DEMO)
    whole, spec = build_model(config.model, config.data.image_size, 0)
    bare, bare_spec = outline(config.model, config.data.image_size)
    assert {n: p.shape for n, p in whole.named_parameters()} == {
        n: p.shape for n, p in bare.named_parameters()
    }
    assert (spec.image_size, spec.context_length) == (96, 48)
    assert (bare_spec.image_size, bare_spec.context_length) == (96, 48)


def test_of_towers_with_adapters_only_those_are_trained():
    adapter = "{kind: lora, rank: 4}"
    words = [f"model.{part}.adapter={adapter}" for part in ("vision", "text")]
    planned = forecast(load_config(["flickr30k", *words]), 1, read_cluster("a100"), 29_000, None)
    # Of each of twelve blocks: queries, keys, values (in one layer, or three), output, and an MLP.
    vision = 12 * 4 * ((384 + 3 * 384) + 2 * 384 + 2 * (384 + 4 * 384))
    text = 12 * 4 * (4 * 2 * 384 + 2 * (384 + 4 * 384))
    assert planned.seen.numel(True) == vision + text + 2 * 384 * 384 + 1
    assert planned.seen.numel(False) == 21_665_664 + 33_212_160


def test_towers_of_a_hub_are_planned_without_it():
    planned = forecast(load_config(["flickr30k"]), 1, read_cluster("a100"), 29_000, None)
    # ViT-S/16 and a MiniLM of 12 layers of 384 with 30,522 words; two heads of 384 x 384; a scale.
    assert planned.seen.numel(True) == 21_665_664 + 33_212_160 + 2 * 384 * 384 + 1


def test_flops_are_those_of_the_products():
    config = load_config(DEMO)
    seen = footprint(
        *outline(config.model, config.data.image_size),
        config,
        plan_batch(config, 2),
        48,
        torch.float32,
    )
    width, tokens, layers = 128, 48, 2
    products = layers * (12 * width * width * tokens + 2 * tokens * tokens * width)
    assert seen.towers["text"].forward == 2 * products * seen.rows
    # A backward computes a gradient for both factors of every product; attention's kernel computes
    # its scores again.
    ratio = seen.towers["text"].both / seen.towers["text"].forward
    assert 3 <= ratio < 3.1


def test_frozen_towers_keep_nothing_and_go_forward_only():
    planned = forecast(load_config(["flickr8k"]), 1, read_cluster("a100"), 6_000, 32)
    for work in planned.seen.towers.values():
        assert work.saved == 0
        assert work.both == work.forward


def test_state_is_divided_as_zero_divides_it():
    planned = plan()
    trained = planned.seen.numel(True)
    held = {
        name: {holding.name: holding.bytes for holding in holdings}
        for name, holdings in planned.memory.items()
    }
    assert held["accelerate"]["whole weights"] == 4 * trained
    for name in ("accelerate", "ZeRO-1", "ZeRO-2", "ZeRO-3"):
        assert held[name]["optimizer"] == pytest.approx(trained, rel=1e-3)
    assert held["ZeRO-3"]["weights"] == pytest.approx(trained / 2, rel=5e-3)
    offloaded = {h.name for h in planned.memory["ZeRO-3 + offload"] if h.host}
    assert offloaded == {"masters", "gradients", "optimizer"}


def test_rings_send_what_they_must():
    assert Transfer("x", "all-reduce", 800, 1, "").sent(8) == 1400
    assert Transfer("x", "all-gather", 800, 3, "").sent(8) == 2100


# Words of an objective, whether its logits are made in tiles, and modalities that are gathered.
OBJECTIVES = [
    ([], True, 1),
    (["loss.terms=[{kind: infonce}, {kind: vicreg}]"], True, 1),
    (["loss.terms=[{kind: vicreg}]"], True, 0),
    (["loss.terms=[{kind: infonce, label_smoothing: 0.1}]"], False, 2),
    (["negatives.mining.kind=hard"], False, 2),
    (["loss.terms=[{kind: infonce}, {kind: anchor}]"], True, 1),
    (["loss.terms=[{kind: infonce}, {kind: anchor, form: affinity}]"], False, 2),
    (["loss.terms=[{kind: infonce}, {kind: siglip, weight: 0.1}]"], False, 2),
]


def test_teachers_and_the_start_are_whole_on_every_rank(tmp_path):
    save_whole(tmp_path / "clip", "clip")
    terms = [f"{{kind: teacher, model: 'hf:{tmp_path / 'clip'}'}}", "{kind: infonce}"]
    others = ["{kind: anchor}", "{kind: teacher, model: 'openclip:ViT-B-32@openai'}"]
    planned = plan(f"loss.terms=[{', '.join([*terms, *others])}]", "model.embed_dim=12")
    for held in planned.memory.values():
        found = {holding.name: holding for holding in held}
        assert found["start"].bytes == pytest.approx(4 * planned.seen.numel(True), rel=1e-3)
        assert found["teachers"].bytes == pytest.approx(4 * (12_289 + 151_277_313), rel=1e-3)
    planned = plan("loss.terms=[{kind: infonce}, {kind: teacher, model: runs/latest}]")
    (held,) = (h for h in planned.memory["accelerate"] if h.name == "teachers")
    assert held.formula.endswith("; without runs/latest")
    assert not [holding for holding in plan().memory["accelerate"] if "teach" in holding.name]


def test_pairs_that_an_anchor_holds_pass_the_model_beside_the_batch():
    term = "loss.terms=[{kind: infonce}, {kind: anchor, data: old, rows: %d}]"
    alone = plan("loss.terms=[{kind: infonce}, {kind: anchor}]")
    rows = alone.batch.rank_rows
    # As many as the batch has: each rank's towers and heads see twice as many rows.
    held = plan(term % alone.batch.global_rows)
    assert (held.seen.rows, held.seen.passed) == (2 * rows, 2 * rows)
    for work, twice in zip(
        (*alone.seen.towers.values(), alone.seen.heads),
        (*held.seen.towers.values(), held.seen.heads),
        strict=True,
    ):
        assert twice.forward == 2 * work.forward
        # Of the heads the scale comes along once.
        assert twice.output == pytest.approx(2 * work.output, abs=8)
    tower_bytes = [
        next(part.bytes for part in each.memory["accelerate"] if part.name == TOWER_ACTIVATIONS)
        for each in (alone, held)
    ]
    assert tower_bytes[1] == pytest.approx(2 * tower_bytes[0], rel=0.01)
    # In chunks no more is kept at once, but as many more pass.
    cut = f"train.micro_batch_size={rows // 4}"
    few = plan("loss.terms=[{kind: infonce}, {kind: anchor}]", cut)
    more = plan(term % alone.batch.global_rows, cut)
    assert few.seen.towers == more.seen.towers
    assert (few.seen.chunks, more.seen.chunks) == (4, 8)
    assert more.here["accelerate"].compute > few.here["accelerate"].compute
    assert "more rows on each rank" in tables(more, False)
    assert "more rows" not in tables(few, False)
    with pytest.raises(ConfigError, match="8 ranks cannot share alike; give a multiple of 8"):
        plan(term % 7)


def test_what_a_loss_holds_and_gathers_follows_from_its_terms():
    config = load_config(DEMO)
    batch = plan_batch(config, 8)
    bare = outline(config.model, config.data.image_size)
    seen = footprint(*bare, config, batch, 48, torch.float32)
    for words, in_tiles, sides in OBJECTIVES:
        work = Workload(seen, load_config([*DEMO, *words]), batch, 0, torch.float32)
        (loss,) = (held for held in holdings(work, UNZEROED) if held.name == "loss")
        assert ("tiles" in loss.formula) == in_tiles, words
        gathered = [sent.times for sent in transfers(work, UNZEROED) if sent.name == "embeddings"]
        assert gathered == ([sides] if sides else []), words


def test_a_loss_in_strips_holds_no_table_of_rows_and_columns():
    """From some batch on, its memory grows with n and not with n^2."""
    config = load_config([*DEMO, "negatives.mining.kind=hard"])
    bare = outline(config.model, config.data.image_size)
    held = {}
    for rows in (1 << 14, 1 << 15, 1 << 16):
        sized = load_config(
            [*DEMO, "negatives.mining.kind=hard", f"train.global_batch_size={rows}"]
        )
        batch = plan_batch(sized, 1)
        seen = footprint(*bare, sized, plan_batch(config, 1), 48, torch.float32)
        work = Workload(seen, sized, batch, 0, torch.float32)
        (held[rows],) = (part.bytes for part in activations(work) if part.name == "loss")
    first, second, third = held.values()
    assert third - second == 2 * (second - first)
    assert first < 4 * (1 << 28)


def test_efficiency_falls_with_slower_links(tmp_path):
    text = (
        "{name: slow, gpus_per_node: 8, memory_gb: 80, within_node_gb_per_s: 300, "
        "between_nodes_gb_per_s: 1, peak_tflops: {bf16: 312, fp16: 312, tf32: 156, fp32: 19.5}}"
    )
    slow = tmp_path / "slow.yaml"
    slow.write_text(text)
    fast, slowed = plan().steps["accelerate"], plan(cluster=str(slow)).steps["accelerate"]
    assert fast[0].efficiency == slowed[0].efficiency, "within a node nothing changed"
    assert all(f.efficiency > s.efficiency for f, s in zip(fast[1:], slowed[1:], strict=True))
    assert [step.gpus for step in fast] == [8, 16, 32, 64, 128, 256, 512]


def test_the_command_prints_writes_and_draws(monkeypatch, capsys, tmp_path):
    figures, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    words = ["--world", "8", "--samples", "100000", "--json", str(figures), "--plot", str(picture)]
    assert run(monkeypatch, *DEMO, *words) == 0
    assert "4 x trained" not in capsys.readouterr().out
    assert run(monkeypatch, *DEMO, *words, "--formulas") == 0
    shown = capsys.readouterr().out
    assert "8 ranks x 16 rows x 1 chunk = 128 pairs" in shown
    for word in ("ZeRO-3 + offload", "all-gather", "steps", "4 x trained", "efficiency", "512"):
        assert word in shown
    written = json.loads(figures.read_text("utf-8"))
    assert written["predicted"] is True
    assert written["data"]["steps_per_epoch"] == 100_000 // 128
    entries = [*written["memory"]["ZeRO-2"], *written["wire"]["ZeRO-2"]]
    assert all(entry["formula"] for entry in entries)
    assert Image.open(picture).size[0] > 1000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.global_batch_size=100"], "not a multiple of 8 ranks"),
        (["data.captions=flat"], "data.captions=flat"),
        (["engine.deepspeed=nowhere.json"], "nowhere.json"),
        (["train.global_batch_size=1048576"], "do not fill one batch"),
    ],
)
def test_what_cannot_run_is_refused(monkeypatch, capsys, words, message):
    assert run(monkeypatch, *DEMO, *words, "--world", "8", "--samples", "100000") == 2
    assert message in capsys.readouterr().err


def test_a_file_that_contradicts_the_run_is_refused_with_both_values(tmp_path):
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, "gradient_clipping": 0.25}))
    with pytest.raises(ConfigError, match=r"gradient_clipping=0\.25 contradicts the run's 1\.0"):
        plan(f"engine.deepspeed={file}")


def test_a_model_that_does_not_fit_is_refused_with_what_does():
    with pytest.raises(ConfigError, match=r"needs .* GB a GPU.*train\.micro_batch_size=131072"):
        plan("train.global_batch_size=1048576", samples=10**8)


def test_fewer_chunks_are_advised_as_far_as_they_fit():
    def planned(rows):
        words = ["flickr30k", "train.global_batch_size=8192", f"train.micro_batch_size={rows}"]
        return forecast(load_config(words), 1, read_cluster("rtx4090"), 29_000, None)

    tight = planned(64)
    rows = 8192 // tight.chunks_wanted
    assert 64 < rows < 4096
    assert f"take: train.micro_batch_size={rows} instead of 64" in tables(tight, False)
    followed = planned(rows)
    assert followed.chunks_wanted == followed.batch.chunks
    assert device_bytes(followed.memory["accelerate"]) <= 0.9 * 24e9
    with pytest.raises(ConfigError, match=f"set train.micro_batch_size={rows}, or switch"):
        planned(2 * rows)


def test_the_fastest_way_that_fits_is_advised():
    planned = plan("engine.deepspeed=zero3_offload")
    times = {name: step.seconds for name, step in planned.here.items()}
    assert planned.chosen not in times
    assert planned.fastest == min(times, key=lambda name: times[name]) == "accelerate"
    assert "take: engine.deepspeed=null: nothing moves to the host" in tables(planned, False)
    slower = plan("engine.deepspeed=zero1")
    gain = slower.here["ZeRO-1"].seconds / slower.here["accelerate"].seconds
    assert f"take: engine.deepspeed=null: {gain:.2f} times as fast" in tables(slower, False)
    assert "take:" not in tables(plan(), False)


def test_the_time_of_a_run_is_that_of_its_updates():
    planned = plan("train.duration=3 epochs", samples=500_000_000)
    seconds = planned.here["accelerate"].seconds
    assert seconds == planned.steps["accelerate"][0].seconds
    epoch = 500_000_000 // 128 * seconds
    shown = tables(planned, False).splitlines()[1]
    assert f"an epoch about {duration(epoch)}, the run about {duration(3 * epoch)}" in shown
