"""Derives what a training step should reach on an H100, from the code that would run there; nothing is measured.

python -m benchmarks.derived            prints the derivation from the kept record
python -m benchmarks.derived --write    traces and generates the code anew, a few minutes, and keeps benchmarks/results/derived_h100.json

How: eager stages are traced on fake CUDA tensors with fake ranks (`gpu_trace`), and bytes are those of all operands. Compiled stages are
Inductor's code for an H100 (`generated_code`), and bytes are its own count for each kernel: of the whole augmentation, and of the first
group of ResNet-50's blocks with batch norm over 8 ranks. The group's bytes over those of ideally fused kernels (`roofline`) are taken for
the whole encoder. Then the roofline's arithmetic: convolutions at 55 % of the peak, then all bytes at 85 % of the bandwidth, one after the
other. Launches, messages and the loader are taken to hide behind that, so these figures are an upper bound.

Rival: solo-learn's module at its best (`rival_steps`), traced in the same way, eager, with torch's nn.SyncBatchNorm over as many ranks. Its views
are made by its loader's workers, so it has no augmentation; the ratio to it leaves out ours too. Where the host reads a number of the device,
which it must wait for, is counted and costs nothing in the derivation: that favours the rival.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import roofline
from benchmarks.generated_code import Code, augmentation_code, training_code
from benchmarks.gpu_trace import Stage, fake_ranks, trace_rival, trace_step
from benchmarks.report_text import markdown_table
from benchmarks.rival_steps import SOLO_LEARN, SoloLearnStep
from fastbyol.config.arguments import OneLineParser
from fastbyol.config.errors import one_line_errors
from fastbyol.config.schema import ModelConfig, TrainConfig
from fastbyol.config.views import ViewPair
from fastbyol.models import use_all_ranks
from fastbyol.models.encoder import encoder_from
from fastbyol.models.view_batchnorm import convert_to_view_batchnorm
from fastbyol.run.provenance import package_versions

RECORD = Path(__file__).parent / "results" / "derived_h100.json"
MODEL, RANKS, BATCH, SIZE_PX = ModelConfig(encoder="resnet50"), 8, 512, 224
H100 = next(card for card in roofline.CARDS if card.name == "H100")
CHECKED_BATCH = 64
GROUP_INPUT = 64, 56
"""Channels and pixels of what the first group of blocks gets at 224 px."""
STAGES = ("augmentation", "forward", "backward", "update")
COMPILED, RIVAL = f"compiled, {RANKS} ranks", f"{SOLO_LEARN}, eager, nn.SyncBatchNorm, {RANKS} ranks"


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    parser = OneLineParser(prog="python -m benchmarks.derived", description=__doc__)
    parser.add_argument("--write", action="store_true", help="derive anew and keep the record")
    if parser.parse_args(arguments).write:
        RECORD.write_text(json.dumps(derive(), indent=1) + "\n")
    print(derived_table())


def derive() -> dict[str, Any]:
    """Returns the record: bytes an image by stage, launches and waits of the host, and the images/s that follow."""
    config = TrainConfig(global_batch=BATCH * RANKS, model=MODEL)
    traces = {f"eager, {ranks} rank{'s' * (ranks > 1)}": trace_step(config, world_size=ranks, batch=BATCH) for ranks in (1, RANKS)}
    traces[RIVAL] = trace_rival(SoloLearnStep, config, world_size=RANKS, batch=BATCH)
    augmentation = megabytes(full_augmentation())
    stages = {name: traced_stages(traced, augmentation=augmentation) for name, traced in traces.items()}
    group = group_code()
    stages[COMPILED] = compiled_stages(group, augmentation=augmentation, update=stages[f"eager, {RANKS} ranks"]["update"])
    rates = {name: rate(parts) for name, parts in stages.items()}
    alike = {name: rate(without_augmentation(parts)) for name, parts in stages.items()}
    return {
        "what": "derived, not measured: python -m benchmarks.derived --write",
        "settings": {"encoder": MODEL.encoder, "batch": BATCH, "size_px": SIZE_PX, "card": H100.name},
        "versions": package_versions(),
        "megabytes_an_image": {name: {stage: round(value, 2) for stage, value in parts.items()} for name, parts in stages.items()},
        "launches": {name: {stage: part.launches for stage, part in traced.items()} for name, traced in traces.items()},
        "waits_of_the_host": {name: {stage: len(part.waits) for stage, part in traced.items()} for name, traced in traces.items()},
        "ceilings": ceilings(),
        "first_group": group,
        "images_per_s": {name: round(found) for name, found in rates.items()},
        "images_per_s_without_augmentation": {name: round(found) for name, found in alike.items()},
        "times_the_rival": {name: round(found / alike[RIVAL], 2) for name, found in alike.items()},
    }


def traced_stages(traced: dict[str, Stage], *, augmentation: float) -> dict[str, float]:
    """Returns megabytes an image of an eager step, with those of the compiled augmentation if it has one of its own."""
    found = {name: stage.megabytes_an_image(BATCH) for name, stage in traced.items()}
    return found | {"augmentation": augmentation} if "augmentation" in found else found


def compiled_stages(group: dict[str, Any], *, augmentation: float, update: float) -> dict[str, float]:
    """Returns megabytes an image of a compiled step: those of ideal kernels for the whole encoder, times the group's over its ideal."""
    forward, backward = _ideal_megabytes()
    whole = {"forward": forward * group["forward_over_ideal"], "backward": backward * group["backward_over_ideal"]}
    return {"augmentation": augmentation, **whole, "update": update}


