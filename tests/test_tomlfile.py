"""TOML with line numbers, and written back."""

import tomllib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bitfront.errors import ConfigError
from bitfront.tomlfile import dumps, parse, read

ODD = '''\
# a = "a comment with [brackets] and = signs"
title = "x" # ] " '

[a]
b.c = 1
b."d.e" = 2
"quo ted" = [1, 2] # [
'lit#eral' = { in = 1, line = "}" }
[a.list]
values = [
    "[not a header]",   # ]
    [1, 2], # [
    # inner = 5
]
after = 1
[ "b 1" . 'c.2' ]
text = """
[nor]
this = 3 \\""" still
"""
literal = \'\'\'
[x]
\'\'\'
last = true
[a.list.deeper]   # comment
k=1
"tab	\\U0001F600" = "\u2028 \\\\"
[[tables]]
n = 1
[[tables]]
n = 2
["a] # = b"]
k = 1
'''


@pytest.mark.parametrize(
    ("key", "line"),
    [
        (("title",), 2),
        (("a",), 4),
        (("a", "b", "c"), 5),
        (("a", "b", "d.e"), 6),
        (("a", "b"), 5),
        (("a", "quo ted"), 7),
        (("a", "lit#eral"), 8),
        (("a", "lit#eral", "line"), 8),  # inside of an inline table: the line of the table
        (("a", "list"), 9),
        (("a", "list", "values"), 10),
        (("a", "list", "after"), 15),
        (("b 1", "c.2"), 16),
        (("b 1", "c.2", "text"), 17),
        (("b 1", "c.2", "literal"), 21),
        (("b 1", "c.2", "last"), 24),
        (("a", "list", "deeper", "k"), 26),
        (("a", "list", "deeper", "tab\t\U0001f600"), 27),
        (("tables",), 28),
        (("a] # = b", "k"), 33),
        (("a", "list", "missing"), 9),  # the nearest table around it
        (("nor",), None),
        (("x",), None),
        (("inner",), None),
    ],
)
def test_every_key_has_its_line(key, line):
    assert parse(ODD, "odd.toml").line(key) == line


def test_the_values_are_those_of_the_standard_library():
    assert parse(ODD, "odd.toml").values == tomllib.loads(ODD)


names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=8)
scalars = st.one_of(
    st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False), names
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(names, inner, max_size=3)),
    max_leaves=8,
)


@given(st.dictionaries(names, values, max_size=5))
@example({"a": {}, "b": {"c": {}}})
@example({"a": 'quote " back \\ slash', "tab\t": "\x00\x7f\u2028", "": {"": 1}})
@example({"a": 1e300, "b": -0.0, "c": 1e16, "d": 5e-324, "e": [[], {}, {"x": [1.5]}]})
def test_what_is_written_can_be_read_again(table):
    text = dumps(table)
    assert tomllib.loads(text) == table
    assert text.endswith("\n") or not table


@given(st.dictionaries(names, st.dictionaries(names, scalars, min_size=1, max_size=3), min_size=1, max_size=3))
def test_the_line_of_what_was_written_is_where_it_stands(table):
    document = parse(dumps(table), "x")
    for outer, part in table.items():
        for inner in part:
            line = document.line((outer, inner))
            # The key alone, on one line, parses to that key.
            assert list(tomllib.loads(dumps(table).split("\n")[line - 1])) == [inner]


def test_none_is_left_out_and_na_inside_of_a_list():
    assert tomllib.loads(dumps({"a": None, "b": [None, 1], "c": {"d": None, "e": 1}})) == {
        "b": ["NA", 1],
        "c": {"e": 1},
    }


def test_what_toml_cannot_hold_is_a_type_error():
    with pytest.raises(TypeError, match="cannot be written to a configuration"):
        dumps({"a": object()})


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a = 1\nb = \nc = 2\n", 2),
        ("a = 1\na = 2\n", 2),
        ("[a]\nx = 1\n[a]\n", 3),
        ('a = "x\n', 1),
        ("a = [1,\n2,\n", None),
    ],
)
def test_what_is_no_toml_is_named_with_its_line(text, line):
    with pytest.raises(ConfigError, match="this is not valid TOML: ") as caught:
        parse(text, "bad.toml")
    assert caught.value.file == "bad.toml"
    assert caught.value.line == line or (line is None and caught.value.line >= 2)
    assert str(caught.value).startswith(f"bad.toml:{caught.value.line}: ")


def test_a_file_that_cannot_be_read_says_why(tmp_path):
    with pytest.raises(ConfigError, match=r"none.toml: cannot read the configuration: No such file"):
        read(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match=r"cannot read the configuration: Is a directory"):
        read(tmp_path)
    (tmp_path / "latin.toml").write_bytes("a = 'ä'".encode("latin-1"))
    with pytest.raises(
        ConfigError, match=r"latin.toml:1: cannot read the configuration: it is not UTF-8 text .byte 0xe4.; save"
    ):
        read(tmp_path / "latin.toml")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a=" + b"[" * 1000 + b"]" * 1000, r":1: this is nested more than 64 deep"),
        (b"\na=" + b"{a=" * 1000 + b"}" * 1000, r":2: this is nested more than 64 deep"),
        (b"a." * 5000 + b"a=1", r":1: this is nested more than 64 deep"),
        (b"[" + b'"a" . ' * 5000 + b"a]", r":1: this is nested more than 64 deep"),
        (b"a = 1\nb = " + b"9" * 5000, r"this is not valid TOML: .*digits"),
        ("a = 1".encode("utf-16"), r"it is UTF-16 text, and TOML is UTF-8; save it as UTF-8"),
        ("a = 1".encode("utf-32"), r"it is UTF-32 text"),
        (b"#" * (2**24 + 1), r"more than 16 MiB"),
        (b"a = 'x\0'", r"not valid TOML"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value,
)
def test_what_no_configuration_is(tmp_path, data, message):
    (tmp_path / "x.toml").write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        read(tmp_path / "x.toml")


@pytest.mark.parametrize(
    "text",
    [
        "a = '''" + "[" * 100 + "'''",
        'a = """' + "[.]" * 100 + '\\\\""" ""\n"""',
        'a = """' + "[" * 100 + '\\""""',
        'a = "' + ".[" * 100 + '\\"[[["',
        "# " + "[." * 100 + "\na = 1",
        "a = [" + "1.5, " * 100 + "]",
        "".join(f"a.b{i}.c = {i}.5\n" for i in range(100)),
    ],
)
def test_what_only_looks_deep_is_read_as_tomllib_reads_it(text):
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        with pytest.raises(ConfigError, match="not valid TOML"):
            parse(text, "x")
    else:
        assert parse(text, "x").values == values


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "x.toml").write_bytes(b"\xef\xbb\xbfa = 1\r\nb = 2\r\n")
    assert read(tmp_path / "x.toml").values == {"a": 1, "b": 2}
    assert read(tmp_path / "x.toml").line(("b",)) == 2
