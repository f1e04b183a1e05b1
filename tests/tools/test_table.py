"""Tables of figures over seeds."""

from tools.studies.table import spread, table_of


def test_mean_and_spread_over_seeds():
    assert spread([10.0, 12.0]) == "11.0 ± 1.4"
    assert spread([10.0]) == "10.0"
    assert spread([1, 2, 3], digits=2) == "2.00 ± 1.00"
    assert spread(["healthy", "healthy"]) == "healthy"
    assert spread(["unaligned", "healthy", "unaligned"]) == "unaligned 2, healthy 1"
    assert spread([10.0, "failed", 12.0]) == "11.0 ± 1.4, failed 1"
    assert spread([]) == "-"


def test_rows_and_columns_stand_as_they_come():
    entries = [("clip", "R@1", 10.0), ("clip", "R@1", 12.0), ("clip", "a|b", 3), ("dcl", "R@1", 4)]
    table = table_of(entries, "loss")
    assert table.text() == ("loss         R@1  a|b\nclip  11.0 ± 1.4  3.0\ndcl          4.0    -")
    assert table.markdown() == (
        "| loss | R@1 | a\\|b |\n"
        "| --- | ---: | ---: |\n"
        "| clip | 11.0 ± 1.4 | 3.0 |\n"
        "| dcl | 4.0 | - |"
    )
    assert table_of([], "loss").text() == "loss"
