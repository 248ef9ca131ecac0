"""`ddo finetune-ddo`: rounds of Direct Discriminative Optimization by self-play (arXiv 2503.01103).

Round k: the reference draws a fake set to disk; a copy of it is trained to tell data from that set by its own
log-likelihood ratio; candidates are scored on a fixed schedule; the best one, if it beats the reference, is the
reference of round k + 1. Every stage leaves its result on disk, so a killed run continues where it was.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ddo_cli import checkpoint, console, dist, rundir
from ddo_cli.data.images import open_images
from ddo_cli.data.items import ItemSet, check_fits, digest
from ddo_cli.data.pairs import Pairs, Shuffled
from ddo_cli.data.samples import open_samples
from ddo_cli.engines import finetune_report, sample
from ddo_cli.engines.scoring import Scoring
from ddo_cli.errors import NumericsError
from ddo_cli.files import read_json, replacing, sha256, write_json
from ddo_cli.likelihood import LikelihoodModel, map_draw, repeat_draw
from ddo_cli.models import registry
from ddo_cli.objectives.ddo import ddo_loss
from ddo_cli.recipe import Recipe, SamplingRecipe
from ddo_cli.rng import RowRng
from ddo_cli.training import loop

FIRST_FAKE_SEED = 1_000_000  # beyond the seeds of scores

TRAIN_STATE = "train-state.safetensors"


def run(recipe: Recipe, out: Path, *, device: torch.device, dry_run: bool = False) -> dict[str, Any]:
    """Finetunes recipe.model.ckpt in rounds and returns what layout promises of `finetune-ddo --json`.

    The same call on an unfinished run continues it; on a finished one it returns the stored result.
    Raises NumericsError when the loss is not finite or the plain loss on data diverges.
    """
    registry.load_file(recipe.model.file)
    reference = registry.load_model(recipe.model.ckpt, device, recipe.finetune.draw)
    real = open_images(recipe.data.source, recipe.data.num)
    check_fits(real, reference.model.shape, reference.model.num_classes)
    spec = _sampling(recipe, reference)
    loop.local_rows(recipe.finetune.batch, recipe.finetune.micro_batch)
    scoring = Scoring(recipe, real, spec, device)
    if dry_run:
        return _dry_run(recipe, out, reference.model)
    loop.set_precision(recipe.finetune.precision)
    with rundir.locked(out) as run_dir:
        identity = {"reference_sha256": reference.checkpoint.sha256, "data_sha256": digest(real), **scoring.identity}
        run_dir.claim("finetune-ddo", recipe, **identity)
        state = dist.from_main(run_dir.state())
        if state.get("finished") and run_dir.final.is_file():
            console.info(f"{out} is finished; nothing to do")
            return _result(recipe, run_dir, state, scoring.key)
        if "reference" not in state:
            console.info(f"scoring the reference {recipe.model.ckpt}")
            scoring.picture(reference.model, out / "reference.png")
            repeats = _repeats(scoring, reference.model, out / "reference-scores.json", [])
            state = run_dir.advance(reference={"repeats": repeats, "score": _mean(repeats, scoring.key)}, rounds=[])
        console.info(f"reference: {scoring.key} {state['reference']['score']:.4g}")
        del reference  # each round loads its own
        for number in range(len(state["rounds"]) + 1, recipe.finetune.rounds + 1):
            this_round = _Round(number, recipe, run_dir, real, spec, scoring, device)
            state = run_dir.advance(rounds=[*state["rounds"], this_round.run(state)])
            this_round.drop_train_state()
        if dist.is_main():
            _copy(_reference_file(recipe, run_dir, len(state["rounds"])), run_dir.final)
            finetune_report.write(run_dir, recipe, state, scoring.key)
        state = run_dir.advance(finished=True)
        return _result(recipe, run_dir, state, scoring.key)


class _Progress(NamedTuple):
    """Candidates of a round so far: step -> figures on the first seed range."""

    file: Path
    candidates: dict[str, dict[str, float]]


class _Round:
    """One round: fake set, training, selection."""

    def __init__(
        self,
        number: int,
        recipe: Recipe,
        run_dir: rundir.RunDir,
        real: ItemSet,
        spec: SamplingRecipe,
        scoring: Scoring,
        device: torch.device,
    ):
        self.number, self.recipe, self.run_dir, self.real = number, recipe, run_dir, real
        self.spec, self.scoring, self.device = spec, scoring, device
        self.path = run_dir.path / f"round-{number:02d}"
        self.title = f"round {number}/{recipe.finetune.rounds}"

    def run(self, state: dict[str, Any]) -> dict[str, Any]:
        """The round's record: candidates, the best one's figures, and whether it was promoted."""
        ref_file = _reference_file(self.recipe, self.run_dir, self.number - 1)
        before = state["rounds"][-1] if state["rounds"] else state["reference"]
        self._draw_fake_set(ref_file)
        progress = self._train(ref_file)
        return self._promote(ref_file, progress, before)

    def _draw_fake_set(self, ref_file: str | Path) -> None:
        first = FIRST_FAKE_SEED + (self.number - 1) * self.recipe.finetune.num_fake  # rounds do not overlap
        seeds = range(first, first + self.recipe.finetune.num_fake)
        sampling = self.spec.model_dump()
        title = f"{self.title} fake set"
        sample.run(
            ref_file, seeds, self.path / "samples", form="shards", sampling=sampling, device=self.device, title=title
        )

    def _train(self, ref_file: str | Path) -> _Progress:
        settings = self.recipe.finetune
        steps = -(-settings.images_per_round // settings.batch)
        every = max(settings.eval_every // settings.batch, 1)
        file = self.path / "metrics.json"
        progress = _Progress(file, dist.from_main(read_json(file)["candidates"] if file.is_file() else {}))
        ref = registry.load_model(ref_file, self.device, self.recipe.finetune.draw)
        header = self._header(ref.checkpoint)
        ref.model.requires_grad_(False)
        model = registry.load_model(ref_file, self.device, self.recipe.finetune.draw).model
        candidate = registry.load_model(ref_file, self.device, self.recipe.finetune.draw).model

        def evaluate(step: int, ema: dict[str, Tensor]) -> str:
            if str(step) not in progress.candidates:
                file = self._candidate_file(step)
                if dist.is_main():
                    checkpoint.save(file, ema, {**header, "step": step})
                candidate.load_state_dict(ema)
                progress.candidates[str(step)] = self.scoring.run(candidate, 0)
                if dist.is_main():
                    write_json(progress.file, {"candidates": progress.candidates})
            return f"{self.scoring.key} {progress.candidates[str(step)][self.scoring.key]:.4g} at step {step}"

        def check(step: int, record: dict[str, float]) -> None:
            ratio = record["denoising_ratio"]
            if not ratio <= settings.max_denoising_ratio:  # NaN is refused too
                raise NumericsError(
                    f"{self.title}: by step {step} the plain loss on real images has grown to {ratio:.3g} times the "
                    f"reference's (finetune.max_denoising_ratio = {settings.max_denoising_ratio}), the model diverges; "
                    f"the last good checkpoint is {self._last_good(ref_file)}; lower finetune.lr = {settings.lr} or "
                    f"finetune.beta = {settings.beta} and choose another --out"
                )

        plan = loop.Plan(
            title=self.title,
            steps=steps,
            recipe=settings,
            loss=self._loss(model, ref.model),
            state_file=self.path / TRAIN_STATE,
            log_file=self.run_dir.log_file,
            log_tags={"round": self.number},
            last_good=lambda: self._last_good(ref_file),
            evaluate_at=frozenset([*range(every, steps, every), steps]),
            evaluate=evaluate,
            check=check,
            owner=f"round {self.number} of {ref.checkpoint.sha256}",
        )
        loop.fit(model, plan, self.device)
        return progress

    def _loss(self, model: LikelihoodModel, ref: LikelihoodModel) -> Any:
        """The DDO loss of some rows, as `loop.fit` calls it."""
        settings, seed = self.recipe.finetune, self.recipe.seed
        fake = open_samples(self.path / "samples")
        pairs = Pairs(
            Shuffled(self.real.items, self.real.labels, "real", seed, self.number),
            Shuffled(fake.items, fake.labels, "fake", seed, self.number),
        )

        def loss(wrapped: nn.Module, rows: loop.Rows) -> loop.Loss:
            base = rows.step * settings.batch
            real, fake = pairs.rows(base + rows.start, base + rows.stop)
            n = len(real.items)
            x = model.encode(torch.cat([real.items, fake.items]).to(self.device))  # (2n, ...)
            label = torch.cat([real.label, fake.label]).to(self.device)
            rng = RowRng.for_rows("ddo", seed, self.number, rows.step, rows=range(rows.start, rows.stop))
            half = map_draw(lambda tensor: tensor.to(self.device), model.draw(n, rng))
            draw = repeat_draw(half, 2)  # one draw for real and fake, model and reference
            with torch.no_grad():
                ref_prediction = ref.predict(x, label, draw)
            r = wrapped(x, label, draw, ref_prediction)  # (2n,)
            ddo = ddo_loss(
                r[:n], r[n:], settings.alpha, settings.beta,
                fake_weight=1 - half.drop.to(r.dtype), divide_by_alpha=settings.divide_by_alpha,
            )  # fmt: skip
            ref_loss = -ref.log_lik(ref_prediction[:n], x[:n], half).mean()
            # log_lik of the model on data is the reference's plus r, so no further pass is needed.
            log = {**ddo._asdict(), "denoising_ratio": (ref_loss - ddo.r_real) / ref_loss}
            return loop.Loss(log.pop("loss"), log)

        return loss

    def _promote(self, ref_file: str | Path, progress: _Progress, before: dict[str, Any]) -> dict[str, Any]:
        """Scores the best candidate on the further seed ranges and makes it the reference if it is better."""
        key = self.scoring.key
        step, first = min(progress.candidates.items(), key=lambda item: item[1][key])
        candidate = registry.load_model(self._candidate_file(int(step)), self.device)
        repeats = _repeats(self.scoring, candidate.model, self.path / "best-scores.json", [first])
        score = _mean(repeats, key)
        promoted = score < before["score"]
        best = self.path / "best.safetensors"
        if dist.is_main():
            _copy(self._candidate_file(int(step)) if promoted else ref_file, best)
            self.scoring.picture(candidate.model, self.path / "grid.png")
        kept = "promoted" if promoted else f"NOT better than the reference ({before['score']:.4g}), which is kept"
        images = int(step) * self.recipe.finetune.batch
        console.info(f"{self.title}: {key} {score:.4g} after {images} images, {kept}")
        return {
            "round": self.number,
            "score": score if promoted else before["score"],
            "best_images": images,
            "promoted": promoted,
            "candidate_score": score,
            "repeats": repeats if promoted else before["repeats"],
            "candidates": progress.candidates,
        }

    def drop_train_state(self) -> None:
        """Removes what only resuming needed: optimizer state does not cross rounds."""
        if dist.is_main():
            (self.path / TRAIN_STATE).unlink(missing_ok=True)

    def _candidate_file(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step:06d}.safetensors"

    def _last_good(self, ref_file: str | Path) -> str | Path:
        return max((self.path / "checkpoints").glob("step-*.safetensors"), default=ref_file)

    def _header(self, ref: checkpoint.Checkpoint) -> dict[str, Any]:
        """Header of this round's checkpoints: the reference's configuration and a longer chain of provenance."""
        link = {
            "command": "finetune-ddo",
            "round": self.number,
            "reference_sha256": ref.sha256,
            "recipe": self.recipe.model_dump(mode="json"),
        }
        return {
            "kind": "model",
            "config": ref.header["config"],
            "sampling": self.spec.model_dump(mode="json", exclude_none=True),
            "provenance": [*ref.header.get("provenance", []), link],
        }


def _sampling(recipe: Recipe, reference: registry.Loaded) -> SamplingRecipe:
    """The recipe's sampling, where it leaves something open the reference's own."""
    given = {key: getattr(recipe.sampling, key) for key in recipe.sampling.model_fields_set}
    spec = sample.spec_of(reference.checkpoint, **given)
    reference.model.check_sampling(spec)
    return spec


def _reference_file(recipe: Recipe, run_dir: rundir.RunDir, rounds_done: int) -> str | Path:
    """The weights that the next round starts from."""
    return run_dir.path / f"round-{rounds_done:02d}" / "best.safetensors" if rounds_done else recipe.model.ckpt


def _copy(source: str | Path, target: Path) -> None:
    with replacing(target) as temporary:
        shutil.copyfile(checkpoint.resolve(source), temporary)


def _repeats(
    scoring: Scoring, model: LikelihoodModel, file: Path, known: list[dict[str, float]]
) -> list[dict[str, float]]:
    """Figures of every range of sampling seeds; each is kept in `file`, since a large score takes hours."""
    found = dist.from_main(read_json(file, list) if file.is_file() else known)
    for repeat in range(len(found), scoring.repeats):
        found = [*found, scoring.run(model, repeat)]
        if dist.is_main():
            write_json(file, found)
    return found


def _mean(repeats: list[dict[str, float]], key: str) -> float:
    return sum(figures[key] for figures in repeats) / len(repeats)


def _result(recipe: Recipe, run_dir: rundir.RunDir, state: dict[str, Any], key: str) -> dict[str, Any]:
    rounds = state["rounds"]
    if not any(record["promoted"] for record in rounds):
        console.warn(f"no round improved on the reference: {run_dir.final} is the reference {recipe.model.ckpt} itself")
    kept = ("round", "score", "best_images", "promoted")
    return {
        "out": str(run_dir.path),
        "final": str(run_dir.final),
        "metric": key,
        "reference_score": state["reference"]["score"],
        "final_score": rounds[-1]["score"],
        "rounds": [
            {
                **{name: record[name] for name in kept},
                "checkpoint": str(_reference_file(recipe, run_dir, record["round"])),
            }
            for record in rounds
        ],
    }


def _dry_run(recipe: Recipe, out: Path, model: LikelihoodModel) -> dict[str, Any]:
    settings = recipe.finetune
    steps = -(-settings.images_per_round // settings.batch)
    return {
        "out": str(out),
        "dry_run": True,
        "reference": recipe.model.ckpt,
        "reference_sha256": sha256(checkpoint.resolve(recipe.model.ckpt)),
        "parameters": sum(p.numel() for p in model.parameters()),
        "rounds": settings.rounds,
        "steps_per_round": steps,
        "pairs_per_step": settings.batch,
        "fake_images_per_round": settings.num_fake,
        "network_rows_per_step": {
            "model_forward_backward": 2 * settings.batch,
            "reference_forward": 2 * settings.batch,
        },
    }
