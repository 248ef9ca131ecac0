"""Archives made to harm: names that point out of them, links, headers that lead back, members that unpack to much."""

import gzip
import io
import json
import tarfile
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
from PIL import Image
from test_cifar import batches, write_tar

from ddo_cli.data.images import open_images
from ddo_cli.errors import DataError


def png(value=0):
    text = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(text, "png")
    return text.getvalue()


def test_names_that_point_out_of_a_zip_are_names_only(tmp_path):
    """They are read like others, and nothing beside the zip is read or written."""
    for name in ("c.png", "dataset.json"):
        (tmp_path / name).write_bytes(b"outside")
    inside = tmp_path / "in"
    inside.mkdir()
    with zipfile.ZipFile(inside / "set.zip", "w") as archive:
        for number, name in enumerate(("/etc/a.png", "../../b.png", "./c.png", "C:\\d.png", "\x1b[31m\u202e.png")):
            archive.writestr(name, png(number))
    found = open_images(str(inside / "set.zip"))
    assert sorted(np.asarray(found.items[:])[:, 0, 0, 0].tolist()) == [0, 1, 2, 3, 4]
    assert {path.name for path in tmp_path.rglob("*")} == {"c.png", "dataset.json", "in", "set.zip"}


def headers(*changes, size=0):
    """A tar whose headers are changed after their checksum was made right again."""
    text = io.BytesIO()
    with tarfile.open(fileobj=text, mode="w") as archive:
        for name, kind, link in changes:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, link
            archive.addfile(member)
    raw = bytearray(text.getvalue())
    if size:  # of the first member: base 256, negative
        raw[124:136] = b"\xff" * 4 + size.to_bytes(8, "big", signed=True)
        raw[148:156] = b" " * 8
        raw[148:156] = b"%06o\0 " % sum(raw[:512])
    return bytes(raw)


TARS = {
    "a link out of it": headers(("data_batch_1", tarfile.SYMTYPE, "../../etc/passwd")),
    "a hard link": headers(("data_batch_1", tarfile.LNKTYPE, "/etc/passwd")),
    "a link to itself": headers(("data_batch_1", tarfile.SYMTYPE, "data_batch_1")),
    "a device": headers(("data_batch_1", tarfile.CHRTYPE, "")),
    "a header that leads back": headers(("x", tarfile.REGTYPE, ""), ("y", tarfile.REGTYPE, ""), size=-512),
    "headers about headers": b"".join(headers(("x", kind, ""))[:512] for kind in (b"L", b"K", b"x", b"g") * 400),
    "an end in a sparse header": headers(("x", b"S", ""))[:512],
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", TARS)
def test_tars(name, packed, tmp_path):
    path = tmp_path / ("set.tar.gz" if packed else "set.tar")
    path.write_bytes(gzip.compress(TARS[name]) if packed else TARS[name])
    start = time.process_time()
    said = r"has no data_batch_1|is not a whole \.tar\.gz" if packed else "is not a whole tar|pack the files themselves"
    with pytest.raises(DataError, match=said):
        open_images(str(path))
    assert time.process_time() - start < 2
    assert list(tmp_path.iterdir()) == [path]


def test_a_batch_is_found_by_its_name_alone(tmp_path):
    """A tar names its folder as it likes; nothing is unpacked to disk."""
    content = {f"../../{name}": raw for name, raw in batches().items()}
    odd, plain = write_tar(tmp_path / "a.tar.gz", content), write_tar(tmp_path / "b.tar.gz", batches())
    assert np.array_equal(open_images(str(odd)).items, open_images(str(plain)).items)
    assert {path.name for path in tmp_path.iterdir()} == {"a.tar.gz", "b.tar.gz"}
    twice = write_tar(tmp_path / "c.tar.gz", {**content, "x/data_batch_3": content["../../data_batch_3"]})
    with pytest.raises(DataError, match="holds data_batch_3 more than once"):
        open_images(str(twice))


def test_members_do_not_unpack_to_more_than_they_say(tmp_path):
    bomb, path = bytes(400 << 20), tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("a.png", bomb)
    raw = path.read_bytes()
    assert len(raw) < 4 << 20
    lies = raw.replace((400 << 20).to_bytes(4, "little"), (1000).to_bytes(4, "little"))  # of both directories
    for content, problem in ((raw, "it claims 400 MB, which no image has"), (lies, "bad CRC-32")):
        path.write_bytes(content)
        tracemalloc.start()
        with pytest.raises(DataError, match=rf"a\.png cannot be read as an image \({problem}"):
            open_images(str(path))
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
        tracemalloc.stop()


def test_an_index_that_unpacks_to_much(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", png())
        archive.writestr("dataset.json", json.dumps({"labels": [["a.png", 0]]}))
    raw = (tmp_path / "set.zip").read_bytes()
    size = len(json.dumps({"labels": [["a.png", 0]]})).to_bytes(4, "little")
    where = raw.rfind(b"PK\1\2")
    assert raw[where + 24 : where + 28] == size
    (tmp_path / "set.zip").write_bytes(raw[: where + 24] + (2**31).to_bytes(4, "little") + raw[where + 28 :])
    with pytest.raises(DataError, match=r"dataset\.json has 2,048 MB for 1 images"):
        open_images(str(tmp_path / "set.zip"))
