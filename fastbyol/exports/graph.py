"""The encoder as a program with its weights: torch.export's, and ONNX. The number of images of a batch is free, their size is not."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fastbyol.config.errors import UserError
from fastbyol.exports.format import Facts, Features, Format, Subject, no_refusal
from fastbyol.models.resnet import ResNet
from fastbyol.run.weights_files import METADATA

INPUT, OUTPUT = "image", "feature"
CARD_FILE = f"{METADATA}.json"
"""Name of the card's facts inside a .pt2 file."""
_LARGEST_ONNX = 2**31
"""Bytes of protobuf's largest message."""


def folded(encoder: ResNet) -> ResNet:
    """Returns a copy in eval mode in which each convolution has its batch norm's scale and offset: the same features, fewer operations."""
    network = deepcopy(encoder).eval()
    for module in [network, *(block for group in network.groups() for block in group)]:
        pairs = [(f"conv{number}", f"bn{number}") for number in (1, 2, 3) if hasattr(module, f"conv{number}")]
        for conv, norm in pairs:
            setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
            setattr(module, norm, nn.Identity())
        shortcut = getattr(module, "downsample", None)
        if shortcut is not None:
            shortcut[0], shortcut[1] = fuse_conv_bn_eval(shortcut[0], shortcut[1]), nn.Identity()
    return network


def _program(subject: Subject, *, fold: bool) -> Any:
    """Returns the encoder as an ExportedProgram with a free batch size, traced once."""
    key = f"program, folded {fold}"
    if key not in subject.made:
        encoder = folded(cast(ResNet, subject.encoder)) if fold else subject.encoder
        with torch.no_grad():
            batch = torch.export.Dim("batch", min=1)
            program = torch.export.export(encoder, (subject.example(),), dynamic_shapes=({0: batch},))
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # paths of this machine's source files, which both formats would store
        subject.made[key] = program
    return subject.made[key]


# ---- torch.export


def _convert_program(subject: Subject) -> Any:
    return _program(subject, fold=subject.fold == "yes")


def _save_program(program: Any, path: Path, facts: Facts, subject: Subject) -> None:
    torch.export.save(program, path, extra_files={CARD_FILE: json.dumps(facts)})


def _read_program(path: Path, subject: Subject) -> Features:
    return torch.export.load(path).module()


def _program_lines(name: str, subject: Subject) -> list[str]:
    size = subject.config.views.size_px
    return [
        "import torch",
        f"model = torch.export.load({name!r}).module()",
        f"feature = model(images)  # (N, 3, {size}, {size}) -> (N, {subject.feature_dim})",
    ]


# ---- ONNX


def _convert_onnx(subject: Subject) -> Any:
    with _quiet():
        # Its optimizer folds every batch norm, those of timm's models too.
        program = torch.onnx.export(
            _program(subject, fold=False),
            dynamo=True,
            input_names=[INPUT],
            output_names=[OUTPUT],
            optimize=subject.fold != "no",
            external_data=False,
            verbose=False,
        )
    model = cast(Any, program).model_proto
    if (size := model.ByteSize()) >= _LARGEST_ONNX:
        raise UserError(f"--to onnx: {size / 1e9:.1f} GB are more than one ONNX file holds (2.1 GB); export it to torch_export")
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the converter's remarks on its own parts off the terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _save_onnx(model: Any, path: Path, facts: Facts, subject: Subject) -> None:
    del model.metadata_props[:]
    model.metadata_props.add(key=METADATA, value=json.dumps(facts))
    model.producer_name = "fastbyol"
    path.write_bytes(model.SerializeToString())


def _read_onnx(path: Path, subject: Subject) -> Features:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def features(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])

    return features


def _onnx_lines(name: str, subject: Subject) -> list[str]:
    size = subject.config.views.size_px
    return [
        "import onnxruntime",
        f"session = onnxruntime.InferenceSession({name!r})",
        f"feature = session.run(None, {{{INPUT!r}: images}})[0]  # float32 (N, 3, {size}, {size}) -> (N, {subject.feature_dim})",
    ]


FORMATS = {
    "onnx": Format(
        file="encoder.onnx",
        suffixes=(".onnx",),
        needs=("onnx", "onnxscript", "onnxruntime"),
        checked_in="onnxruntime",
        refusal=no_refusal,
        convert=_convert_onnx,
        save=_save_onnx,
        read=_read_onnx,
        lines=_onnx_lines,
        limit=1e-4,
        folds=True,
    ),
    "torch_export": Format(
        file="encoder.pt2",
        suffixes=(".pt2",),
        needs=(),
        checked_in="torch",
        refusal=no_refusal,
        convert=_convert_program,
        save=_save_program,
        read=_read_program,
        lines=_program_lines,
        limit=1e-4,
        folds=True,
    ),
}
