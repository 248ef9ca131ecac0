"""`ddo data`: pictures of any kind -> a zip of equal images."""

import io
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddo_cli import files
from ddo_cli.commands.options import size_of
from ddo_cli.data.images import open_images
from ddo_cli.data.pictures import Header, Preparation
from ddo_cli.engines import prepare
from ddo_cli.errors import DataError, UsageError

RGB = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)  # wider than high


def save(path: Path, image: Image.Image, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def images_of(path: Path) -> np.ndarray:
    return np.asarray(open_images(str(path)).items)


def prepared(tmp_path: Path, image: Image.Image, name: str = "a.png", *, save_as=None, **options) -> np.ndarray:
    """The image (C, H, W) that one picture becomes."""
    source, out = tmp_path / "one", tmp_path / "one.zip"
    for old in (*source.glob("*"), out):
        old.unlink(missing_ok=True)
    save(source / name, image, **(save_as or {}))
    prepare.run(str(source), out, **options)
    return images_of(out)[0]


# --- One picture


def test_center_is_the_crop_and_filter_of_edm(tmp_path):
    """Bytes equal to those of EDM's dataset_tool.py, run on such pictures, for center-crop and for no transform."""
    picture = Image.fromarray(RGB)
    square = Image.fromarray(RGB[:, 4:44]).resize((16, 16), Image.Resampling.LANCZOS)
    whole = picture.resize((16, 16), Image.Resampling.LANCZOS)
    size = (16, 16)
    assert np.array_equal(prepared(tmp_path, picture, size=size), np.asarray(square).transpose(2, 0, 1))
    assert np.array_equal(prepared(tmp_path, picture, size=size, crop="none"), np.asarray(whole).transpose(2, 0, 1))
    odd = Image.fromarray(RGB[:, :47])  # rows and columns (H - 40) // 2 to (H + 40) // 2, as EDM's slices
    assert np.array_equal(prepared(tmp_path, odd, size=(40, 40)), RGB[:, 3:43].transpose(2, 0, 1))
    wide = prepared(tmp_path, picture, size=(24, 12))  # the largest part of these proportions
    assert np.array_equal(
        wide, np.asarray(Image.fromarray(RGB[8:32]).resize((24, 12), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    )


def test_center_adm_halves_by_means(tmp_path):
    """While the shorter side is twice too large; then bicubic to it, then the centre (adm.md of the paper's code)."""
    even = np.repeat(np.repeat(RGB, 2, 0), 2, 1)  # whose means of 2 x 2 are RGB
    halved = prepared(tmp_path, Image.fromarray(even), size=(40, 40), crop="center-adm")
    assert np.array_equal(halved, RGB[:, 4:44].transpose(2, 0, 1))
    scaled = np.asarray(Image.fromarray(RGB).resize((36, 30), Image.Resampling.BICUBIC))[:, 3:33]
    found = prepared(tmp_path, Image.fromarray(RGB), size=(30, 30), crop="center-adm")
    assert np.array_equal(found, scaled.transpose(2, 0, 1))
    with pytest.raises(UsageError, match="center-adm makes squares"):
        prepared(tmp_path, Image.fromarray(RGB), size=(30, 20), crop="center-adm")


def test_center_celeba_keeps_140_pixels(tmp_path):
    """Then bilinear weights over the area of each new pixel; smaller pictures are used whole."""
    large = np.tile(RGB, (8, 5, 1))[:218, :178]
    found = prepared(tmp_path, Image.fromarray(large), size=(64, 64), crop="center-celeba")
    part = Image.fromarray(large[39:179, 19:159]).resize((64, 64), Image.Resampling.BILINEAR)
    assert np.array_equal(found, np.asarray(part).transpose(2, 0, 1))
    with pytest.raises(UsageError, match="center-celeba makes squares"):
        prepared(tmp_path, Image.fromarray(large), size=(30, 20), crop="center-celeba")


def test_pad_neither_crops_nor_enlarges(tmp_path):
    """As EDM's tool makes MNIST 32 x 32."""
    digit = RGB[:28, :28, 0]
    found = prepared(tmp_path, Image.fromarray(digit), size=(32, 32), crop="pad")
    assert np.array_equal(found, np.pad(digit, 2)[None])
    wide = prepared(tmp_path, Image.fromarray(RGB), size=(24, 24), crop="pad", background=(9, 8, 7))
    assert np.array_equal(wide[:, 0, 0], [9, 8, 7])
    inner = Image.fromarray(RGB).resize((24, 20), Image.Resampling.LANCZOS)
    assert np.array_equal(wide[:, 2:22], np.asarray(inner).transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("form", "turned"), [("jpeg", True), ("png", True), ("webp", True), ("tiff", True), ("png", False)]
)
def test_exif_orientation_is_applied(tmp_path, form, turned):
    half = np.zeros((16, 24, 3), np.uint8)
    half[:, 12:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6 if turned else 1  # 6: to be turned by 90 degrees clockwise
    image = prepared(tmp_path, Image.fromarray(half), f"a.{form}", save_as={"exif": exif})
    assert image.shape == ((3, 24, 16) if turned else (3, 16, 24))
    bright = image[:, 12:] if turned else image[:, :, 12:]
    assert bright.min() > 250 > 5 > image.min()


@pytest.mark.parametrize("background", [(255, 255, 255), (10, 20, 30)])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_transparent_pixels_lie_on_the_background(tmp_path, mode, background):
    image = Image.new("RGB", (4, 4), (0, 0, 0))
    image.putpixel((1, 1), (200, 200, 200))
    image, options = image.quantize(2) if mode == "P" else image.convert(mode), {}
    if mode in ("RGBA", "LA"):
        image.putalpha(image.convert("L").point(lambda value: 255 if value else 0))
    else:
        options = {"transparency": {"P": image.getpixel((0, 0)), "L": 0, "RGB": (0, 0, 0)}[mode]}
    found = prepared(tmp_path, image, save_as=options, background=background)
    assert len(found) == (1 if mode in ("L", "LA") and len(set(background)) == 1 else 3)
    assert found[:, 0, 0].tolist() == list(background[: len(found)])
    assert found[:, 1, 1].tolist() == [200] * len(found)


def test_half_transparent_pixels_are_mixed(tmp_path):
    image = Image.new("RGBA", (2, 2), (100, 0, 200, 128))
    assert np.abs(prepared(tmp_path, image).astype(int)[:, 0, 0] - [177, 127, 227]).max() <= 1


@pytest.mark.parametrize(
    ("name", "dtype"), [("a.png", np.uint16), ("a.tif", np.uint16), ("a.tif", ">u2"), ("a.pgm", np.uint16)]
)
def test_16_bits_are_rounded_to_8(tmp_path, name, dtype):
    levels = np.array([[0, 128, 129, 257, 385, 386, 65535]])
    if name == "a.pgm":
        (tmp_path / "one").mkdir()
        (tmp_path / "one" / name).write_bytes(b"P5 7 1 65535\n" + levels.astype(">u2").tobytes())
        prepare.run(str(tmp_path / "one"), tmp_path / "one.zip")
        found = images_of(tmp_path / "one.zip")[0]
    else:
        found = prepared(tmp_path, Image.fromarray(levels.astype(dtype)), name)
    assert found.tolist() == [[[0, 0, 1, 1, 1, 2, 255]]]


def test_modes(tmp_path):
    picture = Image.fromarray(RGB)
    assert len(prepared(tmp_path, picture.convert("L"))) == 1
    assert len(prepared(tmp_path, picture.convert("L"), mode="RGB")) == 3
    assert np.array_equal(prepared(tmp_path, picture, mode="L")[0], np.asarray(picture.convert("L")))
    assert len(prepared(tmp_path, picture.convert("CMYK"), "a.jpg")) == 3
    with pytest.raises(DataError, match=r"a\.tif has the mode F"):
        prepared(tmp_path, Image.fromarray(RGB[..., 0].astype(np.float32)), "a.tif")


# --- A set


@pytest.fixture
def mixed(tmp_path) -> Path:
    root, picture = tmp_path / "my pictures", Image.fromarray(RGB)
    save(root / "10" / "a.png", picture)
    save(root / "9" / "b.gif", picture, save_all=True, append_images=[picture.rotate(180)])
    save(root / "9" / "c.bmp", picture.convert("L"))
    save(root / "9" / "d.tif", picture.crop((0, 0, 20, 30)))
    (root / "10" / "broken.jpg").write_bytes(b"junk")
    (root / "10" / "cut.png").write_bytes((root / "10" / "a.png").read_bytes()[:-900])
    (root / "10" / ".DS_Store").write_bytes(b"junk")
    (root / "10" / "notes.txt").write_bytes(b"junk")
    return root


def test_the_archive_of_a_mixed_folder(mixed, tmp_path, ddo):
    plan = json.loads(ddo("data", mixed, "--out", "set.zip", "--size", 16, "--dry-run", "--json").stdout)
    assert not (tmp_path / "set.zip").exists()
    done = ddo("data", mixed, "--out", "set.zip", "--size", 16, "--json")
    made = json.loads(done.stdout)
    assert (plan["num_images"], made["num_images"], made["left_out"]) == (5, 4, 2)  # a cut file shows late
    assert made["effects"] == {"first_frame": 1, "grey_to_rgb": 1, "cropped": 4, "reduced": 4}
    assert made["shape"] == [3, 16, 16]
    assert {key: made[key] for key in ("size", "crop", "filter")} == {
        "size": "16x16",
        "crop": "center",
        "filter": "lanczos",
    }
    assert made["bytes"] == (tmp_path / "set.zip").stat().st_size
    said = " ".join(done.stderr.split())
    assert "left out: 1 .txt" in said
    assert "left out, since they cannot be used: 10/broken.jpg cannot be read as an image" in said
    assert "and 1 more" in said
    with zipfile.ZipFile(tmp_path / "set.zip") as archive:
        names = [*(f"00000/img{number:08d}.png" for number in range(4)), "dataset.json"]
        assert archive.namelist() == names
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        labels = json.loads(archive.read("dataset.json"))["labels"]
        assert labels == [list(pair) for pair in zip(names[:-1], [10, 9, 9, 9], strict=True)]
    found = open_images(str(tmp_path / "set.zip"))
    assert found.labels.tolist() == [10, 9, 9, 9]  # numeric names are numbers
    assert found.classes == {"9": "9", "10": "10"}


def test_size_on_disk_is_known_before(mixed, tmp_path):
    (mixed / "10" / "cut.png").unlink()
    plan = prepare.run(str(mixed), tmp_path / "set.zip", size=(16, 16), dry_run=True)
    assert plan["bytes"] == prepare.run(str(mixed), tmp_path / "set.zip", size=(16, 16))["bytes"]


def test_the_same_bytes_from_a_folder_a_zip_and_a_prepared_set(mixed, tmp_path, monkeypatch):
    options = {"size": (16, 16), "mode": "RGB"}
    prepare.run(str(mixed), tmp_path / "a.zip", **options)
    with zipfile.ZipFile(tmp_path / "source.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(mixed.rglob("*.*")):
            archive.write(file, file.relative_to(mixed).as_posix())
            archive.writestr(f"__MACOSX/{file.parent.name}/._{file.name}", b"junk")
    monkeypatch.setattr(prepare, "available_cores", lambda: 1)
    monkeypatch.setattr(prepare, "CHUNK", 1)
    prepare.run(str(tmp_path / "source.zip"), tmp_path / "b.zip", **options)
    prepare.run(str(tmp_path / "a.zip"), tmp_path / "c.zip", **options)
    whole = (tmp_path / "a.zip").read_bytes()
    assert whole == (tmp_path / "b.zip").read_bytes()
    assert whole == (tmp_path / "c.zip").read_bytes()


def test_arrays_and_embedded_sets(tmp_path):
    items = RGB[None].repeat(3, 0)
    np.savez(tmp_path / "set.npz", arr_0=items, label=[2, 0, 1])
    prepare.run(str(tmp_path / "set.npz"), tmp_path / "a.zip", size=(20, 20))
    found = open_images(str(tmp_path / "a.zip"))
    assert (found.items.shape, found.labels.tolist()) == ((3, 3, 20, 20), [2, 0, 1])
    with pytest.raises(DataError, match="not images"):
        prepare.run("embedded:toy2d", tmp_path / "b.zip")


def test_nothing_is_enlarged_unless_asked(mixed, tmp_path):
    with pytest.raises(
        DataError, match=r"1 of 5 images are smaller than 30x30, such as 9/d\.tif of 20x30; add --upscale"
    ):
        prepare.run(str(mixed), tmp_path / "set.zip", size=(30, 30))
    assert not (tmp_path / "set.zip").exists()
    made = prepare.run(str(mixed), tmp_path / "set.zip", size=(30, 30), upscale=True)
    assert made["effects"]["enlarged"] == 1


def test_sizes_that_differ_need_one(mixed, tmp_path):
    with pytest.raises(DataError, match=r"images of 2 sizes \(20x30, 48x40\); add --size: up to 20 enlarges none"):
        prepare.run(str(mixed), tmp_path / "set.zip")


def test_nothing_is_overwritten(mixed, tmp_path, monkeypatch):
    out = tmp_path / "set.zip"
    out.write_text("mine")
    with pytest.raises(UsageError, match="exists, and nothing is overwritten"):
        prepare.run(str(mixed), out, size=(16, 16))
    out.unlink()
    add = prepare._add
    monkeypatch.setattr(prepare, "_add", lambda *arguments: out.write_text("mine") and add(*arguments))
    with pytest.raises(UsageError, match="exists, and nothing is overwritten"):  # written by another process meanwhile
        prepare.run(str(mixed), out, size=(16, 16))
    assert out.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my pictures", "set.zip"]


def test_the_same_line_again_finds_its_archive(mixed, tmp_path, monkeypatch, capsys):
    (tmp_path / "made").mkdir()
    out = tmp_path / "made" / "set.zip"
    left = out.with_name(f".set.zip.{files._MACHINE}-{2**22 + 1}.part")  # beyond the largest number of a process
    left.mkdir()
    (out.parent / ".set.zip.part").write_text("mine")
    room = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda _: room._replace(free=0 if left.exists() else room.free))
    first = prepare.run(str(mixed), out, size=(16, 16))  # there is room once the part is removed
    content = out.read_bytes()
    again = prepare.run(str(mixed), out, size=(16, 16))
    assert "is finished; nothing to do" in capsys.readouterr().err
    assert again | {"images_per_second": 0} == first | {"images_per_second": 0}
    for options in ({"size": (8, 8)}, {"size": (16, 16), "crop": "none"}, {"size": (16, 16), "dry_run": True}):
        with pytest.raises(UsageError, match="exists, and nothing is overwritten"):
            prepare.run(str(mixed), out, **options)
    assert out.read_bytes() == content
    damaged = bytearray(content)
    damaged[200] ^= 1  # of the first image
    out.write_bytes(damaged)
    with pytest.raises(UsageError, match="exists, and nothing is overwritten"):
        prepare.run(str(mixed), out, size=(16, 16))
    assert sorted(path.name for path in out.parent.iterdir()) == [".set.zip.part", "set.zip"]


def test_no_whole_image(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"no file can be read as an image: a\.png cannot be read"):
        prepare.run(str(tmp_path / "set"), tmp_path / "set.zip")
    whole = save(tmp_path / "set" / "a.png", Image.fromarray(RGB)).read_bytes()
    (tmp_path / "set" / "a.png").write_bytes(whole[:-900])
    with pytest.raises(DataError, match=r"no file holds a whole image: a\.png cannot be read"):
        prepare.run(str(tmp_path / "set"), tmp_path / "set.zip")
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--out", "set.npz"], "--out set.npz must be a file that ends in .zip"),
        (["--out", "s.zip", "--size", "64,64"], "--size 64,64 is no size"),
        (["--out", "s.zip", "--size", "0"], "--size 0 is no size"),
        (["--out", "s.zip", "--size", "12x"], "--size 12x is no size"),
        (["--out", "s.zip", "--crop", "pad"], "--crop pad has no effect without --size"),
        (["--out", "s.zip", "--crop", "middle"], "'--crop': 'middle' is not one of 'center'"),
        (["--out", "s.zip", "--background", "#12"], "--background #12 is no colour"),
        (["--out", "s.zip", "--rgb", "--grey"], "exclude each other"),
        (["--out", "my pictures/10/a.png/s.zip"], "is a file; choose another place"),
    ],
)
def test_bad_options(mixed, ddo, typed, said):
    assert said in " ".join(ddo("data", mixed, *typed, code=2).stderr.split())


def test_parts_of_a_preparation():
    assert size_of("--size", "064X48") == (64, 48)
    assert Header.of(Image.open(io.BytesIO(_bytes(Image.new("I;16", (2, 3)))))).is_deep
    assert not Preparation(32, 32, "pad").enlarges(28, 28)
    assert Preparation(32, 32, "none").enlarges(64, 31)


def _bytes(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "png")
    return content.getvalue()


# --- --resize of `ddo fid` and `ddo stats`


@pytest.fixture
def photos(tmp_path) -> Path:
    rng, root = np.random.default_rng(1), tmp_path / "photos"
    for number in range(12):
        height, width = rng.integers(16, 40, 2)
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6
        save(root / f"{number:02d}.png", picture.convert("L") if number % 3 == 0 else picture, exif=exif)
    return root


def test_resized_images_score_as_those_of_ddo_data(photos, tmp_path, ddo):
    prepare.run(str(photos), tmp_path / "set.zip", size=(16, 16))
    to_photos = ("--ref", photos, "--resize")
    resized = json.loads(ddo("fid", photos, *to_photos, 16, "--num-images", 9, "--csv", "log.csv", "--json").stdout)
    same = json.loads(ddo("fid", "set.zip", "--ref", "set.zip", "--num-images", 9, "--json").stdout)
    assert resized["fd_embedded"] == same["fd_embedded"]
    assert resized["content_digest"] == same["content_digest"]
    assert resized["resize"] == {"size": "16x16", "crop": "center", "filter": "lanczos"}
    assert "resize" not in same
    assert "16x16, center, lanczos" in (tmp_path / "log.csv").read_text()
    other = json.loads(ddo("fid", photos, *to_photos, 14, "--num-images", 9, "--json").stdout)
    assert other["fd_embedded"] != same["fd_embedded"]  # nor from the cache of another size
    shown = ddo("fid", photos, *to_photos, 16)
    told = "".join(shown.stdout.split())  # lines break anywhere in a long path
    assert "photos:12images,resized(16x16,center,lanczos)" in told
    assert "EXIF" not in shown.stderr


def test_references_that_are_resized_otherwise(photos, tmp_path, ddo):
    prepare.run(str(photos), tmp_path / "set.zip", size=(16, 16))
    for name, *words in (["a", photos, "--resize", 16], ["b", photos, "--resize", 12], ["c", "set.zip"]):
        ddo("stats", *words, "--metric", "fd_embedded", "--out", f"{name}.safetensors")

    def warned(source: object, *options: object) -> list[str]:
        figures = json.loads(ddo("fid", source, *options, "--dry-run", "--json").stdout)
        return [warning for warning in figures["warnings"] if "resized" in warning and "likewise" in warning]

    resize = ("--resize", 16)
    assert not warned(photos, *resize, "--ref", "a.safetensors")
    assert not warned(photos, *resize, "--ref", photos)
    assert not warned("set.zip", "--ref", "c.safetensors")
    assert warned(photos, *resize, "--ref", "b.safetensors") == [
        "the images are resized (16x16, center, lanczos), those of b.safetensors resized (12x12, center, lanczos); "
        "compare only with scores made likewise"
    ]
    assert "those of c.safetensors not resized" in warned(photos, *resize, "--ref", "c.safetensors")[0]
    assert "the images are not resized" in warned("set.zip", "--ref", "a.safetensors")[0]


def test_what_cannot_be_resized(photos, tmp_path, ddo):
    def message(*words: object) -> str:
        return " ".join(ddo("fid", *words, "--ref", photos, code=2).stderr.split())

    assert "pixels, fewer than 64x64; choose a smaller size, or `ddo data" in message(photos, "--resize", 64)
    assert "--resize 6x is no size" in message(photos, "--resize", "6x")
    assert "embedded:toy2d holds points" in message("embedded:toy2d", "--resize", 16)
    save(photos / "0.png", Image.new("RGBA", (20, 20), (0, 0, 0, 9)))
    assert "0.png has transparent pixels; `ddo data" in message(photos, "--resize", 16)


# --- Messages that lead here


def test_a_command_with_a_model_names_its_size_at_once(photos, ddo):
    """By the first picture, not by the first that differs from it."""
    for command in ("finetune-ddo", "train-disc", "train-classifier"):
        message = " ".join(ddo(command, "--data", photos, "--out", "run", "--dry-run", code=2).stderr.split())
        assert "where the model needs 16x16 RGB; `ddo data" in message
        assert "--out set-16.zip --size 16 --rgb` makes such images" in message


@pytest.mark.parametrize(
    ("shape", "line"),
    [
        ((28, 28), "side 28 must be a multiple of 8, which follows from its options patch and widths: `ddo data SRC "
         "--out set.zip --size 32 --crop pad` pads images, --size 24 shrinks them; or change these options"),
        ((4, 4), "--size 8 --crop pad` pads images; or"),
        ((32, 48), "it needs square images or latents: `ddo data SRC --out set.zip --size 32` crops images"),
    ],
)  # fmt: skip
def test_networks_say_which_sides_fit(shape, line, tmp_path, ddo):
    np.savez(tmp_path / "set.npz", arr_0=np.zeros((2, *shape, 1), np.uint8))
    options = "model.options={patch: 4, widths: [8, 8], depths: [1, 1], emb_width: 8}"
    given = ["--data", "set.npz", "--out", "run", "--dry-run", options, "pretrain.batch=2"]
    message = " ".join(ddo("pretrain", *given, code=2).stderr.split())
    assert line in message
    assert len(message) < 300


def test_class_folders_in_a_zip_are_named(mixed, tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("cat/a.png", "dog/b.png"):
            archive.writestr(name, (mixed / "10" / "a.png").read_bytes())
    assert open_images(str(tmp_path / "a.zip")).num_classes == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "no labels, since folders in a zip are no classes (cat, dog, ...); `ddo data" in said
    assert prepare.run(str(tmp_path / "a.zip"), tmp_path / "b.zip")["classes"] == {"0": "cat", "1": "dog"}
