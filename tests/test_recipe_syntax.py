"""Recipes and key=value overrides that are no YAML, or YAML made to take memory or time: one line, with the place."""

import time

import pytest

from ddo_cli.errors import RecipeError
from ddo_cli.recipe import load, syntax

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
DIGITS = "9" * 4400
BAD = {
    "an integer of 4,400 digits": (f"seed: {DIGITS}", "line 1: a number of 4,400 characters"),
    "a hexadecimal one": ("seed: 0x" + "f" * 5000, "a number of 5,002 characters"),
    "an octal one": ("seed: 0" + "7" * 9000, "a number of 9,001 characters"),
    "laughs": (LAUGHS, "line .*: more than 10,000 values"),
    "an alias in itself": ("a: &x [1, *x]", "line 1: more than 20 values within another"),
    "a mapping in itself": ("a: &x {b: *x}", "more than 20 values within another"),
    "a merge of itself": ("a: &x {<<: *x}", "more than 20 values within another"),
    "depth": ("[" * 800, "values within another"),
    "depth of blocks": ("- " * 900 + "x", "RecursionError|more than 20"),
    "a repeated key": ("seed: 1\nname: x\nseed: 2", "line 3: the key 'seed' is given twice; leave one out"),
    "one inside": ("finetune: {lr: 1, lr: 2}", "line 1: the key 'lr' is given twice"),
    "a tab": ("finetune:\n\tlr: 1", r"line 2: found character '\\t' that cannot start any token"),
    "a NUL": ("name: a\0b", "position 7: the character 0x0 that no text holds; save it as UTF-8"),
    "Latin-1": ("name: \xe9".encode("latin-1"), "position 6: .* save it as UTF-8"),
    "a weight file": (b"\x80\x02\x00\x00", "position 0: .* save it as UTF-8"),
    "half of UTF-16": (b"\xff\xfea", "save it as UTF-8"),
    "two documents": ("a: 1\n---\nb: 2", "line 2: but found another document"),
    "a date that is none": ("name: 2024-99-99", "ValueError: month must be"),
    "an integer of a tag": ("seed: !!int x", "ValueError"),
    "an empty one": ("seed: !!int ''", "IndexError"),
    "a truth value": ("seed: !!bool maybe", "KeyError"),
    "code": ("a: !!python/object/apply:os.system [ls]", "line 1: could not determine a constructor"),
    "a list as a key": ("? [a]\n: b", "found unhashable key"),
    "an unknown alias": ("a: *b", "found undefined alias"),
    "length": ("#" * 200_000, "it has .* characters, and a recipe a few thousand"),
    "a name that controls the terminal": ("'\x1b': 1\n'\x1b': 2", "position 1: the character 0x1b"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_faults_are_named(name, tmp_path):
    text, message = BAD[name]
    path = tmp_path / "r.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    start = time.process_time()
    with pytest.raises(RecipeError, match=message) as caught:
        load.load(str(path))
    assert time.process_time() - start < 2
    assert str(caught.value).startswith((f"{path}, line ", f"{path} is not YAML: "))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300 + len(str(path))
    if isinstance(text, str):
        with pytest.raises(RecipeError) as caught:
            load.load("quickstart", [f"finetune.lr={text}"])
        assert all(len(line) < 300 for line in str(caught.value).split("\n"))


@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16"])
def test_marks_of_byte_order_are_read(coding, tmp_path):
    (tmp_path / "r.yaml").write_bytes("# é\nname: e\nseed: 5\nfinetune: {lr: 1e-4}\n".encode(coding))
    recipe = load.load(str(tmp_path / "r.yaml"))
    assert (recipe.name, recipe.seed, recipe.finetune.lr) == ("e", 5, 1e-4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("=1", "not of the form"),
        ("finetune..lr=1", "a key is a section and a name"),
        (".=1", "a key is a section and a name"),
        (".".join("a" * 2000) + "=1", "a key is a section and a name"),
        ("x" * 4000 + "=1", "unknown key 'xxx"),
        (f"finetune.{DIGITS}.lr=1", "unknown key 'finetune.999"),
        ("finetune.lr=\x1b[31m", "position 0: the character 0x1b"),
        ("finetune.lr=[red]", r"finetune\.lr = \['red'\]"),
        ("\u202efinetune.lr=1", r"unknown key '\\u202efinetune'"),
        ("finetune.lr={a: {b: [1, {c: 2}]}}", "finetune.lr = "),
        ("1=2", "unknown key '1'"),
        ("seed.x=1", "command line: seed.x=1: 'seed' is a value, not a section"),
        ("finetune=" + "{a: " * 30 + "1" + "}" * 30, "more than 20 values within another"),
    ],
)
def test_overrides(override, message):
    with pytest.raises(RecipeError, match=message) as caught:
        load.load("quickstart", [override])
    assert all(line.isprintable() and len(line) < 300 for line in str(caught.value).split("\n"))


def test_values_of_other_kinds_are_named(tmp_path):
    for text in (
        "1: 2",
        "null: 3",
        "true: x",
        "2024-01-01: x",
        "finetune: [1]",
        "name: {a: 1}",
        "seed: 1.5",
        "- a",
        "x",
    ):
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(RecipeError, match=r"r\.yaml"):
            load.load(str(tmp_path / "r.yaml"))
    assert syntax.parse("{a: &x [1], b: *x, 'c': 1e-3, <<: {d: .inf}}") == {
        "a": [1],
        "b": [1],
        "c": 1e-3,
        "d": float("inf"),
    }
