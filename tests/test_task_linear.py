"""Linear evaluation as in the paper: the heads of all rates side by side, their optimizer, and the command."""

from __future__ import annotations

import json
import re
import signal
import time

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fastbyol import load_encoder
from fastbyol.evaluation.embedding import weights_digest
from fastbyol.evaluation.tasks.linear import Heads, LinearSettings, build_sgd, heads_loss
from fastbyol.evaluation.tasks.scoring import packed, unpacked
from fastbyol.schedules import lr_at
from tests.commands import LIMIT_S, run_python
from tests.conftest import noisy_colours
from tests.forked import ForkedPython
from tests.test_report import call

FAST = ("--settings", "paper", "--epochs", "3", "--global_batch", "16", "--batch", "16", "--device", "cpu", "--workers", "1")


def test_the_paper_settings_are_the_papers():
    settings = LinearSettings()
    assert (settings.epochs, settings.global_batch, settings.momentum) == (80, 1024, 0.9)
    assert settings.rates == (0.4, 0.3, 0.2, 0.1, 0.05)
    assert (settings.held_out, settings.views, settings.tanh_logits) == ((10_009, 0.08), "crop_flip", False)


@pytest.mark.parametrize("tanh_logits", [False, True])
def test_heads_trained_side_by_side_equal_separate_ones(tanh_logits: bool):
    rates, settings = (0.4, 0.1, 0.05), LinearSettings(tanh_logits=tanh_logits)
    generator = torch.Generator().manual_seed(0)
    feature = torch.randn(40, 12, 7, generator=generator, dtype=torch.float64)
    label = torch.randint(5, (40, 12), generator=generator)

    def trained(of: tuple[float, ...]) -> Heads:
        heads = Heads(len(of), feature_dim=7, num_classes=5, seed=1).double()
        optimizer = build_sgd(heads, of, momentum=0.9)
        for step in range(40):
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, total_steps=40, warmup_steps=0, base_lr=1.0, global_batch=1024) * group["lr_factor"]
            heads_loss(heads(feature[step]), label[step], settings).backward()
            optimizer.step()
            optimizer.zero_grad()
        return heads

    together = trained(rates)
    for number, rate in enumerate(rates):
        # The oracle: one layer, torch's own cross-entropy and the update written out (Nesterov as in tests/golden/sgd_nesterov_f64.npz).
        first = Heads(1, feature_dim=7, num_classes=5, seed=1).double()
        weight, bias = first.weight[0].detach().clone().requires_grad_(), first.bias[0].detach().clone().requires_grad_()
        buffers = [torch.zeros_like(weight), torch.zeros_like(bias)]
        for step in range(40):
            logits = F.linear(feature[step], weight, bias)
            if tanh_logits:
                logits = 20 * torch.tanh(logits / 20)
            loss = F.cross_entropy(logits, label[step]) + (0.01 * logits.square().mean() if tanh_logits else 0)
            lr = 4 * rate * 0.5 * (1 + np.cos(np.pi * step / 40))
            for parameter, buffer, gradient in zip((weight, bias), buffers, torch.autograd.grad(loss, (weight, bias)), strict=True):
                buffer.mul_(0.9).add_(gradient)
                with torch.no_grad():
                    parameter.sub_(lr * (gradient + 0.9 * buffer))
        assert torch.allclose(together.weight[number], weight, rtol=0, atol=1e-6)
        assert torch.allclose(together.bias[number], bias, rtol=0, atol=1e-6)


def test_sgd_follows_the_golden_nesterov_trajectory():
    golden = {name: torch.from_numpy(value) for name, value in np.load("tests/golden/sgd_nesterov_f64.npz").items()}
    heads = Heads(2, feature_dim=16, num_classes=10, seed=0).double()
    with torch.no_grad():
        for weight, bias in zip(heads.weight, heads.bias, strict=True):
            weight.copy_(golden["w_init"].T)
            bias.copy_(golden["b_init"])
    # The official code's rate is the first head's factor times the step's rate; the second head has half of it.
    optimizer = build_sgd(heads, (0.8, 0.4), momentum=golden["momentum"].item())
    for step, lr in enumerate(golden["lr"].tolist()):
        assert lr == pytest.approx(0.8 * lr_at(step, total_steps=10, warmup_steps=0, base_lr=1.0, global_batch=256))
        for group in optimizer.param_groups:
            group["lr"] = lr / 0.8 * group["lr_factor"]
        for weight, bias in zip(heads.weight, heads.bias, strict=True):
            weight.grad, bias.grad = golden["gw"][step].T.clone(), golden["gb"][step].clone()
        optimizer.step()
        assert torch.allclose(heads.weight[0], golden["w"][step].T, rtol=0, atol=1e-13)
        assert torch.allclose(heads.bias[0], golden["b"][step], rtol=0, atol=1e-13)
    moved = [weight.detach() - golden["w_init"].T for weight in heads.weight]
    assert torch.allclose(moved[0], 2 * moved[1], rtol=0, atol=1e-12), "the update is linear in the rate"


