from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geosurge.archive.sources.patterns import Patterns


@pytest.mark.parametrize(
    ("pattern", "matched", "not_matched"),
    [
        ("*.jpg", [b"a.jpg", b"x/y/a.jpg", b".jpg"], [b"a.JPG", b"a.jpg/b"]),
        ("/*.jpg", [b"a.jpg"], [b"x/a.jpg"]),
        ("x/*.jpg", [b"x/a.jpg"], [b"x/y/a.jpg", b"y/x/a.jpg"]),
        ("**/x", [b"x", b"a/x", b"a/b/x"], [b"ax", b"x/a"]),
        ("x/**", [b"x/a", b"x/a/b"], [b"x", b"a/x/b"]),
        ("x/**/y", [b"x/y", b"x/a/y", b"x/a/b/y"], [b"xy", b"x/ay"]),
        ("x/**/**/y", [b"x/y", b"x/a/b/y"], [b"x/ay"]),
        ("**", [b"x", b"x/y"], []),
        ("/**", [b"x", b"x/y"], []),
        ("?", ["é".encode(), b"\xe9", b"a/b"], [b"ab"]),
        ("[a-c]", [b"b"], [b"d", b"-"]),
        ("[!a-c]", [b"d"], [b"b"]),
        ("[^a-c]", [b"d"], [b"b"]),
        ("[]a-]", [b"]", b"a", b"-"], [b"b"]),
        ("[[:digit:]x]", [b"5", b"x"], [b"d", b":"]),
        ("x[/]y", [], [b"x/y"]),
        ("\\*", [b"*"], [b"x", b"\\*"]),
        ("\\!x", [b"!x"], [b"x"]),
        ("\\#x", [b"#x"], [b"x"]),
        ("x  ", [b"x"], [b"x  "]),
        ("x\\ ", [b"x "], [b"x"]),
        (" x", [b" x"], [b"x"]),
        ("a.b+(c)$", [b"a.b+(c)$"], [b"aab+(c)$"]),
        ("x*y", [b"x\ny"], [b"x\ny\n"]),
    ],
)
def test_what_a_pattern_matches(pattern: str, matched: list[bytes], not_matched: list[bytes]) -> None:
    patterns = Patterns.parse([pattern])
    assert [patterns.match(path) for path in matched] == [True] * len(matched)
    assert [patterns.match(path) for path in not_matched] == [None] * len(not_matched)


def test_a_slash_at_the_end_is_for_folders() -> None:
    patterns = Patterns.parse(["x/", "/y/z/"])
    assert [patterns.match(path, is_folder=True) for path in (b"x", b"a/x", b"y/z", b"a/y/z")] == [
        True,
        True,
        True,
        None,
    ]
    assert [patterns.match(path) for path in (b"x", b"a/x", b"y/z")] == [None] * 3


def test_the_last_pattern_that_matches_decides() -> None:
    patterns = Patterns.parse(["# all but one", "", "*.jpg", "!keep.jpg", "/keep.jpg"])
    assert [patterns.match(path) for path in (b"a.jpg", b"x/keep.jpg", b"keep.jpg", b"a.png")] == [
        *(True, False, True, None)
    ]


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("!", "names nothing"),
        ("/", "names nothing"),
        ("a\\", "ends with a backslash"),
        ("[a", "bracket that is not closed"),
        ("[]", "bracket that is not closed"),
        ("[z-a]", "range that ends before it begins"),
        ("[[:vowel:]]", "unknown class"),
    ],
)
def test_a_pattern_that_can_match_nothing_is_refused(pattern: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Patterns.parse(["*.jpg", pattern])


@given(st.text("ab*?[]!^-\\/. #", max_size=12), st.binary(max_size=12))
def test_any_line_is_a_pattern_or_refused(line: str, path: bytes) -> None:
    try:
        patterns = Patterns.parse([line])
    except ValueError:
        return
    assert patterns.match(path) in {True, False, None}


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/"), min_size=1, max_size=12))
def test_an_escaped_name_matches_itself_alone(name: str) -> None:
    patterns = Patterns.parse(["".join(f"\\{character}" for character in name)])
    assert patterns.match(name.encode())
    assert patterns.match(name.encode() + b"x") is None
