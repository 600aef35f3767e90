"""The judge's figures on pictures of which the truth is known, evaluate.py on folders, tables.py on a tiny budget."""

import functools
import json

import numpy as np
import pytest
import torch
from PIL import Image

import data
import domains
import evaluate
import judge
import metrics
import tables
import train_tan
from conftest import call
from options import InputError

TINY = dict(iterations=2, batch_size=4, pgd_steps=1, classifier_iterations=2, source_count=8, samples=0, previews=1)


@pytest.fixture(scope="module")
def scores():
    """judge.score of fresh sunglasses, of the source's own faces, and of slightly noised copies of the ten shots."""
    fresh, source = (data.to_tensor(domains.draw(domain, 200, seed=5)[0]) for domain in ("sunglasses", "toyfaces"))
    shots = data.to_tensor(domains.ten_shots("sunglasses")[0]).repeat(20, 1, 1, 1)
    copies = shots + 0.02 * torch.randn(shots.shape, generator=torch.Generator().manual_seed(0))
    return {name: judge.score(pictures, source, "sunglasses") for name, pictures in (("fresh", fresh), ("source", source), ("copies", copies))}


def test_score_of_known_pictures(scores):
    fresh, source, copies = scores["fresh"], scores["source"], scores["copies"]
    assert fresh["target"] > 0.97 and source["target"] < 0.03
    assert source["kept"] == 1 and fresh["kept"] > 0.95 and copies["kept"] < 0.4  # `fresh` shows the faces of `source`
    assert fresh["toy FID"] < 0.1 < source["toy FID"] and fresh["toy FID"] < 0.1 < copies["toy FID"]
    assert copies["toy Intra-LPIPS"] < 0.05 * fresh["toy Intra-LPIPS"]
    assert 0.8 < fresh["memorised"] < 1.2 and copies["memorised"] < 0.1
    assert fresh["covered"] == 1


def test_eyes_cannot_be_seen_behind_sunglasses():
    assert "eyes" not in judge.reference("sunglasses").visible and {"hair_colour", "skin", "pose"} <= set(judge.reference("sunglasses").visible)


def test_larger_pictures_are_reduced(scores):
    small, large = (data.to_tensor(domains.draw("sunglasses", 50, seed=5, size=size)[0]) for size in (32, 64))
    network = judge.load_judge("toyfaces")
    agree = [torch.equal(a, b) for a, b in zip(judge.attributes(network, small).values(), judge.attributes(network, large).values())]
    assert np.mean(agree) > 0.5
    assert (judge.fit(network, large) - small).abs().mean() < 0.05  # lines round to whole pixels


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A file with random weights in place of torchvision's squeezenet."""
    import lpips
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("lpips") / "squeezenet1_1-random.pth"
    net = lpips.pretrained_networks.squeezenet(pretrained=False)
    names = {name: name.split(".", 1)[1] for name in net.state_dict()}
    torch.save({f"features.{names[name]}": value for name, value in net.state_dict().items()}, path)
    return path


def test_folders(tmp_path, backbone, capsys):
    rng = np.random.default_rng(0)
    for folder, n in (("samples", 8), ("targets", 3)):
        (tmp_path / folder).mkdir()
        for i in range(n):
            Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(tmp_path / folder / f"{i}.png")
    call(evaluate.main, "--samples", tmp_path / "samples", "--target", tmp_path / "targets", "--lpips-net", "squeeze", "--lpips-backbone", backbone,
         "--size", 32, "--device", "cpu")
    embed = functools.partial(metrics.lpips_features, metrics.load_lpips("squeeze", backbone))
    expected = metrics.intra_lpips(embed, *(data.load_folder(tmp_path / f, 32) for f in ("samples", "targets")))
    out = capsys.readouterr().out
    assert f"(squeeze, 32x32, 8 samples): {expected.mean:.3f} ± {expected.std:.3f}" in out and " ".join(map(str, expected.sizes)) in out


