"""A manifest whose lists are read late says the same as one that is read at once."""

import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmscale.data.grouping import Identities
from mmscale.data.manifest import Manifest, Shard, parse_manifest, read_manifest, write_manifest
from mmscale.data.unread import Unread, load_json
from mmscale.errors import DataError

ids = st.integers(0, 2**63 - 1)


@st.composite
def shards(draw):
    size = draw(st.integers(0, 5))

    def some(values):
        return draw(st.tuples(*[values] * size))

    # Made in the test: type checks draw random numbers, which strategies must not.
    return {
        "name": draw(
            st.text(min_size=1).filter(lambda t: t[0] != "." and not set(t) & set("/\\\0"))
        ),
        "bytes": size * 512 + 1024,
        "sha256": "0" * 64,
        "samples": size,
        "offsets": tuple(range(0, size * 512, 512)),
        "captions": some(st.integers(1, 9)),
        "identities": draw(
            st.one_of(
                st.none(),
                st.tuples(
                    *[st.tuples(*[ids] * size)] * 2,
                    st.one_of(st.none(), st.tuples(*[ids] * size)),
                    st.one_of(st.none(), st.tuples(*[st.integers(-1, 9)] * size)),
                ),
            )
        ),
    }


def _identities(parts):
    return None if parts is None else Identities(*parts)


hostile = st.one_of(
    st.text(), st.sampled_from(['x": [', '"offsets": [1', "offsets", "\\", '\\": [', "\0list", "]"])
)


@settings(max_examples=80, deadline=None)
@given(
    shards=st.lists(shards(), min_size=1, max_size=4, unique_by=lambda shard: shard["name"]),
    source=hostile,
)
def test_late_and_early_reading_agree(tmp_path_factory, shards, source):
    folder = tmp_path_factory.mktemp("manifest")
    known = [shard | {"identities": _identities(shard["identities"])} for shard in shards]
    write_manifest(folder, Manifest("train", source, tuple(Shard(**shard) for shard in known)))
    late = read_manifest(folder, lazily=True)
    early = read_manifest(folder)
    assert isinstance(late.shards[0].offsets, Unread)
    assert late == early
    for one, other in zip(late.shards, early.shards, strict=True):
        assert list(one.captions) == list(other.captions)
        assert len(one.offsets) == len(other.offsets)


@settings(max_examples=100, deadline=None)
@given(
    content=st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), hostile),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(
                st.one_of(hostile, st.sampled_from(["offsets", "images"])), inner, max_size=3
            ),
        ),
        max_leaves=8,
    )
)
def test_any_json_is_read_or_refused(content):
    """Lists of numbers under the names of long lists come late, everything else as it is."""

    def late(value, name=None):
        if isinstance(value, Unread):
            return [int(number) for number in value]
        if isinstance(value, dict):
            return {key: late(part) for key, part in value.items()}
        return [late(part) for part in value] if isinstance(value, list) else value

    try:
        found = late(load_json(json.dumps(content).encode()))
    except (ValueError, TypeError, OverflowError):
        return
    assert found == content


def manifest(**changes):
    shard = {
        "name": "a.tar",
        "bytes": 4096,
        "sha256": "0" * 64,
        "samples": 2,
        "offsets": [0, 512],
        "captions": [1, 2],
        **changes,
    }
    content = {"format": "mmscale-manifest", "version": 1, "source": "x", "split": None}
    return json.dumps({**content, "shards": [shard]}).encode()


@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        ({"offsets": [0, 100]}, "offsets", "no tar block"),
        ({"offsets": [512, 0]}, "offsets", "do not rise"),
        ({"offsets": [0, 1.5]}, "offsets", "not a list of counts"),
        ({"offsets": [0, True]}, "offsets", "not a list of counts"),
        ({"captions": [1, 0]}, "captions", "sample 1 has no caption"),
        ({"captions": [1, -1]}, "captions", "not a list of counts"),
        ({"captions": [1, 2**70]}, "captions", "not a list of counts"),
        ({"captions": [1, {}]}, "captions", "not a list of counts"),
    ],
)
def test_what_is_wrong_is_said_when_it_is_looked_into(changes, field, said):
    content = manifest(**changes)
    with pytest.raises(DataError, match=said):
        parse_manifest("m", content)
    (shard,) = parse_manifest("m", content, lazily=True).shards
    with pytest.raises(DataError, match=f"m: shard a.tar: .*{said}"):
        list(getattr(shard, field))


@pytest.mark.parametrize(
    "content",
    [
        manifest(offsets=[0]),
        manifest(captions=[]),
        manifest(captions=[1, [2]]),
        manifest(offsets="0"),
        manifest(offsets={"\0list": 7}),
        manifest()[:-40],
        b'{"offsets": [',
        b"",
    ],
)
def test_what_the_shape_shows_is_said_at_once(content):
    for lazily in (False, True):
        with pytest.raises(DataError):
            parse_manifest("m", content, lazily=lazily)


def test_late_lists_travel_to_other_processes():
    whole = parse_manifest("m", manifest(), lazily=True)
    again = pickle.loads(pickle.dumps(whole))
    assert again == whole
    assert again.shards[0].offsets[1] == 512
    assert again.shards[0].offsets[-1:].tolist() == [512]
