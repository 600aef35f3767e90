"""The judge's figures on pictures of which the truth is known, evaluate.py on folders, tables.py on a tiny budget."""

import functools
import json
from types import SimpleNamespace

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

TINY = "--iterations 2 --batch-size 4 --pgd-steps 1 --classifier-iterations 2 --source-count 8 --previews 1 --no-classifier-check".split()


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


def test_fewer_source_samples_than_samples():
    """Attributes kept are counted on the pairs that there are."""
    fresh, source = (data.to_tensor(domains.draw(domain, 40, seed=5)[0]) for domain in ("sunglasses", "toyfaces"))
    assert judge.score(fresh, source[:15], "sunglasses")["kept"] == judge.score(fresh[:15], source[:15], "sunglasses")["kept"] > 0.9


def test_eyes_cannot_be_seen_behind_sunglasses():
    assert "eyes" not in judge.reference("sunglasses", 32).visible and {"hair_colour", "skin", "pose"} <= set(judge.reference("sunglasses", 32).visible)


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
def trained(monkeypatch):
    """tables.py with train_tan.py called in this process, with few iterations and small batches; the calls' folders, in order."""
    folders = []

    def run(command, stdout, stderr):
        flags = command[2:] if "--resume" in command else TINY + command[2:]  # later flags win
        folders.append(command[command.index("--output-dir") + 1])
        call(train_tan.main, *flags)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(tables.subprocess, "run", run)
    monkeypatch.setattr(tables, "STAGES", (1, 2, 11))
    monkeypatch.setattr(tables, "SHOWN", 2)
    monkeypatch.setattr(judge, "FRESH", 60)
    judge.reference.cache_clear()
    yield folders
    judge.reference.cache_clear()


def test_tables(trained, tmp_path, capsys):
    flags = ["--targets", "sunglasses", "--methods", "finetune", "tan", "--seeds", 1, "-n", 12, "--steps", 2, "--output-dir", tmp_path, "--device", "cpu"]
    call(tables.main, *flags)
    text, results = (tmp_path / "tables.md").read_text(), json.loads((tmp_path / "results.json").read_text())
    assert text.strip() in capsys.readouterr().out
    assert "| finetune | 100.0% | " in text and "| paper, photographs: TAN | 1.3% | 20.06 |" in text and "| paper, photographs: LMD-TAN | 1.6% | 0.613 |" in text
    assert "| source model |" in text and "| fresh pictures |" in text and "12 samples of each run" in text and "Table 3" in text
    stages = {method: [f["run"]["iterations"] for f in results["iterations"]["runs"] if f["run"]["method"] == method] for method in ("finetune", "tan")}
    assert stages == {"finetune": [1, 2, 11], "tan": [1]}  # eleven iterations of the others cost one of tan
    options = json.loads((tmp_path / "sunglasses" / "tan-1-hundred" / "options.json").read_text())
    assert options["classifier_targets"].endswith("sunglasses-hundred") and len(list((tmp_path / "sunglasses-hundred").iterdir())) == 100
    for name in ("figure1.png", "iterations.png", "samples-sunglasses.png"):
        assert Image.open(tmp_path / name).width > 300
    once = len(trained)
    call(tables.main, *flags, "--parts", "tables")
    assert len(trained) == once  # everything was there, and the other parts are kept
    assert json.loads((tmp_path / "results.json").read_text()) == results and (tmp_path / "tables.md").read_text() == text


def test_latents_of_a_domain_without_latent_source(tmp_path):
    with pytest.raises(InputError, match="haunted-houses: has no latent source"):
        call(tables.main, "--latent", "--targets", "haunted-houses", "--output-dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mean_and_standard_deviation():
    assert tables.mean_std([0.5, 0.7]) == "0.600 ± 0.141" and tables.mean_std([0.25]) == "0.250"


def test_train_starts_resumes_and_leaves_alone(monkeypatch, tmp_path):
    commands = []

    def run(command, **options):
        commands.append(command[command.index("--output-dir"):])
        (tmp_path / "weights.safetensors").touch()
        iterations = int(command[command.index("--iterations") + 1]) if "--iterations" in command else 80
        (tmp_path / "options.json").write_text(json.dumps(dict(iterations=iterations)))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(tables.subprocess, "run", run)
    tables.train(tmp_path, "cpu", target="babies", seed=1)
    tables.train(tmp_path, "cpu", target="babies", seed=1)
    tables.train(tmp_path, "cpu", target="babies", seed=1, iterations=160)
    assert [c[4:] for c in commands] == [["--target", "babies", "--seed", "1", "--samples", "0"], ["--resume", "--iterations", "160"]]
    (tmp_path / "weights.safetensors").unlink()
    monkeypatch.setattr(tables.subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=1))
    with pytest.raises(InputError, match="train.log.*same command again"):
        tables.train(tmp_path, "cpu", target="babies", seed=1)