@pytest.mark.parametrize("flags, message", [
    ([], "what to score"),
    (["--samples", "x"], "--target: missing"),
    (["--samples", "x", "--target", "y", "--lpips-backbone", "none.pth"], "none.pth: no such file"),
    (["runs/none"], "runs/none: not the folder of a run"),
    (["runs/x", "--target", "y"], "what to score"),
    (["x", "-n", "1"], "-n 1"),
])
def test_bad_input(flags, message):
    with pytest.raises(InputError, match=message):
        call(evaluate.main, *flags)


def test_runs_from_other_sources_are_refused(finished):
    with pytest.raises(InputError, match="the judge knows built-in sources"):
        call(evaluate.main, finished, "-n", 2)


@pytest.fixture
def tiny_train(monkeypatch):
    """tables.train, in this process and with few iterations; returns what was trained, in order."""
    trained = []

    def train(folder, device, **flags):
        wanted = flags.pop("iterations", TINY["iterations"])
        known = json.loads((folder / "options.json").read_text())["iterations"] if (folder / "options.json").exists() else None
        if known == wanted:
            return folder
        trained.append((str(folder), wanted))
        settings = dict(iterations=wanted) if known else {**flags, **TINY, "iterations": wanted}
        arguments = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", value)]
        call(train_tan.main, "--output-dir", folder, "--device", "cpu", *arguments, "--resume" if known else "--no-classifier-check")
        return folder

    monkeypatch.setattr(tables, "train", train)
    monkeypatch.setattr(tables, "STAGES", (1, 2, 11))
    monkeypatch.setattr(tables, "SHOWN", 2)
    monkeypatch.setattr(judge, "FRESH", 60)
    judge.reference.cache_clear()
    yield trained
    judge.reference.cache_clear()


def test_tables(tiny_train, tmp_path, capsys):
    flags = ["--targets", "sunglasses", "--methods", "finetune", "tan", "--seeds", 1, "-n", 12, "--steps", 2, "--output-dir", tmp_path, "--device", "cpu"]
    call(tables.main, *flags)
    text, results = (tmp_path / "tables.md").read_text(), json.loads((tmp_path / "results.json").read_text())
    assert text.strip() in capsys.readouterr().out
    assert "| finetune | 100.0% | " in text and "| paper, on photographs: TAN | 1.3% | 20.06 |" in text
    assert "Table 3" in text and {f["run"]["iterations"] for f in results["iterations"]} == {1, 2, 11}
    assert max(f["passes"] for f in results["iterations"] if f["run"]["method"] == "tan") == 11
    for name in ("figure1.png", "iterations.png", "samples-sunglasses.png"):
        assert Image.open(tmp_path / name).width > 300
    once = len(tiny_train)
    call(tables.main, *flags)
    assert len(tiny_train) == once  # everything was there
    assert json.loads((tmp_path / "results.json").read_text()) == results


def test_mean_and_standard_deviation():
    assert tables.mean_std([0.5, 0.7]) == "0.600 ± 0.141" and tables.mean_std([0.25]) == "0.250"


def test_train_starts_resumes_and_leaves_alone(monkeypatch, tmp_path):
    commands = []

    def run(command, **options):
        commands.append(command[command.index("--output-dir"):])
        if "--fail" not in command:
            (tmp_path / "weights.safetensors").touch()
            iterations = int(command[command.index("--iterations") + 1]) if "--iterations" in command else 80
            (tmp_path / "options.json").write_text(json.dumps(dict(iterations=iterations)))
        return type("Done", (), dict(returncode=int("--fail" in command)))

    monkeypatch.setattr(tables.subprocess, "run", run)
    tables.train(tmp_path, "cpu", target="babies", seed=1)
    tables.train(tmp_path, "cpu", target="babies", seed=1)
    tables.train(tmp_path, "cpu", target="babies", seed=1, iterations=160)
    assert [c[4:] for c in commands] == [["--target", "babies", "--seed", "1"], ["--resume", "--iterations", "160"]]
    (tmp_path / "weights.safetensors").unlink()
    monkeypatch.setattr(tables.subprocess, "run", lambda *a, **k: type("Done", (), dict(returncode=1)))
    with pytest.raises(InputError, match="train.log.*same command again"):
        tables.train(tmp_path, "cpu", target="babies", seed=1)
