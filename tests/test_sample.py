"""sample.py: picture i comes from seed + i alone, through the source or through what a run made of it."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, call
from PIL import Image

import sample
from plumbing import distributed
from plumbing.options import InputError
from plumbing.pictures import to_uint8

FAST = "--steps", "3", "--device", "cpu"


def draw(model, out, *flags):
    call(sample.main, model, "--output-dir", out, *FAST, *flags)
    return read(out)


def read(folder):
    return {p.name: np.array(Image.open(p)).astype(int) for p in sorted(folder.iterdir())}


def apart(a, b):
    assert a.keys() == b.keys()
    return max(abs(a[name] - b[name]).max() for name in a)


def test_files(finished, tiny, tmp_path, capsys):
    for model in (finished, tiny.source):
        pictures = draw(model, tmp_path / model.name, "-n", "3", "--seed", "5")
        assert list(pictures) == ["000005.png", "000006.png", "000007.png"]
        assert all(p.shape == (16, 16, 3) and p.std() > 1 for p in pictures.values())
        assert (tmp_path / f"{model.name}.png").exists()  # the grid
        assert f"3 pictures in {tmp_path / model.name}/" in capsys.readouterr().out


def test_where_they_go_by_default(tiny, train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = train(tmp_path / "run", "--method", "adaptor", "--iterations", "1")
    call(sample.main, run, "-n", "1", *FAST)
    call(sample.main, tiny.source, "-n", "1", *FAST)
    assert (run / "drawn" / "000000.png").exists() and (run / "drawn.png").exists()
    assert (tmp_path / "runs" / "source-samples" / "000000.png").exists()


def test_an_earlier_stage(train, tiny, tmp_path):
    run = train(tmp_path / "run", "--method", "adaptor", "--iterations", "2")
    call(sample.main, run, "--at", "0", "-n", "2", *FAST)
    call(sample.main, run, "--at", "2", "-n", "2", *FAST)
    assert (run / "drawn-000000.png").exists()
    assert apart(read(run / "drawn-000000"), draw(tiny.source, tmp_path / "source", "-n", "2")) == 0
    end = draw(run, tmp_path / "end", "-n", "2")
    assert apart(read(run / "drawn-000002"), end) == 0 < apart(read(run / "drawn-000000"), end)
    with pytest.raises(InputError, match="--at 1: no such stage; .* has 0, 2"):
        draw(run, tmp_path / "out", "--at", "1")
    with pytest.raises(InputError, match="--at 0: .*source.safetensors is not a run"):
        draw(tiny.source, tmp_path / "out", "--at", "0")
    assert not (tmp_path / "out").exists()


def test_a_picture_is_its_seed(finished, tmp_path):
    pictures = draw(finished, tmp_path / "a", "-n", "5", "--eta", "1")
    again = draw(finished, tmp_path / "b", "-n", "5", "--eta", "1", "--batch-size", 64)
    split = draw(finished, tmp_path / "c", "-n", "5", "--eta", "1", "--batch-size", 2)
    assert apart(pictures, again) == 0
    assert apart(pictures, split) <= 1  # rounding may tip a grey level
    fourth = draw(finished, tmp_path / "d", "-n", "1", "--eta", "1", "--seed", "3")
    assert apart(fourth, {"000003.png": pictures["000003.png"]}) <= 1
    assert abs(pictures["000003.png"] - pictures["000002.png"]).max() > 10


def test_processes_change_nothing(finished, tmp_path):
    alone = draw(finished, tmp_path / "alone", "-n", "3")
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = [finished, "-n", "3", "--output-dir", tmp_path / "spread", *FAST]
    subprocess.run([*torchrun, ROOT / "sample.py", *flags], check=True, env=env, cwd=tmp_path, timeout=600)
    assert apart(alone, read(tmp_path / "spread")) <= 1


def test_an_untrained_run_draws_the_source_and_a_trained_one_does_not(train, finished, tiny, tmp_path):
    untrained = train(tmp_path / "run", "--method", "adaptor", "--iterations", "0")
    source = draw(tiny.source, tmp_path / "source", "-n", "2")
    assert apart(draw(untrained, tmp_path / "untrained", "-n", "2"), source) == 0
    assert apart(draw(finished, tmp_path / "adapted", "-n", "2"), source) > 2


def test_eta(finished, tmp_path):
    ddim, *others = (draw(finished, tmp_path / eta, "-n", "1", "--eta", eta) for eta in ("0", "0.5", "1", "large"))
    assert all(apart(ddim, other) > 5 for other in others) and apart(*others[1:]) > 0


def test_guidance_uses_the_classifier_of_the_run(finished, tmp_path, monkeypatch):
    plain = draw(finished, tmp_path / "plain", "-n", "1")
    assert apart(draw(finished, tmp_path / "guided", "-n", "1", "--guidance", "100"), plain) > 0
    weak = draw(finished, tmp_path / "weak", "-n", "1", "--guidance", "1")
    assert apart(weak, plain) < apart(read(tmp_path / "guided"), plain)  # a hundredth of it
    seen = []
    monkeypatch.setattr(sample, "log_prob_gradient",
                        lambda model, x, t, label: seen.append(label) or torch.zeros_like(x))
    assert apart(draw(finished, tmp_path / "zero", "-n", "1", "--guidance", "100"), plain) == 0
    assert seen == [1, 1, 1]
    monkeypatch.setattr(sample, "log_prob_gradient", lambda model, x, t, label: torch.ones_like(x))  # brighter is likelier
    brighter = draw(finished, tmp_path / "brighter", "-n", "1", "--guidance", "1")
    assert all((brighter[name] - plain[name]).mean() > 1 for name in plain)


@pytest.mark.parametrize("flags, says", [
    (["-n", "0"], "-n 0: must be at least 1"),
    (["--eta", "2"], "--eta 2: give a number from 0 to 1, or 'large'"),
    (["--eta", "nan"], "--eta nan: give a number"),
    (["--guidance", "nan"], "--guidance nan: must be a number"),
    (["--arch", "ffhq_p2"], "--arch ffhq_p2: a run has the network it was trained with"),
    (["--eta", "ddpm"], "--eta ddpm: give a number"),
    (["--steps", "0"], "--steps 0: must be at least 1"),
    (["--steps", "1001"], "--steps 1001: this model has 1000"),
    (["--device", "tpu"], "--device tpu: not a device"),
    (["--guidance", "inf"], "--guidance inf: must be a number"),
    (["--batch-size", "0"], "--batch-size 0: must be at least 1"),
    (["--seed", "-5"], r"--seed -5: must be from 0 to 2\^63 - 1"),
    (["--seed", str(2 ** 63)], r"--seed 9223372036854775808: must be from 0 to 2\^63 - 1"),
])
def test_wrong_flags(flags, says, finished, tmp_path):
    with pytest.raises(InputError, match=says):
        draw(finished, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_models_that_do_not_do(train, tiny, tmp_path):
    run = train(tmp_path / "run", "--method", "adaptor", "--iterations", "1")
    for model in (run, tiny.source):
        says = "this run has no classifier; guidance needs a run with --method tan or guided"
        with pytest.raises(InputError, match=says):
            draw(model, tmp_path / "out", "-n", "1", "--guidance", "1")
    with pytest.raises(InputError, match="nosuch: no such file"):
        draw("nosuch", tmp_path / "out", "-n", "1")
    with pytest.raises(InputError, match="holds no network: no run"):
        draw(tiny.targets, tmp_path / "out", "-n", "1")


def test_pictures_drawn_before_an_interruption_are_kept(finished, tmp_path, monkeypatch):
    drawn = []

    def interrupted(image, uint8=to_uint8):
        drawn.append(len(image))
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return uint8(image)

    monkeypatch.setattr(sample, "to_uint8", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw(finished, tmp_path / "out", "-n", "4", "--batch-size", "2")
    assert drawn == [2, 2] and len(list((tmp_path / "out").iterdir())) == 2


def test_fewer_pictures_than_processes(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "share", lambda n: slice(0, 0))  # as rank 0 of 2 with -n 1
    (tmp_path / "out").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "out" / "000000.png")  # the other rank's
    draw(finished, tmp_path / "out", "-n", "1", "--overwrite")


def test_what_is_there_is_not_replaced_unasked(finished, tmp_path, capsys):
    words = [finished, "--output-dir", tmp_path / "out", "-n", 1, *FAST]
    for name in ("out/IMG_1.JPG", "out.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match="out.png: is there already; replace it with --overwrite, or choose another --output-dir"):
        call(sample.main, *words)
    assert (tmp_path / "out.png").read_text() == "mine" and len(list((tmp_path / "out").iterdir())) == 1
    call(sample.main, *words, "--overwrite")
    assert "holds 1 other pictures, which stay there" in capsys.readouterr().out
    assert Image.open(tmp_path / "out.png").width >= 16 and (tmp_path / "out" / "IMG_1.JPG").read_text() == "mine"
    with pytest.raises(InputError, match="000000.png: is there already"):
        call(sample.main, *words)


def test_a_run_in_bf16_is_drawn_in_bf16(train, tmp_path, monkeypatch):
    run = train(tmp_path / "run", "--method", "adaptor", "--iterations", "1", "--precision", "bf16")
    kinds = set()
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: kinds.add(output.dtype) if isinstance(module, torch.nn.Conv2d) else None)
    try:
        call(sample.main, run, "-n", 1, "--steps", 1, "--device", "cpu")
    finally:
        hook.remove()
    assert kinds == {torch.bfloat16}
