"""What is told of a failure."""

import pytest

from mmscale.errors import gist, told


@pytest.mark.parametrize(
    ("text", "first"),
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
def test_gist_of_a_librarys_error_lacks_its_source(text, first):
    assert gist(RuntimeError(text)) == first


def test_told_names_the_signal_of_a_decoding_process_from_the_cause_of_the_error():
    error = RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")
    error.__cause__ = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    assert "a decoding process (pid 7) was ended from outside (Killed)" in str(told(error))
