"""Trackers: where a run's figures and pictures go beside its own files (`--log-to`).

A tracker is anything with the three methods of `Tracker`. It gets each figure once: what it got last is kept in the
run's directory, so a continued run goes on where the one before stopped, and repeated steps are left out. What goes
wrong in a tracker costs its record and never the run.
"""

import contextlib
import importlib.util
import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ddo_cli import console
from ddo_cli.errors import UsageError, reason
from ddo_cli.files import parse_json
from ddo_cli.recipe.schema import nearest

KEPT = "tracking.json"  # in a run's directory: what each tracker has got


class Run(NamedTuple):
    """What is tracked. id: the same in every launch of the run; number: of records that earlier launches have sent."""

    name: str
    place: Path  # the run's directory
    recipe: dict[str, Any]  # as resolved
    id: str
    number: int = 0


class Tracker(Protocol):
    """Gets the records of a run, numbered from 0 without a gap over all its launches.

    images: that training has taken in when the record was made, over all rounds.
    """

    def figures(self, figures: Mapping[str, float], images: int, number: int) -> None:
        """Figures by name, such as train/loss and score/fid."""

    def picture(self, name: str, file: Path, images: int, number: int) -> None:
        """A PNG file."""

    def close(self) -> None:
        """The launch ends; the run may be continued by another."""


class TensorBoard:
    """Event files in tensorboard/ of the run's directory; steps are images."""

    def __init__(self, run: Run):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run.place / "tensorboard"))
        if run.number == 0:
            self.writer.add_text("recipe", f"```json\n{json.dumps(run.recipe, indent=1)}\n```", 0)

    def figures(self, figures: Mapping[str, float], images: int, number: int) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, images)
        self.writer.flush()  # a killed process would lose what waits

    def picture(self, name: str, file: Path, images: int, number: int) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(file) as image:
            self.writer.add_image(name, np.asarray(image.convert("RGB")), images, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A run of Weights & Biases, in wandb/ of the run's directory; charts are over images.

    WANDB_PROJECT, WANDB_MODE=offline and its other variables hold.
    """

    def __init__(self, run: Run):
        import wandb

        os.environ.setdefault("WANDB_SILENT", "true")
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "ddo"), name=run.name, id=run.id, resume="allow",
            dir=str(run.place), config=run.recipe, settings=wandb.Settings(console="off"),
        )  # fmt: skip
        self.run.define_metric("images")
        self.run.define_metric("*", step_metric="images")
        console.info(f"wandb: {self.run.url or f'offline; `wandb sync {self.run.dir}/..` uploads it'}")

    def figures(self, figures: Mapping[str, float], images: int, number: int) -> None:
        self.run.log({**figures, "images": images}, step=number)

    def picture(self, name: str, file: Path, images: int, number: int) -> None:
        import wandb

        self.run.log({name: wandb.Image(str(file)), "images": images}, step=number)

    def close(self) -> None:
        self.run.finish()


TRACKERS: dict[str, Callable[[Run], Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb}


def parse(text: str) -> tuple[str, ...]:
    """The trackers of `--log-to`: names, or Python files, between commas. Raises UsageError for what cannot be had."""
    names = tuple(name.strip() for name in text.split(","))
    if names == ("none",):
        return ()
    for name in names:
        if name.endswith(".py"):
            if not Path(name).is_file():
                raise UsageError(f"--log-to {name} does not exist; give a Python file with a function `tracker`")
        elif name not in TRACKERS:
            known = f"{', '.join(TRACKERS)}, none, or a Python file with a function `tracker`"
            raise UsageError(f"--log-to {name} is not known{nearest(name, TRACKERS)}; use {known}")
        elif importlib.util.find_spec(name) is None:
            raise UsageError(f"--log-to {name} needs its package: pip install 'ddo-cli[{name}]'")
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"--log-to names {twice[0]} twice; leave one out")
    return names


class Tracking:
    """Sends records of a run to its trackers, each of them once."""

    def __init__(self, names: Sequence[str], place: Path, recipe: dict[str, Any]):
        """Opens nothing yet: a finished run has nothing to send. place: the run's directory."""
        self.names, self.place, self.recipe = list(names), place, recipe
        self.open: dict[str, Tracker] = {}
        self.kept = _read(place / KEPT) if names else {}

    def figures(self, series: str, figures: Mapping[str, float], images: int) -> None:
        """Sends figures under the name of their series: "train" gives train/loss."""
        named = {f"{series}/{key}": float(value) for key, value in figures.items() if isinstance(value, (int, float))}
        self._send(series, images, lambda tracker, number: tracker.figures(named, images, number))

    def picture(self, series: str, file: Path, images: int) -> None:
        """Sends a picture under the name of its series."""
        self._send(f"picture {series}", images, lambda tracker, number: tracker.picture(series, file, images, number))

    def close(self) -> None:
        """Ends the launch's part of every record."""
        for name in list(self.open):
            with self._guarded(name):
                self.open[name].close()
        self.open.clear()

    def _send(self, series: str, images: int, send: Callable[[Tracker, int], None]) -> None:
        for name in list(self.names):
            known = self.kept.setdefault(name, {"id": uuid.uuid4().hex[:8], "records": 0, "images": {}})
            if images <= known["images"].get(series, -1):
                continue  # of a step that is repeated after a kill
            with self._guarded(name):
                if name not in self.open:
                    self.open[name] = self._opened(name)
                number = known["records"]
                # First, so that a kill between the two costs a record and never doubles one.
                known["records"], known["images"][series] = number + 1, images
                _write(self.place / KEPT, self.kept)
                send(self.open[name], number)

    def _opened(self, name: str) -> Tracker:
        known = self.kept[name]
        title = self.place.resolve().name
        run = Run(title, self.place, self.recipe, known["id"], known["records"])
        return _of_file(name)(run) if name.endswith(".py") else TRACKERS[name](run)

    @contextlib.contextmanager
    def _guarded(self, name: str) -> Any:
        """A tracker that fails is told of once and left out from then on."""
        try:
            yield
        except Exception as error:
            self.names.remove(name)
            self.open.pop(name, None)
            console.warn(
                f"--log-to {name}: {type(error).__name__}: {reason(error)}; the run goes on without it. All "
                "figures are in log.jsonl, and the next launch tries it again"
            )


def _of_file(name: str) -> Callable[[Run], Tracker]:
    """The function or class `tracker` of a user's Python file, which is run."""
    spec = importlib.util.spec_from_file_location("_ddo_tracker", name)
    assert spec is not None, "of a file that ends in .py"
    assert spec.loader is not None, "of Python source"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    make: Callable[[Run], Tracker] = module.tracker
    return make


def _read(file: Path) -> dict[str, Any]:
    """What trackers have got; nothing where it is not known."""
    with contextlib.suppress(OSError, ValueError):
        content = parse_json(file.read_bytes())
        if isinstance(content, dict):
            return content
    return {}


def _write(file: Path, content: Any) -> None:
    """Replaces the file. Not by `files`: the run's ledger lists what a run needs, and none of this is needed."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1))
    os.replace(temporary, file)
