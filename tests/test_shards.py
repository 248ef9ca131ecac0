"""Image sets in tars, as webdataset has them, and in Parquet files."""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest
from test_captions import READ, TEXTS
from test_images import encoded, some_items, write_folder

from ddo_cli.data.images import open_images
from ddo_cli.data.items import identity
from ddo_cli.data.stream import open_stream
from ddo_cli.engines import prepare
from ddo_cli.errors import DataError

ITEMS = some_items(3)
PICTURES = [encoded(item) for item in ITEMS]


def tar(files, *further):
    """A tar of files by name; further: TarInfos without content."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for member in further:
            archive.addfile(member)
    return content.getvalue()


def samples(rows):
    """Of webdataset: 000.png and 000.txt, and so on."""
    return {
        f"{row:03d}.{kind}": data
        for row in rows for kind, data in (("png", PICTURES[row]), ("txt", TEXTS[row].encode()))
    }  # fmt: skip


def parquet(rows, keep=None, **columns):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = [{"bytes": PICTURES[row], "path": f"{row}.png"} for row in rows]
    content = io.BytesIO()
    columns = {"image": images, "text": [TEXTS[row] for row in rows]} | columns
    table = pa.table({name: column for name, column in columns.items() if column is not None})
    pq.write_table(table.slice(0, keep), content, row_group_size=2)
    return content.getvalue()


SETS = {
    "tar": lambda: {"set.tar": tar(samples(range(3)))},
    "tar unsorted": lambda: {"set.tar": tar(dict(reversed(samples(range(3)).items())))},
    "tar with folders": lambda: {"set.tar": tar({f"./a/../x/{k}": v for k, v in samples(range(3)).items()})},
    "shards": lambda: {"set/s-0.tar": tar(samples([0, 1])), "set/s-1.tar": tar(samples([2])), "set/README.md": b"x"},
    "parquet": lambda: {"set.parquet": parquet(range(3))},
    "files of parquet": lambda: {
        "set/data/train-0.parquet": parquet([0, 1]), "set/data/train-1.parquet": parquet([2]), "set/README.md": b"x",
    },
    "captions": lambda: {"set.parquet": parquet(range(3), text=None, caption=TEXTS, score=[1, 2, 3])},
}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_sets_with_captions(tmp_path, capsys, name):
    content = SETS[name]()
    write_folder(tmp_path, content)
    source = str(tmp_path / next(iter(content)).partition("/")[0])
    found, said = open_images(source), capsys.readouterr().err
    assert found.captions == READ
    assert (found.labels.tolist(), found.num_classes) == ([0, 1, 2], 3)
    np.testing.assert_array_equal(found.items, ITEMS)
    assert "3 captions from" in said
    assert ("columns that are not read: score" in said) == (name == "captions")
    assert "no labels" not in said
    # The same as a folder of the files, to a run that is continued; read in any order, and by workers.
    folder = {f"{row}.png": data for row, data in enumerate(PICTURES)}
    folder |= {f"{row}.txt": text.encode() for row, text in enumerate(TEXTS)}
    assert identity(found) == identity(open_images(str(write_folder(tmp_path / "folder", folder))))
    stream = open_stream(source)
    assert stream.identity is not None
    reader = pickle.loads(pickle.dumps(stream.reader))
    np.testing.assert_array_equal(reader.read(np.array([2, 0])), ITEMS[[2, 0]])
    assert open_images(source, num=2).captions == tuple(READ[row] for row in open_stream(source, 2).positions)
    # And made alike by `ddo data`.
    figures = prepare.run(source, tmp_path / "out.zip", size=(2, 2))
    assert (figures["num_images"], figures["captions"]) == (3, 3)
    assert open_images(str(tmp_path / "out.zip")).captions == READ


def test_labels(tmp_path):
    write_folder(tmp_path, {"set.parquet": parquet(range(3), text=None, label=[1, 0, 1])})
    found = open_images(str(tmp_path / "set.parquet"))
    assert (found.labels.tolist(), found.num_classes, found.captions) == ([1, 0, 1], 2, ())
    index = json.dumps({"labels": [["a/000.png", 4], ["a/001.png", 2]]}).encode()
    write_folder(
        tmp_path, {"set.tar": tar({"a/000.png": PICTURES[0], "a/001.png": PICTURES[1], "dataset.json": index})}
    )
    assert open_images(str(tmp_path / "set.tar")).labels.tolist() == [4, 2]
    classes = {f"{name}/0.png": PICTURES[0] for name in "ab"}
    write_folder(tmp_path, {"classes.tar": tar(classes)})
    assert open_images(str(tmp_path / "classes.tar")).labels.tolist() == [-1, -1]  # as in a zip
    assert open_stream(str(tmp_path / "set.tar")).shape == ITEMS.shape[1:]


def test_images_beside_archives_are_the_set(tmp_path, capsys):
    write_folder(tmp_path / "set", {"a.png": PICTURES[0], "old.tar": tar(samples([1, 2]))})
    assert len(open_images(str(tmp_path / "set")).items) == 1
    assert "may hold images are left out: 1 .tar" in capsys.readouterr().err


def link(kind):
    member = tarfile.TarInfo("004.png")
    member.type, member.linkname = kind, "/etc/passwd"
    return member


def sized(size):
    member = tarfile.TarInfo("004.png")
    member.size = size
    return member.tobuf()


def damaged(data):
    """Its second half is noise."""
    return data[: len(data) // 2] + np.random.default_rng(0).bytes(len(data) - len(data) // 2)


WHOLE = tar(samples(range(3)))
WRONG = {
    "a symbolic link": (lambda: {"set.tar": tar(samples([0]), link(tarfile.SYMTYPE))}, r"004\.png is a link; pack the"),
    "a hard link": (lambda: {"set.tar": tar(samples([0]), link(tarfile.LNKTYPE))}, r"004\.png is a link; pack the"),
    "a device": (lambda: {"set.tar": tar(samples([0]), link(tarfile.CHRTYPE))}, r"004\.png is a device"),
    "a name twice": (lambda: {"set.tar": tar(samples([0]), tarfile.TarInfo("000.png"))}, "holds 000.png more than"),
    "cut between members": (lambda: {"set.tar": WHOLE[:2048]}, "is not a whole tar .no header at byte 2048"),
    "cut within a member": (lambda: {"set.tar": WHOLE[:700]}, "is not a whole tar .unexpected end of data"),
    "damaged": (lambda: {"set.tar": damaged(WHOLE)}, "is not a whole tar"),
    "a size beyond the end": (lambda: {"set.tar": WHOLE[:2048] + sized(1 << 40)}, "is not a whole tar"),
    "no tar": (lambda: {"set.tar": b"nothing" * 1000}, "is not a whole tar"),
    "no images": (lambda: {"set.tar": tar({"a.txt": b"a"})}, "holds no images"),
    "a sample without caption": (
        lambda: {"set/a.tar": tar({**samples([0]), "001.png": PICTURES[1]})}, "image a.tar/001.png has no caption"
    ),
    "a caption without image": (lambda: {"set.tar": tar({**samples([0]), "001.txt": b"x"})}, "001.txt has no image"),
    "two kinds": (lambda: {"set/a.tar": WHOLE, "set/b.parquet": b"x"}, "give a folder of one of the two kinds"),
    "splits": (
        lambda: {"set/data/train-0.tar": WHOLE, "set/data/test-0.tar": WHOLE},
        r"several splits \(data/test-0.tar, data/tr",
    ),
    "mixed sizes": (
        lambda: {"set.tar": tar({**samples([0]), "1.png": encoded(some_items(1, size=6)[0]), "1.txt": b"x"})},
        "all images must have one size",
    ),
    "no parquet": (lambda: {"set.parquet": (parquet([]), b"nothing" * 100)[1]}, "is not a whole file of Parquet"),
    "parquet cut": (lambda: {"set.parquet": parquet(range(3))[:-9]}, "is not a whole file of Parquet"),
    "no images of parquet": (lambda: {"set.parquet": parquet([0], image=None)}, "has the columns text; images are"),
    "other images": (lambda: {"set.parquet": parquet([0], image=["a.png"])}, "the column image is string, not bytes"),
    "both captions": (lambda: {"set.parquet": parquet([0], caption=["x"])}, "in the columns text and caption; drop"),
    "a caption of numbers": (lambda: {"set.parquet": parquet([0], text=[3])}, "row 0: text = 3 is no text"),
    "a missing caption": (lambda: {"set.parquet": parquet([0, 1], text=["a", None])}, "row 1: text is missing"),
    "a list of captions": (lambda: {"set.parquet": parquet([0], text=[["a", "b"]])}, r"text = \['a', 'b'\] is no text"),
    "a bad label": (lambda: {"set.parquet": parquet([0], text=None, label=[-2])}, "label = -2 is no class number"),
    "no rows": (lambda: {"set.parquet": parquet([0], keep=0)}, "has no rows"),
    "only paths": (
        lambda: {"set.parquet": parquet([0, 1], image=[{"bytes": PICTURES[0]}, {"bytes": None, "path": "1.png"}])},
        "it has no bytes, only a path",
    ),
    "other columns": (
        lambda: {"set/a.parquet": parquet([0]), "set/b.parquet": parquet([1], text=None)}, "other columns than set/a"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "match"), WRONG.values(), ids=WRONG.keys())
def test_what_is_refused(tmp_path, monkeypatch, make, match):
    content = make()
    monkeypatch.chdir(write_folder(tmp_path, content))
    with pytest.raises(DataError, match=match) as raised:
        open_images(next(iter(content)).partition("/")[0])
    assert len(str(raised.value)) <= 300


def test_without_pyarrow(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    write_folder(tmp_path, {"set.parquet": b"x"})
    with pytest.raises(DataError, match=r"need the library pyarrow.*pip install 'ddo-cli\[parquet\]'"):
        open_images(str(tmp_path / "set.parquet"))
