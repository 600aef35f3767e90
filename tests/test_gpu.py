"""The programs on a GPU: marked `gpu`, off by default.  Run with: python -m pytest -n 0 -m gpu

Without a GPU most run on the CPU, which shows that the tests are right, and no more.
"""

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

pytestmark = pytest.mark.gpu
GPU = "cuda" if torch.cuda.is_available() else "cpu"
NEEDS_ONE = pytest.mark.skipif(GPU == "cpu", reason="needs a GPU")  # or a compiler and minutes; or memory with a limit


def on(device, flags):
    """Flags with the device replaced."""
    return [device if before == "--device" else word for before, word in zip(["", *flags], flags)]


@pytest.mark.parametrize("flags", [[], ["--precision", "bf16"], ["--checkpoint-blocks"], ["--micro-batch-size", "3"],
                                   ["--pgd-network", "source"], pytest.param(["--compile"], marks=NEEDS_ONE)])
def test_train_and_sample(flags, tiny, tmp_path):
    call(train_tan.main, *on(GPU, tiny.flags()), *flags, "--samples", 2, "--output-dir", tmp_path / "run")
    gains = [line["pgd_gain"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "pgd_gain" in line]
    assert all(gain > 1 for gain in gains) and len(gains) == (0 if "source" in flags else 6)  # one network's, not two's
    call(sample.main, tmp_path / "run", "-n", 2, "--steps", 2, "--device", GPU, "--guidance", 1)
    assert len(list((tmp_path / "run" / "drawn").glob("*.png"))) == 2


@pytest.mark.parametrize("first, then", [(GPU, "cpu"), ("cpu", GPU)])
def test_a_run_goes_on_on_the_other_device(first, then, tiny, train, tmp_path):
    call(train_tan.main, *on(first, tiny.flags("adaptor")), "--iterations", 3, "--output-dir", tmp_path / "run")
    call(train_tan.main, "--output-dir", tmp_path / "run", "--resume", "--iterations", 6, "--device", then)
    whole = train(tmp_path / "whole", "--method", "adaptor")
    a, b = (torch.cat([p.flatten() for name, p in load_run(folder)[0].model.named_parameters() if "adaptor.up" in name])
            for folder in (tmp_path / "run", whole))
    assert (a - b).norm() < 0.2 * b.norm()  # which begin at zero; Adam turns the least gradient into a whole step


@NEEDS_ONE
def test_a_batch_too_large_goes_through_in_parts(tiny, tmp_path, capsys):
    """As the computation would with all the memory of the device."""
    given = [*on(GPU, tiny.flags("adaptor")), "--batch-size", 1024, "--iterations", 2]
    call(train_tan.main, *given, "--output-dir", tmp_path / "first")  # in which cuDNN tries what takes more memory
    torch.cuda.reset_peak_memory_stats()
    call(train_tan.main, *given, "--output-dir", tmp_path / "whole")
    taken, total = torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + taken / 2) / total)
    try:
        call(train_tan.main, *given, "--output-dir", tmp_path / "run")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory with 1024 pictures at once" in capsys.readouterr().err
    for line, other in zip(*(read_metrics(tmp_path / name / "metrics.jsonl") for name in ("run", "whole")), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-3)


def test_both_devices_compute_the_same(tiny, train, tmp_path):
    call(train_tan.main, *on(GPU, tiny.flags()), "--output-dir", tmp_path / "run")
    lines, expected = (read_metrics(folder / "metrics.jsonl") for folder in (tmp_path / "run", train(tmp_path / "cpu")))
    for line, other in zip(lines, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-2)


def test_latent(tmp_path):
    stage, unet = tmp_path / "stage", tmp_path / "unet"
    call(pretrain.main, "toyfaces", "--network", "kl", *on(GPU, STAGE), "--output-dir", stage)
    call(pretrain.main, "toyfaces", "--first-stage", stage / "model.safetensors", *on(GPU, UNET), "--output-dir", unet)
    call(train_tan.main, "--source", unet / "model.safetensors", "--target", "sunglasses", "--method", "tan", "--iterations", 2,
         "--batch-size", 4, "--classifier-iterations", 2, "--source-count", 8, "--samples", 2, "--sample-steps", 2,
         "--device", GPU, "--output-dir", tmp_path / "run")
    assert load_run(tmp_path / "run")[0].shape == (4, 8, 8)


def test_evaluate(tmp_path, capsys):
    call(train_tan.main, "--target", "sunglasses", "--method", "adaptor", "--iterations", 1, "--samples", 0, "--device",
         GPU, "--output-dir", tmp_path / "run")
    call(evaluate.main, tmp_path / "run", "-n", 8, "--steps", 2, "--device", GPU)
    assert "| " in capsys.readouterr().out
