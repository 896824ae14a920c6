"""Derives what a training step should reach on an H100, from the code that would run there; nothing is measured.

python -m benchmarks.derived            prints the derivation from the kept record
python -m benchmarks.derived --write    traces and generates the code anew, a few minutes, and keeps benchmarks/results/derived_h100.json

How: eager stages are traced on fake CUDA tensors with fake ranks (`gpu_trace`), and bytes are those of all operands. Compiled stages are
Inductor's code for an H100 (`generated_code`), and bytes are its own count for each kernel: of the whole augmentation, and of the first
group of ResNet-50's blocks with batch norm over 8 ranks. The group's bytes over those of ideally fused kernels (`roofline`) are taken for
the whole encoder. Then the roofline's arithmetic: convolutions at 55 % of the peak, then all bytes at 85 % of the bandwidth, one after the
other. Launches, messages and the loader are taken to hide behind that, so these figures are an upper bound.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import roofline
from benchmarks.generated_code import augmentation_code, training_code
from benchmarks.gpu_trace import fake_ranks, trace_step
from benchmarks.report_text import markdown_table
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


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    parser = OneLineParser(prog="python -m benchmarks.derived", description=__doc__)
    parser.add_argument("--write", action="store_true", help="derive anew and keep the record")
    if parser.parse_args(arguments).write:
        RECORD.write_text(json.dumps(derive(), indent=1) + "\n")
    print(derived_table())


def derive() -> dict[str, Any]:
    """Returns the record: bytes an image by stage, launches, and the images/s that follow."""
    config = TrainConfig(global_batch=BATCH * RANKS, model=MODEL)
    eager = {ranks: trace_step(config, world_size=ranks, batch=BATCH) for ranks in (1, RANKS)}
    group = _group_code()
    flop, sent = roofline.work_of(MODEL, size_px=SIZE_PX), {}
    stages: dict[str, dict[str, float]] = {}
    augmentation = augmentation_code(ViewPair(size_px=SIZE_PX), images=BATCH).num_bytes / BATCH / 1e6
    for ranks, traced in eager.items():
        found = {name: stage.megabytes_an_image(BATCH) for name, stage in traced.items() if name != "augmentation"}
        stages[f"eager, {ranks} rank{'s' * (ranks > 1)}"] = {"augmentation": augmentation, **found}
        sent[str(ranks)] = {name: stage.launches for name, stage in traced.items()}
    with torch.device("meta"):
        elements = roofline.count_elements(encoder_from(MODEL), torch.empty(2, 3, SIZE_PX, SIZE_PX))
    forward, backward = (roofline.VIEWS * roofline.HALF * passes / 1e6 for passes in roofline.fused_passes(elements))
    whole = {"forward": 2 * forward * group["forward_over_ideal"], "backward": backward * group["backward_over_ideal"]}
    update = stages[f"eager, {RANKS} ranks"]["update"]
    stages[f"compiled, {RANKS} ranks"] = {"augmentation": augmentation, **whole, "update": update}
    return {
        "what": "derived, not measured: python -m benchmarks.derived --write",
        "settings": {"encoder": MODEL.encoder, "batch": BATCH, "size_px": SIZE_PX, "card": H100.name},
        "versions": package_versions(),
        "megabytes_an_image": {name: {stage: round(value, 2) for stage, value in parts.items()} for name, parts in stages.items()},
        "launches": sent,
        "ceilings": ceilings(),
        "first_group": group,
        "images_per_s": {name: round(roofline.attainable(flop.flop, 1e6 * sum(parts.values()), H100)[0]) for name, parts in stages.items()},
    }


def ceilings() -> dict[str, dict[str, list[float]]]:
    """Returns launches and megabytes an image of each eager stage of a smaller network, by ranks: a test holds the product to them."""
    return {
        str(ranks): {name: [stage.launches, round(stage.megabytes_an_image(CHECKED_BATCH), 3)] for name, stage in traced.items()}
        for ranks in (1, RANKS)
        for traced in [trace_step(checked_config(ranks), world_size=ranks, batch=CHECKED_BATCH)]
    }


def checked_config(ranks: int) -> TrainConfig:
    return TrainConfig(global_batch=CHECKED_BATCH * ranks, model=ModelConfig(encoder="resnet18"), views=ViewPair(size_px=96))


def _group_code() -> dict[str, Any]:
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
    """Returns megabytes an image by stage and images/s, from the kept record."""
    record = json.loads(RECORD.read_text())
    names = ("augmentation", "forward", "backward", "update")
    rows = []
    for how, parts in record["megabytes_an_image"].items():
        rate = f"{record['images_per_s'][how]:,} (derived, not measured)"
        rows.append([how, *(f"{parts[name]:,.0f}" for name in names), f"{sum(parts.values()):,.0f}", rate])
    return markdown_table(("step", *(f"{name}, MB" for name in names), "MB an image", "images/s per H100"), rows)


if __name__ == "__main__":
    main()
