"""python -m fastbyol export: the trained encoder in the format of another program, checked there, with a card."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fastbyol.commands.shared_options import CHECKPOINT_HELP, changes_from
from fastbyol.config.arguments import local_or_url, path_text
from fastbyol.config.console import printable, say
from fastbyol.exports.registry import WHAT
from fastbyol.host.signals import INTERRUPTED_EXIT


def add_export(commands: Any) -> None:
    """Adds the command to the parser's sub-commands."""
    formats = "\n".join(f"  {name:<14} {text}" for name, text in WHAT.items())
    what = "write the trained encoder for torchvision, timm, the Hugging Face Hub, ONNX and others, check it there, and add a card"
    parser = commands.add_parser("export", help=what, description=f"{export_encoder.__doc__}\n\nformats:\n{formats}")
    parser.add_argument("--checkpoint", required=True, type=path_text, help=CHECKPOINT_HELP)
    parser.add_argument("--to", required=True, nargs="+", metavar="FORMAT", help=f"one or more of {', '.join(WHAT)}; or all")
    parser.add_argument("--out", required=True, type=Path, help="file to write (huggingface: folder); for several formats a folder")
    parser.add_argument("--data", type=local_or_url, help="images to compare features on (default: the run's own)")
    parser.add_argument(
        "--fold_bn", choices=("auto", "yes", "no"), default="auto", help="fold batch norm into the convolutions (auto: in onnx only)"
    )
    parser.add_argument("--licence", default="", help="licence of the weights for the card, such as cc-by-4.0 (default: not stated)")
    parser.add_argument("--overwrite", action="store_true", help="replace what exists at --out")
    parser.set_defaults(command=export_encoder)


def export_encoder(options: argparse.Namespace) -> None:
    """Writes the online encoder, which is the one that evaluate uses, in the format of another program, and a card beside it.

    Each file is loaded back by the program that it is for, and its features are compared with the encoder's before the file gets its name.
    """
    changes = changes_from(options.run_options)
    import torch

    from fastbyol.export import encoder_of
    from fastbyol.exports.card import UNKNOWN_LICENCE, collect_facts
    from fastbyol.exports.check import check_images
    from fastbyol.exports.format import Subject
    from fastbyol.exports.registry import formats_for
    from fastbyol.exports.writing import places, write_exports
    from fastbyol.models import check_image_size
    from fastbyol.run.foreign_weights import load_run_or_weights

    run = load_run_or_weights(options.checkpoint, changes=changes)
    model = run.config.model
    # Checked first: for an encoder that does not exist, a format would advise to try other formats.
    check_image_size(run.config.views.size_px, encoder=model.encoder, stem=model.stem)
    formats, left_out = formats_for(options.to, model, fold=options.fold_bn)
    where = places(formats, options.out, overwrite=options.overwrite)
    encoder = encoder_of(run, announce=announce).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    subject = Subject(encoder, run.config, fold=options.fold_bn)
    images = check_images(run, options.data)
    facts = collect_facts(run, subject, licence=printable(options.licence) or UNKNOWN_LICENCE)
    for name, reason in left_out.items():
        announce(f"{name} is left out: {reason}")
    # Name the step: if the newest checkpoint is damaged, the one before it was loaded.
    of_step = "" if "encoder" in run.state else f", of the checkpoint after step {run.step:,}"
    try:
        for each in write_exports(subject, formats, where, facts, images, announce=announce):
            size = f"{each.size / 1e6:.1f} MB"
            say(f"exported: {each.path} ({size}), for {each.name}{of_step}", f"  {each.facts['check']['words']}", "  load it:")
            say(*(f"    {line}" for line in each.facts["load"]), f"  card: {each.card}")
    except KeyboardInterrupt:
        say("fastbyol: interrupted; formats that were not exported yet are missing", file=sys.stderr)
        sys.exit(INTERRUPTED_EXIT)


def announce(text: str) -> None:
    say(f"... {text}", file=sys.stderr)
