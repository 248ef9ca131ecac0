"""Images that would be misread in silence, or never end being read."""

import json
import os
import struct
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image
from test_images import encoded, open_images, some_items, write_folder, write_zip

from ddo_cli.errors import DataError

ONE = encoded(some_items(1)[0])
LEVELS = np.arange(2 * 3 * 3).reshape(2, 3, 3) * 3500  # (2, 3, RGB) of 16 bits


def png_of_16_bits() -> bytes:
    """As Pillow cannot write: RGB (PNG's specification, 11.2)."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in LEVELS)
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 3, 2, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    content = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + content


PPM_OF_16_BITS = b"P6 3 2 65535\n" + LEVELS.astype(">u2").tobytes()


@pytest.mark.parametrize(("name", "content"), [("a.png", png_of_16_bits()), ("a.ppm", PPM_OF_16_BITS)])
def test_colours_of_16_bits_are_not_reduced_in_silence(tmp_path, ddo, name, content):
    """Pillow does so as it loads them."""
    folder = write_folder(tmp_path / "set", {name: content})
    with pytest.raises(DataError, match=rf"{name} has 16 bits a channel.*`ddo data .* --out set.zip --rgb`"):
        open_images(str(folder))
    assert "of 16 bits a channel, reduced to 8" in ddo("data", "set", "--out", "set.zip").stdout
    np.testing.assert_allclose(open_images(str(tmp_path / "set.zip")).items[0].transpose(1, 2, 0), LEVELS / 257, atol=1)


def test_colours_of_8_bits_in_other_words(tmp_path):
    """BMP counts the bits of a pixel, and PPM's levels may be fewer."""
    bmp = encoded(np.full((3, 2, 2), 255, np.uint8), "bmp")
    sixteen = bmp[:28] + struct.pack("<H", 16) + bmp[30:54] + b"\xff\x7f" * 4
    content = {"a.bmp": sixteen, "b.ppm": b"P6 2 2 100\n" + b"\x64" * 12}
    assert (open_images(str(write_folder(tmp_path / "set", content))).items == 255).all()


@pytest.mark.parametrize("mode", ["F", "I", "LAB"])
def test_modes_that_ddo_data_refuses_as_well(tmp_path, ddo, mode):
    (tmp_path / "set").mkdir()
    Image.new(mode, (4, 4)).save(tmp_path / "set" / "a.tif")
    with pytest.raises(DataError, match=rf"a\.tif has the mode {mode}; convert it to RGB of 8 bits with another"):
        open_images(str(tmp_path / "set"))
    assert f"a.tif has the mode {mode}" in ddo("data", "set", "--out", "set.zip", code=2).stderr


def test_cmyk_is_said(tmp_path, capsys):
    (tmp_path / "set").mkdir()
    Image.new("CMYK", (4, 4)).save(tmp_path / "set" / "a.jpg")
    open_images(str(tmp_path / "set"))
    assert "CMYK, as of a.jpg, becomes RGB without a colour profile" in capsys.readouterr().err


def test_pipes_and_devices_are_not_waited_for(tmp_path):
    folder = write_folder(tmp_path / "set", {"a.png": ONE})
    os.mkfifo(folder / "b.png")
    os.mkfifo(folder / "dataset.json")
    with pytest.raises(DataError, match=r"b\.png cannot be read as an image \(it is no file with content\)"):
        open_images(str(folder))
    for source in (folder / "b.png", "/dev/zero"):
        with pytest.raises(DataError, match="is a pipe or a device; give a folder"):
            open_images(str(source))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name(tmp_path):
    with zipfile.ZipFile(write_zip(tmp_path / "set.zip", {"a.png": ONE}), "a") as archive:
        archive.writestr("a.png", encoded(some_items(1, seed=1)[0]))
    with pytest.raises(DataError, match=r"holds a\.png more than once; unpack it"):
        open_images(str(tmp_path / "set.zip"))


def test_names_of_a_zip_with_backslashes(tmp_path, capsys):
    """As some programs for Windows write folders."""
    content = {f"{name}\\a.png": ONE for name in ("cat", "dog")}
    assert open_images(str(write_zip(tmp_path / "set.zip", content))).labels.tolist() == [-1, -1]
    assert r"'\' in names, such as cat\a.png, makes no folder" in " ".join(capsys.readouterr().err.split())


def test_images_that_are_listed_and_not_there(tmp_path, capsys):
    labels = json.dumps({"labels": [["a.png", 0], ["b.png", 1]]}).encode()
    found = open_images(str(write_folder(tmp_path / "set", {"a.png": ONE, "dataset.json": labels})))
    assert found.labels.tolist() == [0]
    said = " ".join(capsys.readouterr().err.split())
    assert "warning:" in said
    assert "dataset.json lists 1 of 2 items that are not there, such as b.png; is the set copied whole?" in said


def test_arrays_beside_those_that_are_read(tmp_path, capsys):
    images = some_items(2)
    np.savez(tmp_path / "set.npz", arr_0=images, images=images[::-1], label=[0, 1], arr_1=[1, 0])
    assert open_images(str(tmp_path / "set.npz")).labels.tolist() == [0, 1]
    said = capsys.readouterr().err
    assert "set.npz: images left out: arr_0 comes first" in said
    assert "set.npz: arr_1 left out: label comes first" in said


def test_labels_of_some(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for name, labels in {"a": [0, 1], "b": [-1, -1]}.items():
        np.savez(folder / f"{name}.npz", arr_0=some_items(2), label=labels)
    np.savez(tmp_path / "one.npz", arr_0=some_items(2), label=[-1, 5])
    for source, num in ((folder, "2 of 4"), (tmp_path / "one.npz", "1 of 2")):
        with pytest.raises(DataError, match=rf"{num} items have no class \(-1\); give each its class"):
            open_images(str(source))