def _ideal_megabytes() -> tuple[float, float]:
    """Returns megabytes an image of ideally fused kernels: both networks' forward passes, and the backward."""
    with torch.device("meta"):
        elements = roofline.count_elements(encoder_from(MODEL), torch.empty(2, 3, SIZE_PX, SIZE_PX))
    forward, backward = (roofline.VIEWS * roofline.HALF * passes / 1e6 for passes in roofline.fused_passes(elements))
    return 2 * forward, backward


def rate(parts: dict[str, float], card: roofline.Card = H100) -> float:
    """Returns images/s of a step with these megabytes an image, convolutions and memory passes one after the other."""
    return roofline.attainable(roofline.work_of(MODEL, size_px=SIZE_PX).flop, 1e6 * sum(parts.values()), card)[0]


def without_augmentation(parts: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in parts.items() if name != "augmentation"}


def full_augmentation() -> Code:
    """Returns the code of the augmentation of the record's batch."""
    return augmentation_code(ViewPair(size_px=SIZE_PX), images=BATCH)


def megabytes(code: Code) -> float:
    """Returns the megabytes that the code moves for each image of the record's batch."""
    return code.num_bytes / BATCH / 1e6


def ceilings() -> dict[str, dict[str, list[float]]]:
    """Returns launches and megabytes an image of each eager stage of a smaller network, by ranks: a test holds the product to them."""
    return {
        str(ranks): {name: [stage.launches, round(stage.megabytes_an_image(CHECKED_BATCH), 3)] for name, stage in traced.items()}
        for ranks in (1, RANKS)
        for traced in [trace_step(checked_config(ranks), world_size=ranks, batch=CHECKED_BATCH)]
    }


def checked_config(ranks: int) -> TrainConfig:
    return TrainConfig(global_batch=CHECKED_BATCH * ranks, model=ModelConfig(encoder="resnet18"), views=ViewPair(size_px=96))


def group_code() -> dict[str, Any]:
    """Returns bytes an image and what is saved for the backward, of the first group of blocks, compiled for `RANKS` ranks."""
    channels, px = GROUP_INPUT
    with torch.device("meta"):
        group: Any = encoder_from(MODEL).layer1
        plain = roofline.count_elements(group, torch.empty(2, channels, px, px))
    convert_to_view_batchnorm(group, views=2)
    use_all_ranks(group)
    x = torch.empty(2 * BATCH, channels, px, px, dtype=torch.bfloat16, device="meta").contiguous(memory_format=torch.channels_last)
    with fake_ranks(RANKS):
        forward, backward = training_code(group, lambda net, images: net(images).float().sum(), x.requires_grad_())
    ideal = [roofline.VIEWS * roofline.HALF * passes for passes in roofline.fused_passes(plain)]
    return {
        "forward_mb": round(forward.num_bytes / BATCH / 1e6, 2),
        "backward_mb": round(backward.num_bytes / BATCH / 1e6, 2),
        "saved_mb": {name: round(count / BATCH / 1e6, 2) for name, count in sorted(forward.saved.items())},
        "forward_over_ideal": round(forward.num_bytes / BATCH / ideal[0], 4),
        "backward_over_ideal": round(backward.num_bytes / BATCH / ideal[1], 4),
    }


def derived_table() -> str:
    """Returns megabytes an image by stage, images/s and their ratio to the rival's, from the kept record."""
    record = kept()
    flop, rows = roofline.work_of(MODEL, size_px=SIZE_PX).flop, []
    for how, parts in record["megabytes_an_image"].items():
        found = record["images_per_s"][how]
        cells = [f"{parts[name]:,.0f}" if name in parts else "none" for name in STAGES]
        waits = record["waits_of_the_host"].get(how)
        rows.append(
            [
                how,
                *cells,
                f"{sum(parts.values()):,.0f}",
                "" if waits is None else f"{sum(waits.values()):,}",
                f"{found:,} (derived, not measured)",
                f"{found * flop / H100.flop_per_s:.0%}",
                f"{record['times_the_rival'][how]:.2f}",
            ]
        )
    forward, backward = _ideal_megabytes()
    ideal = roofline.attainable(flop, 1e6 * (forward + backward), H100)[0]
    against = ideal / record["images_per_s_without_augmentation"][RIVAL]
    cells = ["none", f"{forward:,.0f}", f"{backward:,.0f}", "none", f"{forward + backward:,.0f}", ""]
    shares = [f"{ideal * flop / H100.flop_per_s:.0%}", f"{against:.2f}"]
    rows.append(["ideal kernels, fused: an upper limit", *cells, f"{ideal:,.0f} (derived, not measured)", *shares])
    ratio = "times solo-learn's images/s, both without augmentation"
    titles = (
        "step (derived, not measured)",
        *(f"{name}, MB" for name in STAGES),
        "MB an image",
        "waits of the host",
        "images/s per H100",
        "MFU",
        ratio,
    )
    return markdown_table(titles, rows)


def limits_table() -> str:
    """Returns the roofline's table of limits, with what the kept record lets expect of our compiled code."""
    return roofline.limits_table(ours={MODEL: 1e6 * sum(kept()["megabytes_an_image"][COMPILED].values())})


def kept() -> dict[str, Any]:
    """Returns the kept record."""
    return json.loads(RECORD.read_text())


if __name__ == "__main__":
    main()
