"""The programs on a GPU: marked `gpu`, off by default, skipped without one.  Run with: python -m pytest -m gpu"""

import pytest
import torch
from conftest import call
from test_latent import STAGE, UNET

import evaluate
import pretrain
import sample
import train_tan
from checkpoints.run_folder import load_run
from plumbing.files import read_metrics

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def on(device, flags):
    """Flags with the device replaced."""
    return [device if before == "--device" else word for before, word in zip(["", *flags], flags)]


@pytest.mark.parametrize("flags", [[], ["--precision", "bf16"], ["--checkpoint-blocks"], ["--micro-batch-size", "3"],
                                   ["--pgd-network", "source"]])
def test_train_and_sample(flags, tiny, tmp_path):
    call(train_tan.main, *on("cuda", tiny.flags()), *flags, "--samples", 2, "--output-dir", tmp_path / "run")
    assert all(line["pgd_gain"] > 0 for line in read_metrics(tmp_path / "run" / "metrics.jsonl"))
    call(sample.main, tmp_path / "run", "-n", 2, "--steps", 2, "--device", "cuda", "--guidance", 1)
    assert len(list((tmp_path / "run" / "drawn").glob("*.png"))) == 2


@pytest.mark.parametrize("first, then", [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_run_goes_on_on_the_other_device(first, then, tiny, train, tmp_path):
    call(train_tan.main, *on(first, tiny.flags()), "--iterations", 3, "--output-dir", tmp_path / "run")
    call(train_tan.main, "--output-dir", tmp_path / "run", "--resume", "--iterations", 6, "--device", then)
    whole = train(tmp_path / "whole")
    a, b = (dict(load_run(folder)[0].model.named_parameters()) for folder in (tmp_path / "run", whole))
    assert all(torch.allclose(a[name], b[name], atol=5e-3) for name in a)


def test_both_devices_compute_the_same(tiny, train, tmp_path):
    call(train_tan.main, *on("cuda", tiny.flags()), "--output-dir", tmp_path / "run")
    lines, expected = (read_metrics(folder / "metrics.jsonl") for folder in (tmp_path / "run", train(tmp_path / "cpu")))
    for line, other in zip(lines, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-2)


def test_latent(tmp_path):
    stage, unet = tmp_path / "stage", tmp_path / "unet"
    call(pretrain.main, "toyfaces", "--network", "kl", *on("cuda", STAGE), "--output-dir", stage)
    call(pretrain.main, "toyfaces", "--first-stage", stage / "model.safetensors", *on("cuda", UNET), "--output-dir", unet)
    call(train_tan.main, "--source", unet / "model.safetensors", "--target", "sunglasses", "--method", "tan", "--iterations", 2,
         "--batch-size", 4, "--classifier-iterations", 2, "--source-count", 8, "--samples", 2, "--sample-steps", 2,
         "--device", "cuda", "--output-dir", tmp_path / "run")
    assert load_run(tmp_path / "run")[0].shape == (4, 8, 8)


def test_evaluate(tmp_path, capsys):
    call(train_tan.main, "--target", "sunglasses", "--method", "adaptor", "--iterations", 1, "--samples", 0, "--device",
         "cuda", "--output-dir", tmp_path / "run")
    call(evaluate.main, tmp_path / "run", "-n", 8, "--steps", 2, "--device", "cuda")
    assert "| " in capsys.readouterr().out
