"""The list of what a run's files hold: damage is seen, kills at any moment are no damage."""

import os

import pytest
from kills import KilledError

from ddo_cli import files, ledger, rundir
from ddo_cli.files import LOCK, write_text
from ddo_cli.ledger import LEDGER, Ledger


@pytest.fixture
def place(tmp_path):
    """A directory with three files, written while its ledger was kept."""
    with ledger.kept(tmp_path):
        for name in ("a.txt", "sub/b.txt", "sub/c.txt"):
            write_text(tmp_path / name, f"content of {name}")
    return tmp_path


def test_damage_is_seen_and_what_is_not_listed_is_not_looked_at(place):
    (place / "other.txt").write_text("of a user")
    assert Ledger(place).problems() == {}
    (place / "a.txt").write_text("content of A.txt")
    (place / "sub" / "b.txt").write_text("")
    (place / "sub" / "c.txt").unlink()
    expected = {
        "a.txt": "is damaged (other content)", "sub/b.txt": "is damaged (0 bytes in place of 20)",
        "sub/c.txt": "is missing",
    }  # fmt: skip
    assert Ledger(place).problems() == expected
    assert Ledger(place).problems(place / "sub").keys() == {"sub/b.txt", "sub/c.txt"}
    assert ledger.damage(place / "a.txt") == expected["a.txt"]
    assert ledger.damage(place / "other.txt") is None


def test_large_files_are_read_only_where_asked(place, monkeypatch):
    monkeypatch.setattr(ledger, "SMALL", 4)
    (place / "a.txt").write_text("content of A.txt")
    assert Ledger(place).problems(is_read=lambda name: False) == {}
    assert Ledger(place).problems(is_read=lambda name: name == "a.txt").keys() == {"a.txt"}


@pytest.mark.parametrize("is_gone", [True, False], ids=["interrupted", "killed"])
def test_a_kill_between_the_line_and_the_renaming_is_no_damage(place, monkeypatch, is_gone):
    """Of a new file and of one that is there; killed, the temporary file stays."""

    rename = os.replace

    def killed(source, target):
        if target.name in ("a.txt", "new.txt"):
            raise KilledError
        rename(source, target)

    with monkeypatch.context() as patch, ledger.kept(place) as kept:
        patch.setattr(files.os, "replace", killed)
        if not is_gone:
            patch.setattr(kept, "void", lambda names: None)
            patch.setattr(files, "_remove", lambda place: None)
        for name in ("a.txt", "new.txt"):
            with pytest.raises(KilledError):
                write_text(place / name, "new")
    assert Ledger(place).problems() == {}
    assert len(list(place.glob(".*.whole"))) == (0 if is_gone else 2)
    with rundir.locked(place) as run_dir:
        run_dir.ledger.renew()
        write_text(place / "a.txt", "new")
    (place / "a.txt").write_text("content of a.txt")  # the one before could be a kill's, and is whole
    assert Ledger(place).problems() == {}
    (place / "a.txt").write_text("older")
    assert Ledger(place).problems().keys() == {"a.txt"}


def test_the_file_before_keeps_what_is_known_of_it(place):
    with ledger.kept(place):
        (place / "a.txt").write_text("damaged")
        write_text(place / "a.txt", "new", previous=place / "before.txt")
    assert (place / "before.txt").read_text() == "damaged"
    assert Ledger(place).problems().keys() == {"before.txt"}


def test_removed_files_and_directories_are_forgotten(place):
    with ledger.kept(place):
        files.remove(place / "sub")
        files.remove(place / "a.txt")
    assert not (place / "sub").exists()
    assert Ledger(place).problems() == {}


def test_a_growing_file_may_be_longer(place):
    with ledger.kept(place) as kept:
        for _ in range(2):
            with open(place / "log", "a") as file:
                file.write("12345\n")
            kept.note_start(place / "log")
    for content, is_good in (("12345\n12345\n", True), ("12345\n12345\n9", True), ("12345\n12345", False),
                             ("12345\n1234x\n", False), ("12345\n", False)):  # fmt: skip
        (place / "log").write_text(content)
        assert ("log" not in Ledger(place).problems()) == is_good, content


@pytest.mark.parametrize("content", ["", "{", '{"name": "a.txt"}\n', "[]\n", None])
def test_a_damaged_ledger_is_told_and_renewed(place, content):
    if content is None:
        (place / LEDGER).unlink()
    else:
        (place / LEDGER).write_text(content)
    assert Ledger(place).problems() == {}
    assert "cannot be seen" in (Ledger(place).own_problem() or "")
    assert "cannot be seen" in (Ledger(place).renew() or "")
    assert Ledger(place).own_problem() is None
    assert Ledger(place).renew() is None


def test_a_flipped_bit_of_the_ledger_is_seen(place):
    text = (place / LEDGER).read_bytes()
    for at in range(0, len(text), 7):
        (place / LEDGER).write_bytes(text[:at] + bytes([text[at] ^ 1]) + text[at + 1 :])
        assert Ledger(place).own_problem() is not None


def test_a_long_ledger_is_shortened(place):
    with ledger.kept(place) as kept:
        for number in range(100):
            write_text(place / "a.txt", str(number))
        kept.renew()
    assert len((place / LEDGER).read_text().splitlines()) < 10
    assert Ledger(place).problems() == {}
    assert Ledger(place).has_been(place / "a.txt", "content of a.txt")
    assert sorted(os.listdir(place)) == [LEDGER, "a.txt", "sub"]
    assert LOCK not in os.listdir(place)


def test_what_cannot_be_removed_is_told(place, monkeypatch, capsys):
    path = place / "unneeded"
    path.write_text("x")
    with monkeypatch.context() as patch:
        patch.setattr(type(path), "unlink", lambda *_, **__: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        files.remove(path)
    assert "unneeded could not be removed; it is not needed any more" in " ".join(capsys.readouterr().err.split())
    files.remove(path)
    assert not path.exists()
    assert not capsys.readouterr().err
