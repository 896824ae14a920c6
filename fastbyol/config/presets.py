"""Named runs, each with its command, the figure to expect and where that figure comes from.

Numbers of the paper's runs: Grill et al., section 3.3 and appendix F and G; official configs/byol.py and README.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastbyol.config.errors import UserError
from fastbyol.config.plain import nearest_name
from fastbyol.config.schema import ModelConfig, OptimConfig, TrainConfig
from fastbyol.config.views import PAPER, ViewPair, ViewSpec


@dataclass(frozen=True)
class Preset:
    """A named run: `expected` is a published figure with its `source`; `run_here` what we measured ourselves, or 'not yet run'."""

    what: str
    config: TrainConfig
    expected: str
    source: str
    run_here: str = "not yet run"

    def command(self, name: str) -> str:
        if name.startswith("cpu_demo"):
            kind = "scenes" if name.endswith("scenes") else "fashion"
            return f"python fastbyol/train.py --preset {name} --data.train demo/{kind}/train.beton --out runs/demo"
        return f"torchrun --nproc-per-node 8 fastbyol/train.py --preset {name} --data.train train.beton --out runs/{name}"


def _paper(
    epochs: float, *, base_lr: float, tau_base: float, weight_decay: float, global_batch: int = 4096, encoder: ModelConfig | None = None
) -> TrainConfig:
    optim = OptimConfig(base_lr=base_lr, tau_base=tau_base, weight_decay=weight_decay)
    return TrainConfig(epochs=epochs, global_batch=global_batch, optim=optim, model=encoder or ModelConfig())


_IMAGENETTE = TrainConfig(
    epochs=1000,
    global_batch=256,
    model=ModelConfig(encoder="resnet18"),
    views=replace(PAPER, size_px=128),
    optim=OptimConfig(base_lr=2.0, tau_base=0.996, weight_decay=1e-6),
)

# Small images under ImageNet's views learn nothing in minutes: larger crops, rotation, no blur, a target that follows fast, large steps.
_DEMO_VIEW = ViewSpec(crop_area=(0.4, 1.0), rotation_deg=15.0, gray_p=0.0, blur_p=0.0, solarize_p=0.0)
_DEMO = TrainConfig(
    epochs=20,
    global_batch=64,
    log_every=50,
    checkpoint_every=1000,
    model=ModelConfig(encoder="resnet8", stem="small2", hidden_dim=512, projection_dim=128),
    views=ViewPair(view1=_DEMO_VIEW, view2=_DEMO_VIEW, size_px=32),
    optim=OptimConfig(base_lr=8.0, warmup_epochs=1, tau_base=0.8),
)

# Colour, light and place tell the scenes' instances apart, so the views take them away; what stays is shape and pattern.
_SCENES_VIEW = replace(_DEMO_VIEW, crop_area=(0.5, 1.0), rotation_deg=20.0, jitter_p=1.0, saturation=0.5, hue=0.5, gray_p=0.8)
_SCENES = replace(_DEMO, epochs=10, views=replace(_DEMO.views, view1=_SCENES_VIEW, view2=_SCENES_VIEW))

PRESETS: dict[str, Preset] = {
    "r50_40ep": Preset(
        what="ResNet-50, 40 epochs, batch 4096",
        config=_paper(40, base_lr=0.45, tau_base=0.97, weight_decay=1e-6),
        expected="62.0 +- 0.5 top-1 online",
        source="deepmind-research issue 76",
    ),
    "r50_100ep": Preset(
        what="ResNet-50, 100 epochs, batch 4096",
        config=_paper(100, base_lr=0.45, tau_base=0.99, weight_decay=1e-6),
        expected="68.4 top-1 linear (another code)",
        source="solo-learn README; the paper gives none",
    ),
    "r50_300ep": Preset(
        what="ResNet-50, 300 epochs, batch 4096",
        config=_paper(300, base_lr=0.3, tau_base=0.99, weight_decay=1e-6),
        expected="72.5 top-1 linear",
        source="paper, section 5",
    ),
    "r50_1000ep": Preset(
        what="ResNet-50, 1000 epochs, batch 4096",
        config=_paper(1000, base_lr=0.2, tau_base=0.996, weight_decay=1.5e-6),
        expected="74.3 top-1 linear",
        source="paper, table 1",
    ),
    "r200x2_1000ep": Preset(
        what="ResNet-200 of width 2, 1000 epochs, batch 4096",
        config=_paper(1000, base_lr=0.2, tau_base=0.996, weight_decay=1.5e-6, encoder=ModelConfig(encoder="resnet200", width=2)),
        expected="79.6 top-1 linear",
        source="paper, table 1",
    ),
    "r50_1000ep_batch512": Preset(
        what="ResNet-50, 1000 epochs, batch 512",
        config=_paper(1000, base_lr=0.4, tau_base=0.9995, weight_decay=1.5e-6, global_batch=512),
        expected="73.7 top-1 linear",
        source="paper, appendix G",
    ),
    "imagenette_r18": Preset(
        what="ResNet-18 on Imagenette at 128 px, 1000 epochs, batch 256",
        config=_IMAGENETTE,
        expected="92.3 top-1 online",
        source="official README",
    ),
    "cpu_demo": Preset(
        what="ResNet-8 on the demo's fashion photographs, minutes on two cores",
        config=_DEMO,
        expected="none published",
        source="ours",
        run_here="76.2 to 77.3 top-1 linear, 72.7 to 73.2 kNN, three seeds",
    ),
    "cpu_demo_scenes": Preset(
        what="ResNet-8 on the demo's drawn scenes, minutes on two cores",
        config=_SCENES,
        expected="none published",
        source="ours",
        run_here="68.0 to 73.5 top-1 linear, 59.3 to 61.9 kNN, three seeds",
    ),
}


def preset_config(name: str) -> TrainConfig:
    """The config of a preset.

    Raises:
        UserError: no such preset, with the nearest one.
    """
    if name not in PRESETS:
        raise UserError(f"preset = {name!r}: no such preset{nearest_name(name, PRESETS)}; one of {', '.join(PRESETS)}")
    return PRESETS[name].config
