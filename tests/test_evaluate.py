"""The judge's figures on pictures of which the truth is known, evaluate.py on folders, tables.py on a tiny budget."""

import dataclasses
import functools
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import domains
import evaluate
import judge
import launch
import metrics
import run_folder
import tables
import train_tan
from conftest import call
from options import InputError, parse


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
    assert "warning" not in out
    (tmp_path / "weights.safetensors").touch()  # as if the samples came from a run that has gone on since
    call(evaluate.main, "--samples", tmp_path / "samples", "--target", tmp_path / "targets", "--lpips-net", "squeeze", "--lpips-backbone", backbone,
         "--size", 32, "--device", "cpu")
    assert "samples has pictures older than" in capsys.readouterr().out


@pytest.mark.parametrize("flags, message", [
    ([], "what to score"),
    (["--samples", "x"], "--target: missing"),
    (["--samples", "x", "--target", "y", "--lpips-backbone", "none.pth"], "none.pth: no such file"),
    (["runs/none"], "runs/none: not the folder of a run"),
    (["runs/x", "--target", "y"], "what to score"),
    (["x", "-n", "1"], "-n 1"),
    (["x", "--size", "64"], "--size: is for folders of pictures"),
    (["--samples", "x", "--target", "y", "-n", "10"], "-n: is for runs; --samples are scored as they are"),
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

    def call_train(arguments, log):
        folders.append(arguments[arguments.index("--output-dir") + 1])
        call(train_tan.main, *arguments)
        return 0

    monkeypatch.setattr(launch, "call_train", call_train)
    for name in ("SMALL", "SMALL_FINETUNE"):
        monkeypatch.setattr(train_tan, name, getattr(train_tan, name) | dict(iterations=1, batch_size=4))
    monkeypatch.setattr(train_tan, "SMALL_GUIDED", dict(classifier_iterations=2, source_count=8, pgd_steps=1))
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
    stages = {method: [f["run"]["iterations"] for f in results["iterations"] if f["run"]["method"] == method] for method in ("finetune", "tan")}
    assert stages == {"finetune": [1, 2, 11], "tan": [1]}  # eleven iterations of the others cost one of tan
    options = json.loads((tmp_path / "sunglasses" / "tan-1-hundred" / "options.json").read_text())
    assert options["classifier_targets"].endswith("sunglasses-hundred") and len(list((tmp_path / "sunglasses-hundred").iterdir())) == 100
    for name in ("figure1-sunglasses.png", "iterations-sunglasses.png", "samples-sunglasses.png"):
        assert Image.open(tmp_path / name).width > 300
    once = len(trained)
    call(tables.main, *flags, "--parts", "tables")
    assert len(trained) == once  # everything was there, and the other parts are kept
    assert json.loads((tmp_path / "results.json").read_text()) == results and (tmp_path / "tables.md").read_text() == text
    call(tables.main, *flags, "--parts", "tables", "--methods", "finetune", "--seeds", 2, 2, 1)
    assert len(trained) == once + 1
    text, known = (tmp_path / "tables.md").read_text(), json.loads((tmp_path / "results.json").read_text())
    assert len(known["tables"]) == len(results["tables"]) + 1 and "| tan | 8.3% | " in text and " (2) |" in text  # added to the tables
    call(tables.main, *flags, "--parts", "tables", "--methods", "finetune", "-n", 13)
    assert "13 samples of each run" in (text := (tmp_path / "tables.md").read_text()) and "| tan |" not in text  # never mixed
    assert len(json.loads((tmp_path / "results.json").read_text())["tables"]) == len(known["tables"]) + 3


@pytest.mark.parametrize("flags, message", [
    (["--latent", "--targets", "haunted-houses"], "haunted-houses: has no latent source"), (["--steps", 1001], "--steps 1001: the model of toyfaces has 1000")])
def test_what_tables_refuses(flags, message, tmp_path):
    with pytest.raises(InputError, match=message):
        call(tables.main, *flags, "--output-dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mean_and_standard_deviation():
    assert tables.mean_std([0.5, 0.7]) == "0.600 ± 0.141 (2)" and tables.mean_std([0.25]) == "0.250"


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """What launch.train would call train_tan.py with to fill tmp_path, which writes the settings as it would."""
    found = []

    def call_train(arguments, log):
        log.touch()
        found.append(arguments[arguments.index("--output-dir") + 2:])
        options, given = parse(train_tan.Options, arguments)
        if options.resume:
            options = run_folder.resumed(tmp_path, options, given)
        else:
            options = dataclasses.replace(options, **{k: v for k, v in train_tan.suited(options, SimpleNamespace(image_size=32)).items() if k not in given})
        (tmp_path / "weights.safetensors").touch()
        (tmp_path / "options.json").write_text(json.dumps(dataclasses.asdict(options)))
        return 0

    monkeypatch.setattr(launch, "call_train", call_train)
    return found


def test_train_starts_resumes_and_leaves_alone(monkeypatch, commands, tmp_path):
    train = functools.partial(launch.train, tmp_path, "cpu", target="babies", source="toyfaces")
    train(seed=1)
    train(seed=1)
    train(seed=1, iterations=160)
    assert commands == [["--device", "cpu", "--target", "babies", "--source", "toyfaces", "--seed", "1", "--samples", "0", "--no-classifier-check"],
                        ["--device", "cpu", "--resume", "--iterations", "160"]]
    (tmp_path / "weights.safetensors").unlink()
    monkeypatch.setattr(launch, "call_train", lambda arguments, log: log.write_text("50%\nerror: no memory\n") and 1)
    with pytest.raises(InputError, match="train.log.: error: no memory; run the same command again"):
        train(seed=1, iterations=160)
    monkeypatch.setattr(launch, "call_train", lambda arguments, log: 2)
    with pytest.raises(InputError, match=r"train.log\)$"):  # nothing new in the log, and again the same would not help
        train(seed=1, iterations=160)


@pytest.mark.parametrize("flags, message", [
    (dict(seed=2), "--seed 1, wanted is 2"), (dict(seed=1, iterations=40), "--iterations 80, wanted is 40"),
    (dict(seed=1, method="finetune"), "--method tan, wanted is finetune"), (dict(seed=1, gamma=1.0), "--gamma 5.0, wanted is 1.0")])
def test_a_run_with_other_settings_is_not_taken(commands, tmp_path, flags, message):
    launch.train(tmp_path, "cpu", target="babies", source="toyfaces", seed=1)
    with pytest.raises(InputError, match=f"was trained with {message}; remove the folder"):
        launch.train(tmp_path, "cpu", target="babies", source="toyfaces", **flags)
    assert len(commands) == 1


def test_interrupted_training_is_waited_for(monkeypatch, tmp_path):
    """On Ctrl-C or SIGTERM the other program is told to stop, too, and left the time to save."""
    waits, told = [], []

    class Process:
        def __init__(self, *command, **where): pass

        def terminate(self):
            told.append(len(waits))

        def wait(self):
            waits.append(1)
            if len(waits) == 1:
                raise KeyboardInterrupt
            return 130

    monkeypatch.setattr(launch.subprocess, "Popen", Process)
    with pytest.raises(KeyboardInterrupt):
        launch.call_train([], tmp_path / "train.log")
    assert len(waits) == 2 and told == [1]


def test_results_of_other_settings_are_kept_but_not_tabulated(trained, tmp_path, monkeypatch):
    flags = ["--targets", "sunglasses", "--methods", "finetune", "--seeds", 1, "-n", 12, "--steps", 2, "--device", "cpu", "--parts", "tables"]
    call(tables.main, *flags, "--output-dir", tmp_path)
    shutil.rmtree(tmp_path / "sunglasses")
    monkeypatch.setitem(train_tan.SMALL_FINETUNE, "learning_rate", 1e-4)
    call(tables.main, *flags[:5], 2, *flags[6:], "--output-dir", tmp_path)
    runs = [f for f in json.loads((tmp_path / "results.json").read_text())["tables"] if "settings" in f]
    assert [f["settings"]["learning_rate"] for f in runs] == [3e-4, 1e-4] and " (2) |" not in (tmp_path / "tables.md").read_text()