def test_packed_hits_are_unpacked_whatever_their_number():
    for num in (1, 8, 13):
        hits = torch.rand(num, generator=torch.Generator().manual_seed(num)) > 0.5
        assert torch.equal(unpacked(packed(hits)), hits)


def test_the_command_writes_scores_beside_the_papers_and_does_not_repeat_itself(colours_run, colours, tmp_path, capsys):
    arguments = [
        "evaluate",
        "linear",
        "--checkpoint",
        str(colours_run),
        "--data",
        str(colours),
        "--out",
        str(tmp_path),
        *FAST,
        "--compare",
        f"twin={colours_run}",
    ]
    code, out, err = call(arguments, capsys)
    assert code == 0, err
    for text in ("BYOL", "untrained encoder", "paper: BYOL", "74.3", "66 train, 6 held out, 24 val", "verdict: "):
        assert text in out
    record = json.loads((tmp_path / "linear.json").read_text())
    assert record["version"] == "paper"
    assert record["inputs"].startswith(f"{weights_digest(load_encoder(colours_run))} "), "a card's scores are of its weights"
    assert record["settings"]["epochs"] == 3
    assert list(record["subjects"]) == ["byol", "untrained", "twin"]
    assert record["subjects"]["twin"]["scores"] == record["subjects"]["byol"]["scores"], "the same weights under another name"
    trained = record["subjects"]["byol"]
    # A darker channel is easily told, a third by chance; 13 steps reach 63 to 100 %, by the number format of the run.
    assert trained["scores"]["top1"] > 0.5
    assert set(trained["chosen"]["held_out_top1"]) == {"0.4", "0.3", "0.2", "0.1", "0.05"}
    assert trained["details"]["global_batch"] == 16
    assert [path.name for path in tmp_path.iterdir()] == ["linear.json"], "the unfinished work is gone"
    written = (tmp_path / "linear.json").stat().st_mtime_ns
    code, out, err = call(arguments, capsys)
    assert (code, "already evaluated" in err, "BYOL" in out) == (0, True, True)
    assert (tmp_path / "linear.json").stat().st_mtime_ns == written


def test_a_dry_run_says_how_much_there_is_to_do_and_starts_nothing(colours_run, colours, tmp_path, capsys):
    arguments = ["evaluate", "linear", "--checkpoint", str(colours_run), "--data", str(colours), "--out", str(tmp_path), *FAST, "--dry_run"]
    code, out, err = call(arguments, capsys)
    assert code == 0, err
    assert "images: 66 train, 6 held out, 24 val, 3 classes" in out
    assert "steps: 12 for the sweep of 5 rates, 14 for the final fit, for each encoder" in out
    # (3 x 66 + 3 x 72 + 6 + 24) images, for the trained and the untrained encoder
    assert "for 888 forward passes of the frozen encoder" in out
    assert list(tmp_path.iterdir()) == []


def test_one_rate_is_not_chosen_so_it_is_trained_once(colours_run, colours, tmp_path, capsys):
    typed = ["evaluate", "linear", "--checkpoint", str(colours_run), "--data", str(colours), "--out", str(tmp_path), *FAST]
    typed += ["--rates", "0.1", "--init", "byol"]
    code, out, err = call([*typed, "--dry_run"], capsys)
    assert code == 0, err
    assert "images: 72 train, 0 held out, 24 val, 3 classes" in out
    assert "steps: 14 for the final fit, for each encoder" in out
    assert "for 240 forward passes" in out, "3 epochs of 72 images, and 24"
    code, _, err = call(typed, capsys)
    assert code == 0, err
    assert json.loads((tmp_path / "linear.json").read_text())["subjects"]["byol"]["chosen"] == {"rate": 0.1, "held_out_top1": None}


