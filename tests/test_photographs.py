"""experiments.photographs: every method on folders of pictures, scored without a judge."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import torchvision
from conftest import call, tiny_network
from PIL import Image

import evaluate
import metrics
import sample
import settings
from checkpoints.network import save_network
from checkpoints.perceptual import load_lpips, lpips_last_features
from domains import judge
from experiments import photographs
from plumbing.options import InputError, parse, replace


@pytest.fixture
def trained(runs_here, monkeypatch):
    """One iteration a run; the runs' folders, in order."""
    monkeypatch.setattr(settings, "SMALL", settings.SMALL | dict(iterations=1, batch_size=4))
    monkeypatch.setattr(photographs, "SHOWN", 6)  # more than there are training pictures
    return runs_here


def test_photographs(trained, tiny, backbone, tmp_path, capsys, monkeypatch):
    save_network(tmp_path / "source.safetensors", tiny_network(image_size=32))
    shutil.copytree(tiny.sources, tmp_path / "more" / "targets")
    flags = [tiny.targets, "--source", tmp_path / "source.safetensors", "--methods", "adaptor", "finetune", "--seeds", 1, "-n", 6,
             "--steps", 2, "--reference", tmp_path / "more" / "targets", "--lpips-backbone", backbone, "--output-dir", tmp_path / "out",
             "--device", "cpu"]
    call(photographs.main, *flags)
    text = (tmp_path / "out" / "photographs.md").read_text()
    assert text.strip() in capsys.readouterr().out and [folder.name for folder in map(lambda f: tmp_path / f, trained)] == ["adaptor-1", "finetune-1"]
    assert "6 samples of each run, DDIM in 2 steps" in text
    table = text[text.index("Intra-LPIPS"):]
    assert re.findall(r"^\| ([a-z ]+) \|", table, re.MULTILINE)[1:5] == ["source model", "adaptor", "finetune", "other pictures"]
    kid = text[text.index("KID (lower is better)"):text.index("KID, less that")]
    assert "| finetune |" in kid and "other pictures" not in kid  # of these to themselves it would mean nothing
    assert Image.open(tmp_path / "out" / "targets.png").height > 4 * 32

    # What evaluate.py says of the same samples as files.
    run = tmp_path / "out" / "targets" / "finetune-1"
    call(sample.main, run, "-n", 6, "--steps", 2, "--seed", judge.FIRST_SEED, "--device", "cpu")
    capsys.readouterr()
    call(evaluate.main, "--samples", run / "drawn", "--target", tiny.targets, "--size", 32, "--lpips-net", "squeeze",
         "--lpips-backbone", backbone, "--device", "cpu")
    expected = re.search(r"samples\): (\S+) ±.*median: (\S+)", capsys.readouterr().out, re.DOTALL).groups()
    found = [re.search(rf"{name} \(.*?finetune \| *\| (\S+) ", text, re.DOTALL)[1] for name in ("Intra-LPIPS", "nearest")]
    assert list(map(float, found)) == pytest.approx(list(map(float, expected)), abs=3e-3)
    assert "finetune | +" in text.split("less that of adaptors")[1] or "finetune | -" in text.split("less that of adaptors")[1]

    judge.source_samples.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(judge, "draw", lambda *a: pytest.fail("drawn again"))
        call(photographs.main, *flags)  # everything is there: nothing is drawn to be scored
    assert len(trained) == 2 and (tmp_path / "out" / "photographs.md").read_text() == text
    far = photographs.Target(str(tiny.targets), 32, parse(photographs.Options, "", [str(tiny.targets)] + ["--source", "x", "--output-dir", str(tmp_path)])[0],
                             load_lpips("squeeze", backbone))
    with pytest.raises(InputError, match="targets: 1 samples cannot be scored"):  # no cluster has two to compare
        far.score(torch.zeros(1, 3, 32, 32))

    changed = shutil.copytree(tiny.targets, tmp_path / "changed" / "targets")
    Image.new("RGB", (32, 32)).save(changed / "0.png")
    with pytest.raises(InputError, match="targets: the pictures have changed since the runs in .*; choose another --output-dir"):
        call(photographs.main, changed, *flags[1:])


