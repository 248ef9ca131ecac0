"""Captions of image sets: .txt files beside the images, and metadata.jsonl."""

import json
import zipfile

import numpy as np
import pytest
from test_images import either, encoded, some_items, write_folder
from test_items import model

from ddo_cli.data.images import open_images
from ddo_cli.data.items import check_fits, identity
from ddo_cli.engines import prepare
from ddo_cli.errors import DataError

ITEMS = some_items(3)
PICTURES = {f"{name}.png": encoded(item) for name, item in zip("abc", ITEMS, strict=True)}
TEXTS = ("a red cup", "a blue  cup\non a table\n", "ein grüner Becher")
READ = ("a red cup", "a blue cup on a table", "ein grüner Becher")  # white space is one blank
SIDECARS = {f"{name}.txt": text.encode() for name, text in zip("abc", TEXTS, strict=True)}


def metadata(**texts: object) -> bytes:
    lines = [json.dumps({"file_name": f"{name}.png", "text": text, "score": 1}) for name, text in texts.items()]
    return "\n".join(lines).encode() + b"\n\n"


@either
@pytest.mark.parametrize("folder", ["", "photos/"])
def test_a_label_is_the_number_of_a_caption(tmp_path, write, folder, capsys):
    for number in "123":
        (tmp_path / number).mkdir()
    by_sidecar = {folder + name: content for name, content in {**PICTURES, **SIDECARS}.items()}
    found = open_images(str(write(tmp_path / "1", by_sidecar)))
    assert "3 captions from .txt" in (said := capsys.readouterr().err)
    assert "1 captions have several lines" in said
    assert "left out" not in said
    by_line = {**{folder + name: content for name, content in PICTURES.items()}}
    by_line[f"{folder}metadata.jsonl"] = metadata(c=TEXTS[2], a=TEXTS[0], b=TEXTS[1])
    listed = open_images(str(write(tmp_path / "2", by_line)))
    assert "keys of" in capsys.readouterr().err
    for each in (found, listed):
        assert each.captions == READ
        assert (each.labels.tolist(), each.num_classes) == ([0, 1, 2], 3)
        np.testing.assert_array_equal(each.items, ITEMS)
    assert identity(found) == identity(listed)
    other = {**by_sidecar, f"{folder}a.txt": b"another"}
    changed = identity(open_images(str(write(tmp_path / "3", other))))
    assert changed["captions_sha256"] != identity(found)["captions_sha256"]
    assert changed["data_sha256"] == identity(found)["data_sha256"]


def test_a_part_of_a_set_and_an_archive_keep_captions(tmp_path):
    root = write_folder(tmp_path / "set", {**PICTURES, **SIDECARS, "c.png": b"damaged"})
    two = open_images(str(write_folder(tmp_path / "whole", {**PICTURES, **SIDECARS})), num=2)
    assert (two.labels.tolist(), two.num_classes) == ([0, 1], 2)
    assert len(two.captions) == 2
    assert set(two.captions) < set(READ)
    figures = prepare.run(str(root), tmp_path / "set.zip", size=(4, 4))  # leaves the damaged picture out
    assert (figures["captions"], figures["num_classes"]) == (2, 0)
    assert open_images(str(tmp_path / "set.zip")).captions == READ[:2]
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive, zipfile.ZipFile(tmp_path / "set.zip") as made:
        for name in made.namelist()[:-1]:
            archive.writestr(name, made.read(name))
        archive.writestr("dataset.json", json.dumps(json.loads(made.read("dataset.json")) | {"captions": ["one"]}))
    with pytest.raises(DataError, match="captions must be a list of 2 texts"):
        open_images(str(tmp_path / "bad.zip"))


WRONG = {
    "a caption without image": ({**SIDECARS, "d.txt": b"x"}, r"caption d\.txt has no image of its name; add"),
    "an image without caption": ({"a.txt": b"x", "b.txt": b"y"}, r"image c\.png has no caption; write it into c\.txt"),
    "not UTF-8": ({**SIDECARS, "a.txt": "ü".encode("latin-1")}, r"a\.txt is not UTF-8 text \(byte 0\)"),
    "both kinds": ({**SIDECARS, "metadata.jsonl": metadata(a="x", b="y", c="z")}, "keep one of the two kinds"),
    "labels, too": ({**SIDECARS, "dataset.json": b'{"labels": null}'}, "has labels in dataset.json and captions in"),
    "one text for two": ({**SIDECARS, "a.jpg": PICTURES["a.png"]}, "would share one caption"),
    "no line of an image": ({"metadata.jsonl": metadata(a="x", b="y")}, r"image c\.png has no caption"),
    "a line of no image": ({"metadata.jsonl": metadata(a="x", b="y", c="z", d="w")}, r"a caption of d\.png, which"),
    "a line twice": ({"metadata.jsonl": metadata(a="x") * 2}, r"line 3 lists a\.png again"),
    "no JSON": ({"metadata.jsonl": b"{"}, "line 1 is malformed"),
    "no file name": ({"metadata.jsonl": b'{"text": "x"}'}, "line 1 is malformed .*'file_name' is missing"),
    "no text": ({"metadata.jsonl": metadata(a=3)}, "line 1: text = 3 is no text"),
    "mixed sizes": ({**SIDECARS, "b.png": encoded(some_items(1, size=6)[0])}, "all images must have one size"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "match"), WRONG.values(), ids=WRONG.keys())
def test_wrong_captions(tmp_path, monkeypatch, content, match):
    monkeypatch.chdir(write_folder(tmp_path, {f"set/{name}": data for name, data in {**PICTURES, **content}.items()}))
    with pytest.raises(DataError, match=match) as raised:
        open_images("set")
    assert len(str(raised.value)) <= 300


def test_no_images_or_other_files(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        open_images(str(tmp_path / "empty"))
    others = {"README.txt": b"about", "metadata.jsonl": b'{"file_name": "a.png", "score": 3}\n'}
    found = open_images(str(write_folder(tmp_path / "set", {**PICTURES, **others})))
    assert (found.captions, found.num_classes) == ((), 0)
    assert "files that are no images are left out: 1 .jsonl, 1 .txt" in capsys.readouterr().err


def test_captions_are_no_classes(tmp_path, capsys):

    found = open_images(str(write_folder(tmp_path / "set", {**PICTURES, **SIDECARS})))
    with pytest.raises(DataError, match="3 images with captions where the model has 10 classes"):
        check_fits(found, model(ITEMS.shape[1:], 10))
    check_fits(found, model(ITEMS.shape[1:], 0))
    assert "captions are not read" in capsys.readouterr().err
