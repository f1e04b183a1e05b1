"""Runs over shards in a bucket: the same rows as from files, and one sentence where it is shut."""

import time

import pytest

from tests.bucket_server import breaking, running_buckets
from tests.whole.command import explain, run
from tests.whole.small_run import course, succeed, torchrun, words_for, write_settings


@pytest.fixture(scope="module")
def server(synthetic):
    with running_buckets() as running:
        running.upload(synthetic.train, "train")
        running.upload(synthetic.val, "val")
        yield running


@pytest.mark.slow
def test_two_ranks_of_two_workers_train_alike_from_a_bucket_over_connections_that_break(
    server, synthetic, tmp_path
):
    words = [*words_for(synthetic, write_settings(tmp_path)), "data.workers=2"]
    words += ["train.duration=8 steps", "data.shuffle_buffer=40"]
    succeed([*torchrun(), *words, f"run.dir={tmp_path / 'files'}"])
    with breaking(server.endpoint, after=40_000, cuts=12) as way:
        far = ["data.train=s3://pairs/train", "data.eval=s3://pairs/val"]
        succeed(
            [*torchrun(), *words, *far, f"run.dir={tmp_path / 'bucket'}"],
            env=server.environment(way.endpoint),
        )
        assert way.done >= 6
    assert course(tmp_path / "bucket") == course(tmp_path / "files")
    kept = (tmp_path / "bucket/config.yaml").read_text()
    assert "s3://pairs/train" in kept
    assert server.key[1] not in kept


@pytest.mark.slow
def test_a_bucket_that_is_shut_ends_every_rank_with_one_sentence(server, synthetic, tmp_path):
    words = [*words_for(synthetic, write_settings(tmp_path)), "data.train=s3://pairs/train"]
    environment = server.environment() | {"AWS_SECRET_ACCESS_KEY": "guess-it"}
    began = time.monotonic()
    with server.locked():
        done = run([*torchrun(), *words, f"run.dir={tmp_path / 'run'}"], env=environment)
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("mmscale: ")]
    assert len(told) == 2, explain(done)
    for line in told:
        assert "the credentials are not accepted (403 SignatureDoesNotMatch)" in line
        assert "set AWS_ACCESS_KEY_ID" in line
    assert done.stderr.count("exitcode  : 4") >= 1, explain(done)
    assert "guess-it" not in done.stdout + done.stderr
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("verb", ["index", "verify"])
def test_a_verb_that_may_not_read_the_bucket_says_so_in_one_sentence(server, verb):
    environment = server.environment() | {"AWS_SECRET_ACCESS_KEY": "guess-it"}
    with server.locked():
        done = run(["mmscale", verb, "s3://pairs/train"], env=environment)
    assert done.returncode == 4, explain(done)
    told = (done.stdout + done.stderr).splitlines()
    assert sum("the credentials are not accepted (403 Sig" in line for line in told) == 1
    assert len(told) == 1 + (verb == "verify"), explain(done)