def test_kid_is_a_thousandfold_and_lower_is_better(tiny, backbone, tmp_path):
    shutil.copytree(tiny.sources, tmp_path / "more" / "targets")
    options = parse(photographs.Options, "", [str(tiny.targets), "--source", "x", "--output-dir", str(tmp_path), "--reference", str(tmp_path / "more" / "targets")])[0]
    lpips = load_lpips("squeeze", backbone)
    target, samples = photographs.Target(str(tiny.targets), 32, options, lpips), torch.rand(8, 3, 32, 32) * 2 - 1
    features = [lpips_last_features(lpips, pictures) for pictures in (samples, target.others)]
    features = [of / features[1].square().mean().sqrt() for of in features]
    found = target.score(samples)
    assert found["KID"] == pytest.approx(1000 * metrics.kernel_distance(*features), rel=1e-4) != 0

    names = ("Intra-LPIPS", "KID", "nearest")
    rows = [dict(run=dict(method=method, target="targets", seed=1), score=dict.fromkeys(names, value)) for method, value in (("adaptor", 2.0), ("finetune", 1.0))]
    tables = photographs.tables(rows)
    assert [text.splitlines()[-1].split(" | ")[-1] for text in tables[1::2]] == ["0 of 1 |", "1 of 1 |", "0 of 1 |"]


def test_figures_are_kept_for_the_same_weights_and_pictures_alone(tmp_path):
    drawn, network = [], tiny_network()
    options = parse(photographs.Options, "", ["x", "--source", "y"])[0]

    def score(network, others="a", n=250):
        target = SimpleNamespace(digest_of_others=others, score=lambda samples: {"nearest": 0.1})
        photographs.scored(replace(options, n=n), target, network, tmp_path / "f.json", lambda: drawn.append(1))
        return len(drawn)

    assert [score(network), score(network)] == [1, 1]
    assert [score(network, "b"), score(network, "b", 7), score(tiny_network(1), "b", 7), score(tiny_network(1), "b", 7)] == [2, 3, 4, 4]


def test_a_name_of_the_hub_means_the_same_commit_in_every_run(trained, tiny, backbone, tmp_path, monkeypatch):
    source = tmp_path / "source.safetensors"
    save_network(source, tiny_network(image_size=32))
    monkeypatch.setattr(photographs, "pinned", lambda name: str(source))  # as owner/name@commit
    call(photographs.main, tiny.targets, "--source", "owner/name", "--methods", "adaptor", "--seeds", 1, "-n", 12, "--steps", 2,
         "--lpips-backbone", backbone, "--output-dir", tmp_path / "out", "--device", "cpu")
    assert json.loads((tmp_path / "out" / "targets" / "adaptor-1" / "options.json").read_text())["source"] == str(source)


def test_what_kid_compares_are_the_last_features_of_the_backbone(backbone):
    pictures = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    network = torchvision.models.squeezenet1_1().features.eval()
    network.load_state_dict({key.removeprefix("features."): value for key, value in torch.load(backbone, weights_only=True).items()})
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = network((pictures / 2 + 0.5 - mean) / std).mean((2, 3))
    found = lpips_last_features(load_lpips("squeeze", backbone), pictures, batch_size=2)
    torch.testing.assert_close(found, expected.detach(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("flags, says", [(["-n", 1], "-n 1: must be at least 2"), (["--seeds"], "give at least one folder"),
                                         (["--reference", "a/other"], "--reference a/other: give one folder of a target's name, targets"),
                                         (["--reference", "a/targets", "b/targets"], "--reference a/targets: give one folder"),
                                         (["--steps", 5000], "--steps 5000: this model has 1000")])
def test_what_is_refused(flags, says, tiny, tmp_path):
    with pytest.raises(InputError, match=says):
        call(photographs.main, tiny.targets, "--source", tiny.source, "--output-dir", tmp_path, *flags)


def test_a_folder_called_like_a_drawn_target(tiny, tmp_path, monkeypatch):
    """train_tan.py takes babies for the drawn ones: the pictures would be scored around others than those trained on."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny.targets, tmp_path / "babies")
    with pytest.raises(InputError, match="babies: is a built-in target, too; give ./babies"):
        call(photographs.main, "babies", "--source", tiny.source, "--output-dir", tmp_path / "out")
