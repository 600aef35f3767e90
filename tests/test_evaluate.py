"""evaluate.py on folders of pictures, and what it refuses."""

import functools
import json
import math
import os
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import call, tiny_network
from PIL import Image

import domains
import evaluate
import sample
from checkpoints import perceptual, run_report
from checkpoints.network import save_network
from checkpoints.perceptual import load_lpips, lpips_features
from domains import judge
from experiments import parts, tables
from metrics import IntraLPIPS, intra_lpips
from plumbing import distributed
from plumbing.memory import device_memory
from plumbing.options import InputError
from plumbing.picture_folder import load_folder
from plumbing.pictures import to_tensor


@pytest.fixture
def folders(tmp_path, backbone):
    """The flags that score 8 samples around 3 targets in `tmp_path`."""
    rng = np.random.default_rng(0)
    for folder, n in (("samples", 8), ("targets", 3)):
        (tmp_path / folder).mkdir()
        for i in range(n):
            pixels = rng.integers(0, 255, (40, 40, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{i}.png")
    return ["--samples", tmp_path / "samples", "--target", tmp_path / "targets", "--lpips-net", "squeeze",
            "--lpips-backbone", backbone, "--size", 32, "--device", "cpu"]


def test_folders(folders, tmp_path, backbone, capsys):
    call(evaluate.main, *folders)
    embed = functools.partial(lpips_features, load_lpips("squeeze", backbone))
    expected = intra_lpips(embed, *(load_folder(tmp_path / name, 32) for name in ("samples", "targets")))
    out = capsys.readouterr().out
    assert f"(squeeze, 32x32, 8 samples): {expected.mean:.3f} ± {expected.std:.3f}" in out
    assert f"sizes {' '.join(map(str, expected.sizes))}\n" in out and "warning" not in out
    (tmp_path / "weights.safetensors").touch()  # as if the samples came from a run that has gone on since
    call(evaluate.main, *folders)
    assert "samples has pictures older than" in capsys.readouterr().out


def test_of_many_clusters_the_sizes_are_not_listed(folders, tmp_path, capsys):
    for i in range(3, 21):
        Image.new("RGB", (40, 40), (i, 0, 0)).save(tmp_path / "targets" / f"{i}.png")
    call(evaluate.main, *folders)
    assert re.search("dropped; largest size [2-8]\n", capsys.readouterr().out)


SAMPLES, TARGET = ["--samples", "docs/images"], ["--target", "docs/images"]


@pytest.mark.parametrize("flags, message", [
    ([], "what to score"),
    (["--samples", "x"], "--target: missing"),
    ([*SAMPLES, "--target", "no-such"], "no-such: no such folder"),  # before any weights are looked for
    ([*SAMPLES, *TARGET, "--reference", "no-such"], "no-such: no such folder"),
    ([*SAMPLES, *TARGET, "--lpips-backbone", "none.pth"], "none.pth: no such file"),
    ([*SAMPLES, *TARGET, "--size", "16"], "--size 16: must be at least 32"),
    (["--at", "all"], "what to score"),
    ([*SAMPLES, *TARGET, "--at", "all"], "--at: is for runs"),
    (["runs/none", "--at", "all", *SAMPLES], "what to score"),
    (["--at", "all", *TARGET], "what to score"),
    (["runs/none", "--at", "all", *TARGET], "runs/none: not the folder of a run"),
    (["runs/none", "--at", "all"], "runs/none: not the folder of a run"),
    ([*SAMPLES, *TARGET, "--cluster-size", "1"], "--cluster-size 1: must be at least 2"),
    ([*SAMPLES, *TARGET, "--seed", "-1"], "--seed -1: must be from 0"),
    ([*SAMPLES, *TARGET, "--seed", str(2 ** 64)], "--seed 18446744073709551616: must be from 0"),
    (["runs/none"], "runs/none: not the folder of a run"),
    (["runs/x", "--target", "y"], "what to score"),
    (["x", "-n", "1"], "-n 1"),
    (["x", "--steps", "0"], "--steps 0: must be at least 1"),
    (["x", "--size", "64"], "--size: is for folders of pictures \\(--samples DIR\\), and for stages"),
    (["x", "--seed", "0"], "--seed: is for folders of pictures"),
    (["x", "--source", "y"], "--source: is for stages \\(--at\\) of a run whose source has moved"),
    (["--samples", "x", "--target", "y", "-n", "10"], "-n: is for runs; --samples are scored as they are"),
    (["--samples", "x", "--target", "y", "--steps=10"], "--steps: is for runs"),
])
def test_bad_input(flags, message):
    with pytest.raises(InputError, match=message):
        call(evaluate.main, *flags)


def test_too_few_pictures(folders, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "samples" / "0.png").rename(tmp_path / "one" / "0.png")
    with pytest.raises(InputError, match="one: has one picture; FID and KID need at least two"):
        call(evaluate.main, *folders, "--reference", tmp_path / "one")
    with pytest.raises(InputError, match="^--samples .*one: Intra-LPIPS of 1 samples: .*give more samples"):
        call(evaluate.main, *folders, "--samples", tmp_path / "one")


def test_the_protocol_of_clusters_of_a_size(folders, tmp_path, backbone, capsys):
    embed = functools.partial(lpips_features, load_lpips("squeeze", backbone))
    expected = intra_lpips(embed, *(load_folder(tmp_path / name, 32) for name in ("samples", "targets")), cluster_size=2, seed=5)
    call(evaluate.main, *folders, "--cluster-size", 2, "--seed", 5)
    assert f"8 samples): {expected.mean:.3f} ± {expected.std:.3f}" in capsys.readouterr().out


@pytest.mark.parametrize("few", [9, 8])
def test_fid_of_few_pictures_is_warned_of(few, folders, tmp_path, capsys, monkeypatch):
    found = IntraLPIPS([0.1, 0.1, None], [4, 4, 0], [0] * 8)
    monkeypatch.setattr(evaluate, "comparison", lambda *a: lambda samples: (found, dict(nearest=0.1, FID=3.0, KID=0.1)))
    monkeypatch.setattr(evaluate, "FEW", few)
    shutil.copytree(tmp_path / "samples", tmp_path / "reference")
    call(evaluate.main, *folders, "--reference", tmp_path / "reference")
    said = capsys.readouterr().out
    assert ("warning: FID on fewer than 9" in said) == (few == 9) and "FID 3.00, KID 0.10000" in said


def test_pictures_are_averaged_when_they_shrink():
    """Of four columns that sum to 0 a plain bilinear reading would take the middle two."""
    stripes = torch.tensor([1.0, -1, -1, 1]).repeat(16).expand(1, 3, 64, 64)
    assert evaluate.at_size(stripes, 16)[..., 2:-2].abs().max() < 0.3 and evaluate.at_size(stripes, 64) is stripes


def test_nearest_is_a_median(backbone, monkeypatch):
    monkeypatch.setattr(perceptual, "nearest", lambda *a, **how: [0.1, 0.2, 0.9])
    pictures = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    figures = perceptual.scorer(load_lpips("squeeze", backbone), pictures[:1], 32)(pictures)[1]
    assert figures["nearest"] == 0.2


def test_training_pictures_that_do_not_fit_in_memory(folders, tmp_path, backbone, monkeypatch):
    """Two rows of features of each of the 3 targets: one byte less than they take is refused."""
    row = lpips_features(load_lpips("squeeze", backbone), torch.zeros(1, 3, 32, 32)).nbytes
    monkeypatch.setattr(perceptual, "device_memory", lambda device: 6 * row)
    call(evaluate.main, *folders)
    monkeypatch.setattr(perceptual, "device_memory", lambda device: 6 * row - 1)
    with pytest.raises(InputError, match="^3 training pictures at --size 32 need .* GiB"):
        call(evaluate.main, *folders)


def test_memory_of_this_machine(monkeypatch):
    cpu = torch.device("cpu")
    assert 2 ** 28 < device_memory(cpu) < 2 ** 50
    monkeypatch.setattr(os, "sysconf", lambda name: -1)  # a system that does not know
    assert device_memory(cpu) == math.inf
    monkeypatch.delattr(os, "sysconf")  # Windows
    assert device_memory(cpu) == math.inf


@pytest.mark.parametrize("what", ["runs", "folders"])
def test_several_processes_are_refused(what, folders, monkeypatch):
    """Each would score everything, and all would write the same score.json."""
    monkeypatch.setattr(distributed, "world", lambda: 2)
    with pytest.raises(InputError, match="one process; start it without torchrun"):
        call(evaluate.main, *(["runs/none"] if what == "runs" else folders))


def test_runs_from_other_sources_are_refused(finished):
    with pytest.raises(InputError, match="the judge knows drawn sources"):
        call(evaluate.main, finished, "-n", 2)


def test_a_target_that_the_judge_has_not_seen(monkeypatch, tmp_path):
    judge.need_seen("babies")
    monkeypatch.setitem(domains.TARGETS, "hats", "toyfaces")
    (tmp_path / "options.json").write_text(json.dumps(dict(source="toyfaces-latent", target="hats", method="adaptor")))
    with pytest.raises(InputError, match="to hats; the judge knows drawn sources, and their targets that it has learnt. Any run's stages"):
        call(evaluate.main, tmp_path)
    with pytest.raises(InputError, match="hats: the judge has not seen it"):
        tables.check(parts.Options(targets=("hats",)))
    assert not judge.knows(dict(source="toyfaces", target="hats"))  # so its stages are scored like those of any folder
    assert judge.knows(dict(source="toyfaces-latent", target="babies"))


def test_a_run_is_scored_once(train, few_fresh, tmp_path, monkeypatch, capsys):
    run = train(tmp_path / "run", "--source", "toyfaces", "--target", "sunglasses", "--method", "adaptor", "--iterations", 1)
    call(evaluate.main, run, "-n", 12, "--steps", 2, "--device", "cpu")
    first = capsys.readouterr().out
    assert f"| {run} | " in first and "(12 pairs)" in first
    monkeypatch.setattr(evaluate.judge, "score", None)  # what is in score.json is not measured again
    call(evaluate.main, run, "-n", 12, "--steps", 2, "--device", "cpu")
    assert capsys.readouterr().out.endswith(first[first.index("| run |"):])
    with pytest.raises(TypeError):
        call(evaluate.main, run, "-n", 13, "--steps", 2, "--device", "cpu")
    with pytest.raises(InputError, match="--steps 1001: this model has 1000"):
        call(evaluate.main, run, "-n", 12, "--steps", 1001)
    (run / "score.json").write_text("{")
    with pytest.raises(InputError, match="score.json: damaged .*; remove it to have it made anew"):
        call(evaluate.main, run, "-n", 12, "--steps", 2, "--device", "cpu")


# ---- stages ------------------------------------------------------------------------------------------------

def test_the_stages_of_a_built_in_run(train, few_fresh, tmp_path, monkeypatch, capsys):
    """Two stages by the judge, the first of which the held-out loss finds best."""
    monkeypatch.setattr(run_report.Report, "loss", lambda self, pictures: len(pictures) + self.ema.updates / 10)
    built_in = ["--source", "toyfaces", "--target", "sunglasses", "--method", "adaptor", "--hold-out", 4]
    run = train(tmp_path / "run", *built_in, "--iterations", 1, "--learning-rate", 0.1)
    how, score, seen = [run, "-n", 12, "--steps", 2, "--device", "cpu"], judge.score, []
    monkeypatch.setattr(judge, "score", lambda *a: seen.append(a[2:]) or score(*a))
    call(evaluate.main, *how)
    capsys.readouterr()
    of_run = (run / "score.json").read_bytes()
    call(evaluate.main, *how, "--at", "all")
    out, found = capsys.readouterr().out, json.loads((run / "stages.json").read_text())
    start, end = found["stages"]
    assert found["best"] == 0 and (start["iterations"], end["iterations"]) == (0, 1)
    assert [end["held-out loss"], end["training loss"]] == pytest.approx([4.1, 6.1])
    assert f"| 0 (held-out loss lowest) | {start['toy FID']:.4g} | " in out and f"| 1 | {end['toy FID']:.4g} | " in out
    final = json.loads(of_run)["score"]  # the last stage is the run
    assert all(end[name] == pytest.approx(final[name]) != start[name] for name in ("toy FID", "toy Intra-LPIPS", "memorised"))
    assert (run / "score.json").read_bytes() == of_run
    assert Image.open(run / "stages.png").width > 1000
    assert seen == 3 * [("sunglasses", 4)]
    monkeypatch.setattr(judge, "score", None)  # what was measured is not measured again
    call(evaluate.main, *how, "--at", 0)
    only = capsys.readouterr().out
    assert "| 0 (held-out loss lowest) | " in only and "\n| 1 " not in only and json.loads((run / "stages.json").read_text()) == found
    with pytest.raises(InputError, match="--at 7: no such stage; .* has 0, 1"):
        call(evaluate.main, *how, "--at", 7)
    with pytest.raises(InputError, match="--at last: give all, or the iterations of a stage"):
        call(evaluate.main, *how, "--at", "last")
    with pytest.raises(InputError, match="--lpips-net: is for folders of pictures"):
        call(evaluate.main, *how, "--at", "all", "--lpips-net", "alex")


def test_what_was_held_out_is_no_training_picture(few_fresh):
    shots = to_tensor(domains.ten_shots("sunglasses")[0])
    scores = [judge.score(shots[8:].repeat(3, 1, 1, 1), shots[8:], "sunglasses", hold_out)["memorised"] for hold_out in (0, 2)]
    assert scores[0] < 1e-6 and scores[1] > 0.3


def test_the_stages_of_a_run_on_photos(train, tiny, backbone, tmp_path, capsys, monkeypatch):
    """They get the figures of a folder of the same samples, around the pictures that were trained on."""
    save_network(tmp_path / "source.safetensors", tiny_network(image_size=32))
    run = train(tmp_path / "run", "--method", "adaptor", "--source", tmp_path / "source.safetensors", "--iterations", 2, "--hold-out", 1)
    lpips = ["--lpips-net", "squeeze", "--lpips-backbone", backbone, "--device", "cpu"]
    monkeypatch.setattr(evaluate, "load_inception", lambda *a: torch.nn.Identity())
    monkeypatch.setattr(evaluate, "inception_features", lambda model, images, progress: torch.stack(list(images)).mean((2, 3)))
    comparison, around = evaluate.comparison, []
    monkeypatch.setattr(evaluate, "comparison", lambda options, targets, *a: around.append(targets) or comparison(options, targets, *a))
    call(evaluate.main, run, "--at", "all", "-n", 6, "--steps", 2, *lpips, "--reference", tiny.sources)
    assert torch.equal(*around, load_folder(tiny.targets, 32)[:4])
    stages = json.loads((run / "stages.json").read_text())["stages"]
    assert [stage["iterations"] for stage in stages] == [0, 2] and stages[0]["Intra-LPIPS"] != stages[1]["Intra-LPIPS"]
    assert all({"FID", "KID", "held-out loss"} <= stage.keys() for stage in stages)
    options = json.loads((run / "options.json").read_text())
    assert "warning" not in (said := capsys.readouterr().out) and "nearest: distance" in said and "memorised" not in said
    shutil.copytree(tiny.targets, tmp_path / "others")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "others" / "0.png")
    (run / "options.json").write_text(json.dumps(dict(options, target=str(tmp_path / "others"))))
    call(evaluate.main, run, "--at", 2, "-n", 6, "--steps", 2, *lpips)
    around.pop()
    assert "others: the pictures have changed since the run in" in capsys.readouterr().out
    (run / "options.json").write_text(json.dumps(dict(options, target="moved")))
    with pytest.raises(InputError, match="moved: the pictures of the run in .* are not there any more; give them with --target"):
        call(evaluate.main, run, "--at", 2, "-n", 6, "--steps", 2, *lpips)
    call(evaluate.main, run, "--at", "2", "-n", 6, "--steps", 2, *lpips, "--target", tiny.targets)
    assert torch.equal(*around)
    shutil.copytree(tiny.targets, tmp_path / "four")
    (tmp_path / "four" / "4.png").unlink()
    call(sample.main, run, "--at", 2, "-n", 6, "--steps", 2, "--seed", judge.FIRST_SEED, "--device", "cpu")
    capsys.readouterr()
    call(evaluate.main, "--samples", run / "drawn-000002", "--target", tmp_path / "four", "--size", 32, *lpips)
    intra, nearest = re.search(r"samples\): (\S+) ±.*median: (\S+)", capsys.readouterr().out, re.DOTALL).groups()
    assert [stages[1]["Intra-LPIPS"], stages[1]["nearest"]] == pytest.approx([float(intra), float(nearest)], abs=2e-3)
