"""evaluate transfer linear and transfer finetune: every set in turn, as far as it is on disk, and the paper's table 3 with ours as a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fastbyol.config.errors import Diverged, UserError, first_line, is_out_of_memory
from fastbyol.evaluation.comparison import Comparison, compare_hits
from fastbyol.evaluation.data_state import data_state
from fastbyol.evaluation.result_file import SubjectResult, TaskResult
from fastbyol.evaluation.tasks.job import Job, Subject
from fastbyol.evaluation.tasks.registry import Task
from fastbyol.evaluation.tasks.scoring import unpacked
from fastbyol.evaluation.tasks.training import raise_if_stopped
from fastbyol.evaluation.tasks.transfer.finetune import (
    TransferFinetuneSettings,
    evaluate_finetune,
    measure_finetune,
    plan_finetune,
)
from fastbyol.evaluation.tasks.transfer.linear import TransferLinearSettings, evaluate_linear, plan_linear
from fastbyol.evaluation.tasks.transfer.metrics import METRIC_TITLES
from fastbyol.evaluation.tasks.transfer.opening import SetRefused, TransferImages, on_every_rank, open_set
from fastbyol.evaluation.tasks.transfer.sets import PAPER_FINETUNE, PAPER_LINEAR, SETS, TransferSet, chosen_sets, missing_text
from fastbyol.host.quantities import count_text, duration_text
from fastbyol.ranks.process_group import broadcast_from_main

PLACES = "note: the paper's Places365 figure is table 13's: SGD on random crops, as `evaluate linear` does, not a fit on features without augmentation"
Evaluate = Callable[[Job, Any, TransferImages, Subject], dict[str, Any]]


@dataclass(frozen=True)
class _Chosen:
    """The sets of --sets: those that are there, and for each of the others, by name, a message."""

    present: list[TransferSet | Path]
    missing: dict[str, str]


def run_sets(job: Job, settings: Any, *, evaluate: Evaluate, paper: dict[str, dict[str, float]], notes: list[str]) -> TaskResult:
    """Evaluates every encoder on every set that is there. A set that fails is named and left out.

    Raises UserError if a set that was named is missing, or if none gave a score.
    """
    chosen = _chosen(job, settings)
    for text in chosen.missing.values():
        job.announce(f"left out: {text}")
    scores: dict[str, dict[str, dict[str, Any]]] = {subject.name: {} for subject in job.subjects}
    opened: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = dict(chosen.missing)
    for one in chosen.present:
        name = _name(one)
        try:
            images = _open_everywhere(job, one, settings)
            job.announce(f"{images.name}: " + ", ".join(f"{count:,} {split}" for split, count in images.sizes.items()))
            found = {subject.name: _evaluated(job, settings, images, subject, evaluate) for subject in job.subjects}
        except Exception as error:
            if not isinstance(error, UserError | Diverged | OSError | MemoryError) and not is_out_of_memory(error):
                raise
            if job.process.world_size > 1 and not isinstance(error, Diverged | SetRefused):
                raise  # perhaps only this rank failed: the others may be waiting for it, and it cannot tell them
            failed[name] = f"{name}: {first_line(error, limit=300).removeprefix(f'{name}: ')}"
            job.announce(f"failed: {failed[name]}")
            continue
        opened[name] = {
            **images.sizes,
            "state": images.state,
            "classes": len(images.class_names),
            "metric": images.metric,
            "notes": list(images.notes),
        }
        for subject, score in found.items():
            scores[subject][name] = score
    if not opened:
        raise UserError(f"{job.task}: no set gave a score; " + "; ".join(failed.values()))
    wanted = {_name(one): one for one in _wanted(job, settings)}
    return _result(job, scores, opened, failed, wanted=wanted, paper=paper, notes=notes)


def _evaluated(job: Job, settings: Any, images: TransferImages, subject: Subject, evaluate: Evaluate) -> dict[str, Any]:
    """Returns the score that an earlier, incomplete result of this job has, or computes it."""
    raise_if_stopped(job)
    key = f"{images.key} {subject.name}"
    earlier = broadcast_from_main(_earlier(job, images, subject) if job.process.is_main else None)
    return earlier or job.once(key, partial(evaluate, job, settings, images, subject))


def _earlier(job: Job, images: TransferImages, subject: Subject) -> dict[str, Any] | None:
    known = job.earlier.subjects.get(subject.name) if job.earlier else None
    found = known.details.get(images.name) if known else None
    return found if found and found["set"].get("state") == images.state else None


def _state(job: Job, one: TransferSet | Path) -> str:
    """Returns the state of a set's files. Each set has its own state, so that adding a set later does not invalidate the others' scores."""
    if isinstance(one, TransferSet) and (place := one.place(Path(job.data))) is not None:
        return data_state([Path(job.data) / place.relative_to(job.data).parts[0]])
    return data_state([one]) if isinstance(one, Path) else ""


def _is_current(job: Job, settings: Any, result: TaskResult) -> bool:
    """Returns whether the sets of a result are as they were."""
    states = {_name(one): _state(job, one) for one in _wanted(job, settings)}
    details = next(iter(result.subjects.values())).details
    return all(found["set"].get("state") == states.get(name) for name, found in details.items())


def _wanted(job: Job, settings: Any) -> list[TransferSet | Path]:
    return chosen_sets(settings.sets, Path(job.data))


def _chosen(job: Job, settings: Any) -> _Chosen:
    """Sorts the sets into those on disk and the others. Raises UserError if a set that was named, or every set, is not there."""
    root, wanted = Path(job.data), _wanted(job, settings)
    if not root.is_dir():
        raise UserError(f"--data {root}: no such folder; give the folder that holds the sets")
    missing = {}
    for one in wanted:
        if isinstance(one, TransferSet) and one.place(root) is None and not (settings.download and one.downloads):
            if one.name in settings.sets:
                raise UserError(f"--sets {missing_text(one, root)}")
            missing[one.name] = missing_text(one, root)
    names = [_name(one) for one in wanted]
    if len(set(names)) < len(names):
        raise UserError(f"--sets {','.join(settings.sets)}: two sets have one name; results are kept by name, so rename a folder")
    present = [one for one in wanted if _name(one) not in missing]
    if not present:
        own = "; for the images of this folder itself add --sets ." if (root / "train").is_dir() else ""
        raise UserError(f"--data {root}: none of the {len(SETS)} sets is there{own}; the first: " + next(iter(missing.values())))
    return _Chosen(present, missing)


def _name(one: TransferSet | Path) -> str:
    return one.name if isinstance(one, TransferSet) else one.resolve().name


def _open_everywhere(job: Job, one: TransferSet | Path, settings: Any) -> TransferImages:
    """Opens the set on every rank, rank 0 first if it may have to fetch it; if it fails on one, it fails on all."""
    root, turns = Path(job.data), (0, 1) if settings.download else (0,)
    images: TransferImages | None = None
    for turn in turns:
        its_turn = len(turns) == 1 or job.process.is_main == (turn == 0)
        download = settings.download and turn == 0
        images = on_every_rank(lambda: open_set(one, root, download=download, seed=job.seed) if its_turn else images)  # noqa: B023
    assert images is not None
    return replace(images, state=broadcast_from_main(_state(job, one) if job.process.is_main else ""))


def _result(
    job: Job,
    scores: dict[str, dict[str, dict[str, Any]]],
    opened: dict[str, dict[str, Any]],
    failed: dict[str, str],
    *,
    wanted: dict[str, TransferSet | Path],
    paper: dict[str, dict[str, float]],
    notes: list[str],
) -> TaskResult:
    subjects = {}
    for subject in job.subjects:
        of_sets = scores[subject.name]
        details = {name: found | {"set": opened[name]} for name, found in of_sets.items()}
        subjects[subject.name] = SubjectResult(
            subject.title,
            {name: found["score"] for name, found in of_sets.items()},
            sum(found["seconds"] for found in of_sets.values()),
            {name: found["chosen"] for name, found in of_sets.items()},
            details,
        )
    # If all sets were asked for, every set of the paper is a column, as in its table 3.
    # Recognised by type and not by name: a user's folder may have the name of one of the paper's sets.
    papers = {name: one for name, one in wanted.items() if isinstance(one, TransferSet)}
    columns = {name: f"{papers[name].title if name in papers else name} %" for name in wanted if name in opened or name in papers}
    rows = {title: {name: value for name, value in row.items() if name in papers} for title, row in paper.items()}
    unfinished = sum(
        found.get("unfinished_fits", 0) + (not found.get("converged", True)) for sets in scores.values() for found in sets.values()
    )
    return job.result(
        columns=columns,
        subjects=subjects,
        sizes={"set" if len(opened) == 1 else "sets": len(opened), "test images": sum(found["test"] for found in opened.values())},
        paper={title: row for title, row in rows.items() if row},
        comparisons=_comparisons(job, scores),
        notes=[
            *(f"note: {text}" for found in opened.values() for text in found["notes"]),
            *dict.fromkeys(text for sets in scores.values() for found in sets.values() for text in found.get("notes", ())),
            *([f"note: {unfinished} fits stopped at --max_steps before they had converged"] if unfinished else []),
            "note: metrics: " + ", ".join(f"{METRIC_TITLES[metric]} of {' '.join(names)}" for metric, names in _by_metric(opened).items()),
            *notes,
            *(["note: the paper's rows are ResNet-50 after ImageNet at 224 px, table 3"] if any(rows.values()) else []),
            *([PLACES] if any("places365" in row for row in rows.values()) else []),
            *(f"missing: {failed[name]}" for name in wanted if name in failed),
        ],
        missing=[name for name in wanted if name in failed],
    )


def _comparisons(job: Job, scores: dict[str, dict[str, dict[str, Any]]]) -> dict[str, Comparison]:
    """Compares the first encoder with each other one on every set with one label an image, by what each got right."""
    first, *others = job.subjects
    return {
        f"{other.title}, top-1 of {name}": compare_hits(unpacked(found["hits"]), unpacked(scores[other.name][name]["hits"]))
        for name, found in scores[first.name].items()
        for other in others
        if found["hits"]
    }


def _by_metric(opened: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, one in opened.items():
        found.setdefault(one["metric"], []).append(name)
    return found


# ---- estimates


def _plan_sets(job: Job, settings: Any, *, each: Callable[[TransferImages], tuple[list[str], float]]) -> list[str]:
    chosen = _chosen(job, settings)
    lines, total_s = [], 0.0
    for one in chosen.present:
        try:
            images = open_set(one, Path(job.data), download=False, seed=job.seed)
            sizes = ", ".join(f"{count:,} {split}" for split, count in images.sizes.items())
            lines.append(f"{images.name}: {len(images.class_names)} classes, {sizes}; {METRIC_TITLES[images.metric]}")
            found, seconds = each(images)
            total_s += seconds
            lines += [f"  {line}" for line in found]
        except UserError as error:
            lines.append(f"failed: {error}")
    sets, encoders = count_text(len(chosen.present), "set"), count_text(len(job.subjects), "encoder")
    head = f"{job.task}: {sets} on disk, {encoders}, about {duration_text(total_s)} in all; nothing is started"
    return [head, *lines, *(f"missing: {text}" for text in chosen.missing.values())]


def _plan_linear(job: Job, settings: TransferLinearSettings) -> list[str]:
    return _plan_sets(job, settings, each=partial(plan_linear, job, settings))


def _plan_finetune(job: Job, settings: TransferFinetuneSettings) -> list[str]:
    # All sets have images of one size in the network, so one measurement serves them: the first set's.
    measured = []

    def each(images: TransferImages) -> tuple[list[str], float]:
        if not measured:
            job.announce("measuring a few steps")
            measured.append(measure_finetune(job, settings, images))
        return plan_finetune(job, settings, images, measured[0])

    return _plan_sets(job, settings, each=each)


# ---- the tasks

_RESIZED = (
    "note: images are resized by the encoder's own training interpolation (bicubic; torchvision's weights: antialiased), from the centred "
    "square of the short side"
)


def _run_linear(job: Job, settings: TransferLinearSettings) -> TaskResult:
    notes = [
        _RESIZED,
        "note: the penalty is l2 in sum of losses + l2 / 2 |weight|^2 with a free bias (scikit-learn's C = 1 / l2); the paper does not say",
        "note: which images are held out is a seeded choice of the paper's sizes where it gives only those",
    ]
    return run_sets(job, settings, evaluate=evaluate_linear, paper=PAPER_LINEAR, notes=notes)


def _run_finetune(job: Job, settings: TransferFinetuneSettings) -> TaskResult:
    notes = [
        _RESIZED + " in training and of 7/8 of it in the test",
        "note: rates fall on a half cosine without warm-up, and weight decay is on all weights; the paper says neither",
        *_scratch_notes(job, settings),
    ]
    return run_sets(job, settings, evaluate=evaluate_finetune, paper=PAPER_FINETUNE, notes=notes)


def _scratch_notes(job: Job, settings: TransferFinetuneSettings) -> list[str]:
    """Returns a sentence where an untrained network has settings of its own."""
    if all(subject.name != "untrained" for subject in job.subjects) or settings.scratch == settings.tuned:
        return []
    source = "SimCLR's settings for random weights (appendix B.8)" if settings.scratch == TransferFinetuneSettings().scratch else "its own"
    return [f"note: the untrained network has {source}: --scratch_steps, _rates, _decays"]


TASKS = {
    "transfer linear": Task(
        title="transfer, linear",
        what="logistic regression on frozen features of other sets",
        versions={
            "paper": TransferLinearSettings(),
            "quick": TransferLinearSettings(penalties=12, lowest=1e-3, highest=1e4, max_steps=300),
        },
        run=_run_linear,
        plan=_plan_linear,
        paths=lambda *_: (),
        is_current=_is_current,
        reported=False,
    ),
    "transfer finetune": Task(
        title="transfer, fine-tuned",
        what="the whole network fine-tuned on other sets",
        versions={
            "paper": TransferFinetuneSettings(),
            "quick": TransferFinetuneSettings(
                steps=200,
                global_batch=64,
                rates=(0.05, 0.2),
                decays=(1e-5, 0.0),
                smallest_crop=0.4,
                scratch_steps=200,
                scratch_rates=(0.05, 0.2),
                scratch_decays=(1e-5, 0.0),
            ),
        },
        run=_run_finetune,
        plan=_plan_finetune,
        paths=lambda *_: (),
        is_current=_is_current,
        reported=False,
    ),
}