def test_a_stopped_evaluation_goes_on_and_ends_as_an_undisturbed_one(colours_run, colours, tmp_path, capsys):
    long = [word if word != "3" else "30" for word in FAST]
    typed = ["evaluate", "linear", "--checkpoint", str(colours_run), "--data", str(colours), *long, "--init", "byol"]
    code, _, err = call([*typed, "--out", str(tmp_path / "whole")], capsys)
    assert code == 0, err
    work, log = tmp_path / "stopped", tmp_path / "log"
    with ForkedPython("-m", "fastbyol", *typed, "--out", work, out=log, err=log) as process:
        deadline = time.monotonic() + LIMIT_S
        # In the final fit: the sweep is finished and kept.
        while not list(work.glob("linear.work-*/byol_sweep*.json")):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_S) == 75, log.read_text()
    said = log.read_text()
    assert re.search(r"stopped after step \d+ of 135 of byol rate=0[.]\d+, saved; the same command goes on", said), said
    assert not (work / "linear.json").exists()
    code, _, err = call([*typed, "--out", str(work)], capsys)
    assert code == 0, err
    whole, stopped = (json.loads((tmp_path / name / "linear.json").read_text())["subjects"]["byol"] for name in ("whole", "stopped"))
    for key in ("scores", "chosen"):
        assert stopped[key] == whole[key]


@pytest.mark.distributed
def test_two_ranks_find_what_one_finds(colours_run, colours, tmp_path, capsys):
    # float32 and all images in each step: the ranks' mean gradient is then one rank's, whatever the batch's order.
    arguments = ["evaluate", "linear", "--checkpoint", str(colours_run), "--data", str(colours), *FAST]
    assert call([*arguments, "--out", str(tmp_path / "one")], capsys)[0] == 0
    # By torchrun itself, as README has it; the other evaluations' ranks are forks.
    done = run_python(
        "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "fastbyol", *arguments, "--out", tmp_path / "two"
    )
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / name / "linear.json").read_text())["subjects"] for name in ("one", "two"))
    for subject in ("byol", "untrained"):
        assert two[subject]["scores"] == one[subject]["scores"]
        assert two[subject]["chosen"] == one[subject]["chosen"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--rates", "0.1,x"], "--rates x: must be a number"),
        (["--rates", "0.1,0.1"], "--rates = (0.1, 0.1): must be different numbers"),
        (["--epochs", "-1"], "--epochs = -1"),
        (["--views", "blurred"], "--views = 'blurred'"),
        (["--held_out", "100"], "--held_out 100: 100 of 72 labelled training images"),
        (["--tanh_logits", "perhaps"], "--tanh_logits perhaps: must be yes or no"),
        (["--k", "5"], "--k: is not an option of evaluate linear"),
        (["--compare", "nowhere.pth"], "nowhere.pth"),
        (["--compare", "byol=RUN"], "'byol' is the name of the checkpoint's own encoder; give another NAME="),
        (["--settings", "quick"], "--epochs: has no effect on the quick linear protocol; add --settings paper"),
        (["--data", "RUN"], "no val images; expected"),
    ],
)
def test_a_mistake_is_one_line(colours_run, colours, tmp_path, capsys, options, said):
    typed = ["evaluate", "linear", "--checkpoint", str(colours_run), "--data", str(colours), "--out", str(tmp_path), *FAST]
    for name, value in zip(options[::2], options[1::2], strict=True):
        if name in typed:
            typed[typed.index(name) + 1] = value
        else:
            typed += [name, value]
    code, out, err = call([word.replace("RUN", str(colours_run)) for word in typed], capsys)
    lines = [line for line in err.splitlines() if not line.startswith("...")]
    assert (code, out, len(lines)) == (2, "", 1)
    assert said in lines[0]


def test_a_class_without_training_images_is_named(colours_run, tmp_path, capsys):
    data = noisy_colours(tmp_path / "data", train=4, val=2)
    for path in (data / "train" / "red").iterdir():
        path.unlink()
    (data / "train" / "red").rmdir()
    typed = ["evaluate", "linear", "--checkpoint", str(colours_run), "--data", str(data), "--out", str(tmp_path), *FAST]
    code, _, err = call(typed, capsys)
    assert code == 2
    assert "1 classes have images in val only, the first is 'red'" in err
