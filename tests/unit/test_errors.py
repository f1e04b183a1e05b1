"""What is told of a failure."""

import pytest

from mmscale.errors import gist


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "[/build/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.1]:1234",
            "Connection closed by peer [10.0.0.1]:1234",
        ),
        ("../csrc/c10d/Utils.hpp:783: no answer\nframe #0", "no answer"),
        (
            "timed out after 3000ms, (127.0.0.1, 29500)",
            "timed out after 3000ms, (127.0.0.1, 29500)",
        ),
        ("", "RuntimeError"),
    ],
)
def test_a_librarys_error_is_told_without_its_source(text, told):
    assert gist(RuntimeError(text)) == told
