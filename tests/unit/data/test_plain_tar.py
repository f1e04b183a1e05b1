"""The quick tar reading says what tarfile says, or nothing."""

import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmscale.data.tar import plain_members

NAMES = st.one_of(
    st.sampled_from(["a.jpg", "a.txt", "folder/b.json", "c.d.png", "folder/", "k" * 99 + "l.jpg"]),
    st.text(min_size=1, max_size=120),
)
MEMBERS = st.lists(
    st.tuples(NAMES, st.binary(max_size=1200), st.sampled_from([b"0", b"0", b"0", b"2", b"5"])),
    min_size=1,
    max_size=4,
)
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def tar_of(members, form=tarfile.USTAR_FORMAT):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, content, kind in members:
            member = tarfile.TarInfo(name)
            member.size, member.type = len(content), kind
            if kind == b"2":
                member.linkname = "elsewhere"
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def by_tarfile(content):
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        found = [(m.name, m.offset_data, m.offset_data + m.size) for m in tar]
        assert all(member.isreg() for member in tar.getmembers())
    return found


@given(MEMBERS, st.sampled_from(FORMATS), st.integers(0, 4096))
@settings(max_examples=150, deadline=None)
def test_it_agrees_with_tarfile_or_leaves_it_to_it(members, form, cut):
    try:
        content = tar_of(members, form)
    except (ValueError, UnicodeError):
        return
    for part in (content, content[: len(content) - cut]):
        found = plain_members(part)
        assert found is None or found == by_tarfile(part)


@given(st.integers(0, 3 * 512), st.integers(0, 255))
@settings(max_examples=300, deadline=None)
def test_it_agrees_about_damaged_headers(place, byte):
    content = bytearray(tar_of([("a.jpg", b"x" * 700, b"0"), ("a.txt", b"y", b"0")]))
    content[place] = byte
    found = plain_members(bytes(content))
    assert found is None or found == by_tarfile(bytes(content))


def test_what_pack_writes_is_plain(synthetic):
    for path in synthetic.train.glob("*.tar"):
        found = plain_members(path.read_bytes())
        assert found == by_tarfile(path.read_bytes())


@pytest.mark.parametrize("content", [b"", b"\0" * 1024, b"not a tar" * 100, b"\0" * 10])
def test_nothing_is_found_in_nothing(content):
    assert plain_members(content) is None
