"""Whether a set fits a model."""

from types import SimpleNamespace

import numpy as np
import pytest
from test_images import some_items

from ddo_cli.codec import Codec
from ddo_cli.data.items import ItemSet, check_fits, compare_names
from ddo_cli.errors import DataError


def model(shape, num_classes):
    return SimpleNamespace(codec=Codec(shape), num_classes=num_classes)


def test_check_fits():
    labelled = ItemSet(some_items(3), np.array([0, 4, 2]), "x", 5)
    plain = ItemSet(some_items(3), np.full(3, -1), "x", 0)
    for items, classes in ((labelled, 5), (labelled, 10), (labelled, 0), (plain, 0)):
        check_fits(items, model((3, 7, 5), classes))
    with pytest.raises(DataError, match="5x7 RGB where the model needs 7x5 RGB"):
        check_fits(plain, model((3, 5, 7), 0))
    with pytest.raises(DataError, match="5x7 RGB where the model needs 5x7 grey"):
        check_fits(plain, model((1, 7, 5), 0))
    with pytest.raises(DataError, match="points of 2 numbers"):
        check_fits(plain, model((2,), 0))
    check_fits(plain, model((3, 7, 5), 0), hflip=True)
    points = ItemSet(np.zeros((3, 2), np.float32), np.full(3, -1), "embedded:toy2d", 0)
    check_fits(points, model((2,), 0))
    with pytest.raises(DataError, match=r"data\.hflip = true mirrors images, and embedded:toy2d holds points"):
        check_fits(points, model((2,), 0), hflip=True)
    with pytest.raises(DataError, match="5 classes where the model has 4"):
        check_fits(labelled, model((3, 7, 5), 4))
    with pytest.raises(DataError, match="without label"):
        check_fits(plain, model((3, 7, 5), 4))


def test_names_of_classes_are_compared(capsys):
    """With those of the newest step that tells them."""
    items = ItemSet(some_items(2), np.array([0, 1]), "x", 2, classes={"0": "bird", "1": "cat"})
    links = [{"classes": {"0": "bird", "1": "dog"}}, {"classes": {"0": "cat", "1": "cat"}}, {"command": "convert"}]
    for provenance in ([], links[:0], links[2:], [{"classes": {"0": "bird"}}]):
        compare_names(items, provenance)
    assert not capsys.readouterr().err
    compare_names(items, links)
    assert "x: 1 classes are named otherwise" in capsys.readouterr().err


def test_classes_without_items(capsys):
    """A set that is compared with samples of all classes needs all of them; else a warning says what is missing."""
    from_one = ItemSet(some_items(4), np.array([1, 2, 3, 2]), "x", 4)
    for classes, text in (
        (4, "no item of class 0, of 4 classes of the model; do the labels start at 1?"),
        (9, "0, 4, 5, 6, 7, ..."),
    ):
        with pytest.raises(DataError, match=text.replace("?", r"\?")):
            check_fits(from_one, model((3, 7, 5), classes), every_class=True)
        check_fits(from_one, model((3, 7, 5), classes))
        assert text in " ".join(capsys.readouterr().err.split())
    rare = ItemSet(some_items(6), np.array([0, 1, 1, 1, 1, 1]), "x", 2)
    check_fits(rare, model((3, 7, 5), 2), every_class=True)
    assert "1 items of class 0, 5 of class 1" in " ".join(capsys.readouterr().err.split())
    check_fits(from_one, model((3, 7, 5), 0), every_class=True)
    assert not capsys.readouterr().err
