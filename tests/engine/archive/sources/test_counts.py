from __future__ import annotations

from geosurge.archive.sources import ScanCounts


def counted(*names: str) -> ScanCounts:
    counts = ScanCounts()
    for name in names:
        counts.add_other_file(name.encode())
    return counts


def test_what_was_passed_over_is_told_by_kind_most_frequent_first() -> None:
    counts = counted("a.txt", "b/c.TXT", "README", "a.txt.bak", "d.txt")
    counts.ignored, counts.links = 1200, 3
    assert str(counts) == ("5 other files (3 .txt, 1 without an extension, 1 .bak), 1,200 hidden or ignored")
    assert str(counted("a.mov")) == "1 other file (1 .mov)"
    assert str(ScanCounts(ignored=1)) == "1 hidden or ignored"
    assert str(ScanCounts(links=1)) == ""


def test_a_shard_is_read_only_where_it_is_named() -> None:
    assert str(counted("s.tar")) == "1 other file (1 .tar); name .tar files as sources to have them read"


def test_names_without_end_take_no_memory_without_end() -> None:
    counts = counted(*(f"a.{number}" for number in range(5000)), "b.7", "b.7")
    assert counts.other_files == counts.kinds.total() == 5002
    assert len(counts.kinds) < 1100
    assert str(counts) == "5,002 other files (3 .7, 1 .0, 1 .1, 1 .2, 1 .3, 4,995 others)"


def test_a_kind_is_shown_on_one_line() -> None:
    assert str(counted("a.\n\x1b")) == "1 other file (1 .\\x0a\\x1b)"
