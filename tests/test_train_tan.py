"""train_tan.py: the loss of Eq. 6, the four methods, and that a run comes out the same however it is split, stopped or spread."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, call, tiny_network
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

import classifier
import ddpm
import domains
import pretrain
import settings
import train_tan
import unet
from baselines import gan_transfer
from checkpoints import network, run_folder, run_report
from checkpoints.load import load_network, load_source
from checkpoints.network import save_network
from classifier import guided_loss
from plumbing.files import load_checkpoint
from plumbing.memory import fitting
from plumbing.options import InputError
from plumbing.picture_folder import load_folder
from plumbing.pictures import read_array
from plumbing.seeds import generator
from plumbing.training import EMA
from settings import METHODS


def weights(run):
    return (run / "weights.safetensors").read_bytes()


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    return [(line["iteration"], line["loss"], line["gradient_norm"]) for line in metrics(run)]


def resume(run, *flags):
    call(train_tan.main, "--output-dir", run, "--resume", *flags)


def python(*argv, cwd):
    """Another process with this project importable, and threads as here: their number changes the last bits."""
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS=str(torch.get_num_threads()))
    return subprocess.run([sys.executable, *map(str, argv)], cwd=cwd, env=env, capture_output=True, text=True, timeout=600)


# ---- the methods -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", METHODS)
def test_method(method, tiny, train, tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(train_tan, "load_diffusion_model", lambda *a: used.append(load_source(*a)) or used[-1])
    run = train(tmp_path / "run", "--method", method, "--iterations", "3", "--samples", "2")

    uses = METHODS[method]
    files = {"targets.png", "samples.png", "progress.png", "loss.png", "metrics.jsonl", "options.json", "weights.safetensors"}
    assert files <= {p.name for p in run.iterdir()} and (run / "classifier.safetensors").exists() == uses.guidance

    before, after = load_file(tiny.source), used[0].model.state_dict()
    assert [k for k in before if not before[k].equal(after[k])] == ([] if uses.adaptors else list(before))
    trained = load_file(run / "weights.safetensors")
    assert trained.keys() == ({k for k in after if ".adaptor." in k} if uses.adaptors else before.keys())

    lines = metrics(run)
    fields = {"iteration", "loss", "loss_by_quarter", "gradient_norm", "images_per_second"}
    assert [line["iteration"] for line in lines] == [0, 1, 2]
    for line in lines:
        assert fields <= line.keys() and ("guidance_rms" in line) == uses.guidance
        assert ("pgd_gain" in line) == uses.adversarial_noise
        assert len(line["loss_by_quarter"]) == 4 and line["loss"] > 0 and line["gradient_norm"] > 0


def test_before_training_the_run_is_the_source(tiny, train, tmp_path):
    run = train(tmp_path / "run", "--method", "adaptor", "--iterations", "0", "--adaptor-width", "8")
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 800])
    network, options = run_folder.load_run(run)
    output = load_network(tiny.source).model(x, t)
    assert options["adaptor_width"] == 8 and output.std() > 0.1 and network.model(x, t).equal(output)


def test_the_weights_are_the_running_average(train, tmp_path):
    run = train(tmp_path / "run", "--method", "adaptor", "--iterations", "2")
    state = load_checkpoint(run / "checkpoint.pt")
    saved = load_file(run / "weights.safetensors")
    adapted = run_folder.load_run(run)[0].model
    names = [k for k, _ in adapted.named_parameters() if ".adaptor." in k]
    assert len(names) == len(state["parameters"]) and all(saved[k].equal(a) for k, a in zip(names, state["ema"]["average"]))
    assert not all(a.equal(p) for a, p in zip(state["ema"]["average"], state["parameters"]))


def test_every_iteration_draws_its_own_batch(train, tmp_path, monkeypatch):
    drawn = []
    def record(model, schedule, x0, t, eps, *rest, **how):
        drawn.append((x0, t, eps))
        return eps, []
    monkeypatch.setattr(train_tan, "worst_case_noise", record)
    train(tmp_path / "run", "--iterations", "3")
    for a, b in zip(drawn, drawn[1:]):
        assert not any(torch.equal(x, y) for x, y in zip(a, b))


def test_the_numbers_reach_the_average_and_the_pictures(train, tmp_path, monkeypatch):
    seen, drawn, draw = [], set(), network.Network.sample
    monkeypatch.setattr(train_tan, "EMA", lambda psi, decay: seen.append(decay) or EMA(psi, decay))
    monkeypatch.setattr(network.Network, "sample", lambda self, seeds, steps, **options:
                        drawn.add(steps) or draw(self, seeds, steps, **options))
    train(tmp_path / "run", "--method", "adaptor", "--iterations", "1", "--ema", "0.7", "--samples", "2", "--sample-steps", "3")
    assert seen == [0.7] and drawn == {3}


# ---- the same run, however it is stopped, split or spread ------------------------------------------------------------

# train_tan.py that sends itself a signal right after it has written so many lines of metrics
KILLED = """
import os, sys, train_tan
from plumbing.training import Loop
signal, lines = map(int, sys.argv[1:3])
del sys.argv[1:3]
record = Loop.record
def record_and_kill(self, **line):
    record(self, **line)
    if self.iteration + 1 == lines:
        os.kill(os.getpid(), signal)
Loop.record = record_and_kill
train_tan.main()
"""


@pytest.mark.parametrize("number, lines, save_every, start", [
    (signal.SIGTERM, 2, 25, 2),
    (signal.SIGKILL, 3, 1, 2),   # the third line is past the checkpoint
    (signal.SIGKILL, 4, 2, 2),   # so are the third and fourth
    (signal.SIGKILL, 2, 25, 0),  # before any checkpoint
])
def test_stopped_and_resumed_is_the_same_run(number, lines, save_every, start, tiny, finished, tmp_path, capsys):
    run = tmp_path / "run"
    stopped = python("-c", KILLED, int(number), lines, *tiny.flags(), "--output-dir", run, "--save-every", save_every, cwd=tmp_path)
    assert stopped.returncode == (130 if number == signal.SIGTERM else -signal.SIGKILL), stopped.stderr
    assert len(metrics(run)) == lines and not (run / "weights.safetensors").exists()
    assert ("stopped and saved after 2 iterations" in stopped.stdout) == (number == signal.SIGTERM)
    resume(run)
    assert ("resuming at iteration" in capsys.readouterr().out) == (start > 0)
    assert losses(run) == losses(finished) and [line["iteration"] for line in metrics(run)] == list(range(6))
    assert weights(run) == weights(finished)


def interrupted(train, run, monkeypatch, at, *flags):
    """A run whose disk fails while it writes its `at`-th checkpoint."""
    saves = []
    def fail(state, path):
        saves.append(path)
        if len(saves) < at:
            return torch_save(state, path)
        path.write_bytes(b"half a file")
        raise OSError("disk full")
    torch_save = torch.save
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(torch, "save", fail)
        train(run, *flags)


@pytest.mark.parametrize("method", ["pa", "guided"])
def test_killed_while_saving(method, train, tmp_path, monkeypatch):
    whole, run = train(tmp_path / "whole", "--method", method, "--iterations", "3"), tmp_path / "run"
    interrupted(train, run, monkeypatch, 3, "--method", method, "--iterations", "3", "--save-every", "1")
    assert load_checkpoint(run / "checkpoint.pt")["iteration"] == 2
    resume(run)
    assert losses(run) == losses(whole) and weights(run) == weights(whole)


def test_more_iterations_later(train, finished, tmp_path):
    run = train(tmp_path / "run", "--iterations", "2")
    resume(run, "--iterations", "6")
    assert weights(run) == weights(finished)
    assert json.loads((run / "options.json").read_text())["iterations"] == 6


@pytest.mark.parametrize("flags, noted", [(["--learning-rate-decay", "cosine"], True), (["--guidance-fade", "0.5"], True), ([], False)])
def test_more_iterations_of_a_run_that_fades(flags, noted, train, tmp_path, capsys):
    """What falls with the run's length is from now on that of the longer run, and this is said."""
    run = train(tmp_path / "run", "--iterations", "2", *flags)
    resume(run, "--iterations", "2")
    assert "falls over" not in capsys.readouterr().out
    with pytest.raises(InputError, match="has done 2 already"):
        resume(run, "--iterations", "1")
    assert "falls over" not in capsys.readouterr().out
    resume(run, "--iterations", "3")
    said = capsys.readouterr().out
    assert ("falls over 3 iterations from now on, not over 2" in said) == noted and ("--guidance-fade" in said) == ("--guidance-fade" in flags)


@pytest.mark.parametrize("name, says", [("target", "gone: the pictures of the run"), ("source", "gone: the source of the run")])
def test_what_a_run_was_made_of_has_moved(name, says, train, tiny, tmp_path):
    run = train(tmp_path / "run", "--method", "adaptor", "--iterations", 1)
    options = json.loads((run / "options.json").read_text())
    (run / "options.json").write_text(json.dumps(options | {name: "gone"}))
    with pytest.raises(InputError, match=f"{says} in .* not there any more; give .* with --{name}"):
        resume(run, "--iterations", 2)
    resume(run, "--iterations", 2, f"--{name}", options[name])
    assert len(metrics(run)) == 2


def test_a_seed_is_a_run(train, finished, tmp_path):
    assert weights(train(tmp_path / "same")) == weights(finished)
    other = train(tmp_path / "other", "--seed", "1")
    assert weights(other) != weights(finished) and losses(other)[0] != losses(finished)[0]


def assert_same_run(run, other):
    """Equal but for rounding.  Adam divides by the size of the gradient, which lays bare the rounding of the tiniest ones: hence
    losses and gradients closely, weights to a fraction of the way they went, 2e-3 an iteration."""
    for a, b in zip(losses(run), losses(other), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    a, b = load_file(run / "weights.safetensors"), load_file(other / "weights.safetensors")
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=5e-4, msg=lambda m: f"{key}: {m}")


@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches(size, train, finished, tmp_path):
    assert_same_run(train(tmp_path / "run", "--micro-batch-size", size), finished)


def test_two_processes(tiny, train, tmp_path):
    flags = *tiny.flags(), "--iterations", "3", "--batch-size", "5"
    run, alone = tmp_path / "two", train(tmp_path / "alone", *flags)
    spread = python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train_tan.py", *flags, "--output-dir", run,
                    cwd=tmp_path)
    assert spread.returncode == 0, spread.stderr
    assert "2 process(es)" in spread.stdout and spread.stdout.count("done:") == 1
    ours, theirs = (load_file(folder / "classifier.safetensors") for folder in (run, alone))
    for key, value in ours.items():  # its steps are shared, too: equal but for rounding
        torch.testing.assert_close(value, theirs[key], rtol=0, atol=2e-5)
    assert_same_run(run, alone)


SENT = """
import os, torch.distributed as dist, train_tan
sent, all_reduce = [], dist.all_reduce

def counted(values):
    sent.append(values.nbytes)
    return all_reduce(values)
dist.all_reduce = counted
train_tan.main()
open(f"sent-{os.environ['RANK']}.txt", "w").write(" ".join(map(str, sent)))
"""


def test_what_a_rank_sends(tiny, tmp_path):
    """An iteration: the gradients of psi in one message, the figures of the log (6 x 4 numbers), and whether to stop."""
    (tmp_path / "counted.py").write_text(SENT)
    flags = [*tiny.flags("adaptor"), "--method", "adaptor", "--iterations", "3", "--output-dir", tmp_path / "run"]
    spread = python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tmp_path / "counted.py", *flags,
                    cwd=tmp_path)
    assert spread.returncode == 0, spread.stderr
    psi = sum(p.numel() for p in load_file(tmp_path / "run" / "weights.safetensors").values())
    for rank in range(2):  # a file each: lines that two processes print into one pipe can mix
        assert (tmp_path / f"sent-{rank}.txt").read_text().split() == [str(n) for n in (4 * psi, 4 * 24, 4)] * 3


# ---- what the loop feeds the loss ------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags", [(), ("--guidance-power", "1"), ("--guidance-below", "500"), ("--pgd-network", "source"),
                                   ("--norm", "paper"), ("--guidance-limit", "1e-4")])
def test_an_iteration_is_algorithm_1(flags, train, finished, tmp_path, monkeypatch):
    """Lines 2-8 from what the parts of the loop were called with: eps^* noises the same x_0 at the same t, and Eq. 6 corrects it."""
    calls = {name: [] for name in ("worst_case_noise", "log_prob_gradient", "guided_loss")}
    def spy(name, home):
        original = getattr(home, name)

        def called(*a, own=None):
            result = original(*a) if own is None else original(*a, own=own)
            calls[name].append(((*a, own) if own is not None else a, result))
            return result
        monkeypatch.setattr(home, name, called)

    homes = dict(worst_case_noise=train_tan, log_prob_gradient=classifier, guided_loss=train_tan)
    for name, home in homes.items():
        spy(name, home)
    train(tmp_path / "run", "--iterations", "1", "--batch-size", "16", *flags)
    ((adversary, schedule, x0, t, eps, steps, omega, own), (worst, ascent)), ((_, xt, t_scored, label), score), ((eps_in_loss, eps_theta, guidance), _) = (
        calls[name][-1] for name in calls)
    power, below = (float(dict(zip(flags[::2], flags[1::2])).get(flag, default)) for flag, default in (("--guidance-power", 2), ("--guidance-below", 1000)))
    assert (steps, omega, own, label) == (2, 0.1, "paper" not in flags, 1) and len(ascent) == 2 and not torch.equal(worst, eps)
    assert torch.equal(eps_in_loss, worst) and torch.equal(xt, schedule.add_noise(x0, t, worst)) and torch.equal(t_scored, t)
    expected = 5 * schedule.sigma_hat(t, xt) ** power * score * (t < below).view(-1, 1, 1, 1)
    if "--guidance-limit" in flags:
        left, pull = (x.pow(2).sum((1, 2, 3), keepdim=True).sqrt() for x in (worst - eps_theta, expected))
        assert (pull > 1e-4 * left).any()
        expected = expected * torch.minimum(1e-4 * left / pull, torch.ones_like(pull))
    torch.testing.assert_close(guidance, expected)
    assert expected.abs().max() > 0 and (t >= 500).any()
    assert any(".adaptor." in name for name, _ in adversary.named_parameters()) == ("source" not in flags)
    assert ("pgd_gain" in metrics(tmp_path / "run")[0]) == ("source" not in flags)  # of another network it would mean nothing


def test_gamma_and_learning_rate_fall_to_0(train, tmp_path, monkeypatch):
    gammas, original = [], train_tan.similarity_guidance
    monkeypatch.setattr(train_tan, "similarity_guidance", lambda *a: (gammas.append(a[4]), original(*a))[1])
    run = train(tmp_path / "run", "--guidance-fade", "0.5", "--learning-rate-decay", "cosine", "--learning-rate", "1e-3")
    assert gammas == pytest.approx([5, 5 * 2 / 3, 5 / 3, 0, 0, 0])
    lines = metrics(run)
    rates = [line["learning_rate"] for line in lines]
    assert rates == pytest.approx([1e-3 * (1 + math.cos(math.pi * i / 6)) / 2 for i in range(6)])
    assert ["guidance_ratio" in line for line in lines] == [True] * 3 + [False] * 3
    constant = train(tmp_path / "constant", "--guidance-fade", "0", "--learning-rate-decay", "none", "--learning-rate", "1e-3")
    assert gammas[6:] == [5] * 6
    assert {line["learning_rate"] for line in metrics(constant)} == {1e-3}


@pytest.mark.parametrize("fades, ratio, warned", [(False, 0.4, 0), (False, 0.5000001, 0), (False, 0.6, 1), (True, 1.9, 0), (True, 2.1, 1)])
def test_guidance_that_outweighs_the_pictures_is_warned_of(fades, ratio, warned):
    warnings = []
    train_tan.watch(SimpleNamespace(warn=warnings.append), dict(guidance_ratio=[None, 0.1, ratio, 0.1]), fades)
    assert len(warnings) == warned and all("quarter 3" in text for text in warnings)
    assert all(("--guidance-fade" in text) != fades for text in warnings)  # where it does not fade already


@pytest.mark.parametrize("method, precision, says", [
    ("adaptor", "fp32", "a lower --learning-rate"), ("tan", "fp32", "a lower --learning-rate or --gamma"),
    ("guided", "bf16", "a lower --learning-rate or --gamma, or --precision fp32")])
def test_what_to_do_about_a_run_that_diverges(method, precision, says):
    options = settings.Options(method=method, precision=precision)
    assert train_tan.remedy(options) == f"start again with --overwrite and {says}"


# ---- what goes wrong, and what is said -------------------------------------------------------------------------------

def test_a_loss_that_is_not_finite(train, finished, tmp_path, monkeypatch):
    run, steps = tmp_path / "run", []
    def broken(*a):
        steps.append(a)
        return guided_loss(*a) * (float("nan") if len(steps) == 3 else 1)
    with monkeypatch.context() as patch, pytest.raises(InputError, match="at iteration 2; .* a lower --learning-rate") as error:
        patch.setattr(train_tan, "guided_loss", broken)
        train(run, "--save-every", 1)
    assert "\n" not in str(error.value)
    state = load_checkpoint(run / "checkpoint.pt")
    assert state["iteration"] == 2 and all(p.isfinite().all() for p in state["parameters"])
    resume(run)
    assert weights(run) == weights(finished) and losses(run) == losses(finished)


def test_a_learning_rate_far_too_high(train, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(InputError, match="loss nan, gradient nan at iteration 1; the last state that was saved is in"):
        train(run, "--learning-rate", "1e30", "--save-every", 1)
    state = load_checkpoint(run / "checkpoint.pt")
    assert state["iteration"] == 1 and all(p.isfinite().all() for p in state["parameters"])


def test_a_folder_that_holds_a_run(train, tmp_path, capsys):
    run = train(tmp_path / "run", "--method", "guided", "--iterations", "1", "--samples", "1")
    with pytest.raises(InputError, match="holds a run already; continue it with --resume, replace it with --overwrite"):
        train(run, "--method", "finetune", "--iterations", "2")
    assert len(metrics(run)) == 1
    (run / "drawn").mkdir()
    for name in ("score.json", "stages.json", "stages.png", "classifier.safetensors"):
        (run / name).write_text("old")
    train(run, "--method", "finetune", "--iterations", "2", "--overwrite")
    assert len(metrics(run)) == 2 and run_folder.load_run(run)[1]["method"] == "finetune"
    assert not any((run / name).exists() for name in ("classifier.safetensors", "samples.png", "progress"))  # the first run's
    assert not any(path.read_bytes() == b"old" for path in run.iterdir() if path.is_file())
    assert [record["iteration"] for record in run_folder.stages(run)] == [0, 2]
    assert (run / "drawn").exists()  # not a file of train_tan.py
    assert "note: drawn in" in capsys.readouterr().out
    assert json.loads((run / "options.json").read_text())["overwrite"] is False


@pytest.mark.parametrize("flags, says", [
    (["--gamma", "2"], "--gamma 2.0: the run in .* has 5.0; leave the flag out .--output-dir .* --resume."),
    (["--method", "guided"], "--method guided: the run in .* has tan"),
    (["--seed", "1"], "--seed 1: the run in .* has 0"),
])
def test_resume_with_a_flag_that_contradicts(flags, says, finished):
    with pytest.raises(InputError, match=says):
        resume(finished, *flags)


def test_resume_with_flags_that_agree(finished, tmp_path, tiny):
    before = weights(finished)
    resume(finished, "--gamma", "5", "--method", "tan", "--source", tiny.source, "--save-every", "25")
    assert weights(finished) == before


def test_a_run_from_before_there_was_an_option(train, tmp_path):
    run = train(tmp_path / "run", "--method", "adaptor", "--iterations", "1")
    options = json.loads((run / "options.json").read_text())
    (run / "options.json").write_text(json.dumps({name: value for name, value in options.items() if name != "compile"}))
    resume(run, "--iterations", "2")
    assert len(metrics(run)) == 2 and json.loads((run / "options.json").read_text())["compile"] is False
    del options["seed"]  # of which something shows
    (run / "options.json").write_text(json.dumps(options))
    with pytest.raises(InputError, match="options.json: of another program, or of another version of this one"):
        resume(run, "--iterations", "3")


def test_a_run_with_its_classifier_reads_nothing_of_it_again(train, tiny, tmp_path):
    given = {}
    for name, made_from in (("--source-images", tiny.sources), ("--classifier-targets", tiny.targets)):
        given[name] = shutil.copytree(made_from, tmp_path / name)
    started = run_folder.load_classifier(train(tmp_path / "first", "--iterations", "0"))
    save_network(tmp_path / "--classifier", started)
    run = train(tmp_path / "run", "--method", "guided", "--iterations", "1", "--classifier", tmp_path / "--classifier",
                *(word for pair in given.items() for word in pair))
    made = (run / "classifier.safetensors").read_bytes()
    for name in ("--source-images", "--classifier-targets", "--classifier"):
        (tmp_path / name).rename(tmp_path / f"moved{name}")
    resume(run, "--iterations", "2")
    assert len(metrics(run)) == 2 and (run / "classifier.safetensors").read_bytes() == made
    with pytest.raises(InputError, match="neither a folder nor a built-in source"):
        train(run, "--method", "guided", "--overwrite", "--source-images", given["--source-images"])


def test_the_description_of_the_network_is_kept_with_the_run(tiny, train, tmp_path, monkeypatch):
    """--arch FILE is read once: the file may move, or change."""
    torch.save(load_file(tiny.source), tmp_path / "published.pt")
    described = dict(config=dict(num_head_channels=16, image_size=16, norm_groups=8), schedule=dict(name="linear", timesteps=20))
    (tmp_path / "arch.json").write_text(json.dumps(described))
    monkeypatch.chdir(tmp_path)
    run = train(tmp_path / "run", "--method", "finetune", "--samples", "2", "--iterations", "1", "--source", tmp_path / "published.pt", "--arch", "arch.json")
    (tmp_path / "arch.json").write_text(json.dumps(dict(described, schedule=dict(name="cosine"))))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run_folder.load_run(run)[0].schedule.config["timesteps"] == 20
    resume(run, "--iterations", "2", "--arch", "arch.json")
    resume(run, "--iterations", "3", "--arch", "arch.json")
    assert len(metrics(run)) == 3 and run_folder.load_run(run)[0].schedule.config["name"] == "linear"
    train(run, "--method", "finetune", "--overwrite", "--iterations", "1")
    assert not (run / "arch.json").exists() and run_folder.load_run(run)[0].schedule.timesteps == 1000


def test_resume_of_nothing(tmp_path):
    with pytest.raises(InputError, match="nothing: no run to resume"):
        resume(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_pictures_that_changed(train, tiny, tmp_path):
    shutil.copytree(tiny.targets, tmp_path / "targets")
    run = train(tmp_path / "run", "--method", "adaptor", "--iterations", "1", "--target", tmp_path / "targets")
    (tmp_path / "targets" / "0.png").unlink()
    with pytest.raises(InputError, match="targets: the pictures have changed since the run"):
        resume(run, "--iterations", "2")


@pytest.mark.parametrize("flags, says", [
    (["--target", "nosuch"], "nosuch: neither a folder nor a built-in target"),
    (["--source", "nosuch"], "nosuch: no such file"),
    (["--source", "https://huggingface.co/google/ddpm-cat-256"], "links are not fetched; .* of the Hugging Face Hub give owner/name"),
    (["--classifier", "nosuch.pt"], "nosuch.pt: no such file"),
    (["--source-images", "nosuch"], "nosuch: neither a folder nor a built-in source"),
])
def test_inputs_that_do_not_exist(flags, says, train, tmp_path):
    with pytest.raises(InputError, match=says):
        train(tmp_path / "run", *flags)


def test_a_source_of_few_timesteps_draws_its_own_pictures(tiny, tmp_path):
    description = dict(network="UNet", config=TINY, schedule=dict(name="linear", timesteps=12))
    save_network(tmp_path / "source.safetensors", network.build(description, "tiny"))
    call(train_tan.main, "--source", tmp_path / "source.safetensors", "--target", tiny.targets, "--method", "guided", "--iterations", 1,
         "--samples", 0, "--source-count", 4, "--classifier-iterations", 1, "--device", "cpu", "--output-dir", tmp_path / "run")
    assert len(metrics(tmp_path / "run")) == 1


def test_a_source_picture_that_cannot_be_read(tiny, train, tmp_path):
    shutil.copytree(tiny.sources, tmp_path / "sources")
    (tmp_path / "sources" / "3.png").write_bytes((tiny.sources / "3.png").read_bytes()[:300])
    with pytest.raises(InputError, match="3.png"):
        train(tmp_path / "run", "--method", "guided", "--source-images", tmp_path / "sources")
    assert not (tmp_path / "run").exists()


def test_a_published_file_needs_an_arch(tiny, train, tmp_path):
    torch.save(load_file(tiny.source), tmp_path / "published.pt")
    with pytest.raises(InputError, match="published.pt: the file does not say which network it is for; add --arch"):
        train(tmp_path / "run", "--source", tmp_path / "published.pt")
    assert not (tmp_path / "run").exists()


def test_an_unknown_method():
    with pytest.raises(InputError, match="--method dreambooth: must be one of tan, guided, adaptor, finetune, pa"):
        call(train_tan.main, "--method", "dreambooth")


def test_a_single_target_picture(tiny, train, tmp_path):
    (tmp_path / "one").mkdir()
    shutil.copy(tiny.targets / "0.png", tmp_path / "one")
    train(tmp_path / "run", "--method", "guided", "--iterations", "1", "--target", tmp_path / "one")
    assert len(metrics(tmp_path / "run")) == 1


def test_a_resume_that_fails_leaves_the_finished_run_alone(train, tmp_path):
    run = train(tmp_path / "run", "--method", "adaptor", "--iterations", "1")
    (run / "checkpoint.pt").write_bytes(b"damaged")
    with pytest.raises(InputError, match="damaged checkpoint"):
        resume(run, "--iterations", "2")
    assert run_folder.load_run(run)[1]["method"] == "adaptor"
    (run / "checkpoint.pt").unlink()
    with pytest.raises(InputError, match="is finished, and has no checkpoint.pt to go on from"):
        resume(run, "--iterations", "2")
    assert run_folder.load_run(run, 1)[1]["method"] == "adaptor"  # its stages are there, too


def test_the_classifier_that_guides_is_as_the_options_say(train, tmp_path, monkeypatch):
    seen, make, guide = {}, train_tan.make_classifier, train_tan.similarity_guidance
    monkeypatch.setattr(train_tan, "make_classifier", lambda *a, **options: seen.update(options) or make(*a, **options))
    monkeypatch.setattr(train_tan, "similarity_guidance", lambda model, *a: seen.update(model=model) or guide(model, *a))
    train(tmp_path / "run", "--method", "guided", "--iterations", 1, "--checkpoint-blocks", "--augment")
    assert seen["model"].use_checkpoint and not any(p.requires_grad for p in seen["model"].parameters())
    assert tuple(seen["kinds"]) == ()  # not the default ones


def test_the_classifier_is_checked_on_pictures_held_out(train, tmp_path, capsys):
    run = train(tmp_path / "run", "--method", "guided", "--iterations", "0", "--classifier-check")
    accuracy = run_folder.load_classifier(run).description["held_out_accuracy"]
    assert len(accuracy) == 4 and all(0 <= share <= 1 for share in accuracy)
    assert f"(0.5 is chance): {', '.join(f'{share:.2f}' for share in accuracy)}" in capsys.readouterr().out
    run = train(tmp_path / "other", "--method", "guided", "--iterations", "0", "--no-classifier-check")
    assert run_folder.load_classifier(run).description["held_out_accuracy"] is None


def test_the_check_leaves_the_classifier_as_it_is(train, tmp_path):
    """Dropout, too, is drawn as without it."""
    save_network(tmp_path / "source.safetensors", tiny_network(dropout=0.5))
    flags = ["--method", "guided", "--iterations", "0", "--source", tmp_path / "source.safetensors"]
    with_, without = (load_file(train(tmp_path / flag[2:], *flags, flag) / "classifier.safetensors")
                      for flag in ("--classifier-check", "--no-classifier-check"))
    assert all(value.equal(without[name]) for name, value in with_.items())


def test_resume_after_the_source_has_changed(tiny, train, tmp_path):
    source, run = shutil.copy(tiny.source, tmp_path / "source.safetensors"), tmp_path / "run"
    train(run, "--method", "adaptor", "--iterations", "1", "--source", source)
    save_network(source, tiny_network(seed=1))
    with pytest.raises(InputError):
        resume(run, "--iterations", "2")


# ---- memory and precision --------------------------------------------------------------------------------------------

def memory_for(pictures, monkeypatch):
    """A device that runs out of memory where more pictures go through the network at once."""
    original, sizes = train_tan.predict_eps, []

    def limited(model, xt, t, schedule):
        sizes.append(len(xt))
        if len(xt) > pictures:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(model, xt, t, schedule)
    monkeypatch.setattr(train_tan, "predict_eps", limited)
    return sizes


def test_out_of_memory_halves_the_micro_batch(train, finished, tmp_path, monkeypatch, capsys):
    sizes = memory_for(1, monkeypatch)
    run = train(tmp_path / "run")
    assert sizes[:5] == [4, 2, 1, 1, 1] and set(sizes[5:]) == {1}
    said = capsys.readouterr().err
    assert [said.count(f"going on with {n} (--micro-batch-size {n} saves") for n in (2, 1)] == [1, 1]
    assert_same_run(run, finished)


def test_out_of_memory_in_the_backward_pass_lets_go_of_its_graph(train, finished, tmp_path, monkeypatch):
    """Else the next attempt would begin with nearly all of the memory taken."""
    original, graphs = train_tan.losses_of, []

    def losses_of(*a):
        assert not any(graph() for graph in graphs)  # of the attempt before
        losses, *rest = original(*a)
        if len(losses) > 2:
            graphs.append(weakref.ref(losses))
            losses.register_hook(out_of_memory)
        return losses, *rest

    def out_of_memory(gradient):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train_tan, "losses_of", losses_of)
    assert_same_run(train(tmp_path / "run"), finished)
    assert len(graphs) == 1


def test_memory_that_is_gone_when_a_run_goes_on_is_no_other_network(train, tmp_path, monkeypatch):
    run = train(tmp_path / "run", "--method", "adaptor", "--iterations", "1")

    def out_of_memory(*a):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.optim.Adam, "load_state_dict", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):  # which `options.run` says in one line
        resume(run, "--iterations", "2")


def test_the_classifier_and_pictures_take_less_memory_too(tiny, tmp_path, monkeypatch, capsys):
    """A device on which three pictures at once fit: what is trained and drawn is the same."""
    fine_tune, sample, sizes = classifier.fine_tune, ddpm.sample, []

    def limited(function, at_once):
        def called(*a, **options):
            sizes.append(at_once(a, options))
            if sizes[-1] > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return function(*a, **options)
        return called
    monkeypatch.setattr(classifier, "fine_tune", limited(fine_tune, lambda a, options: a[9]))
    monkeypatch.setattr(network, "sample", limited(sample, lambda a, options: options["batch_size"]))
    given = tiny.flags("tan")
    del given[given.index("--source-images"):given.index("--source-images") + 2]  # they are drawn, too
    given += ["--samples", 4, "--iterations", 2, "--classifier-batch-size", 8, "--no-classifier-check"]
    call(train_tan.main, *given, "--output-dir", tmp_path / "run")
    assert sizes[:9] == [64, 32, 16, 8, 4, 2, 8, 4, 2] and sizes[9:15] == [64, 32, 16, 8, 4, 2]  # pictures, classifier, a row of progress.png
    assert "out of memory with 8 pictures at once: going on with 4 (--micro-batch-size" in capsys.readouterr().err
    monkeypatch.undo()
    call(train_tan.main, *given, "--output-dir", tmp_path / "whole")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_advice_names_flags_that_the_program_has(capsys):
    def on_two(at_once):
        if at_once > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return at_once
    assert fitting(on_two, 8) == fitting(on_two, 4, "--batch-size") == 2
    assert capsys.readouterr().err.splitlines() == [
        "out of memory with 8 pictures at once: going on with 4", "out of memory with 4 pictures at once: going on with 2",
        "out of memory with 4 pictures at once: going on with 2 (--batch-size 2 saves the failed attempts)"]


@pytest.mark.parametrize("flags, fits", [((), 0), (("--method", "pa"), 3)])
def test_where_not_even_that_fits(flags, fits, train, tmp_path, monkeypatch):
    memory_for(fits, monkeypatch)
    with pytest.raises(InputError, match="out of memory with . picture.* --checkpoint-blocks.* --precision bf16"):
        train(tmp_path / "run", *flags)


def test_a_low_rank_psi_is_not_added_to_weights_in_bf16(train, tmp_path, monkeypatch):
    """Between bf16's numbers, 0.4 % of a weight apart, its first steps would vanish."""
    seen, original = [], train_tan.losses_of
    monkeypatch.setattr(train_tan, "losses_of", lambda model, *a: seen.append(model) or original(model, *a))
    train(tmp_path / "run", "--method", "adaptor", "--adaptor", "low-rank", "--iterations", "1", "--precision", "bf16")
    assert {p.dtype for p in seen[0].parameters()} == {torch.float32}


def test_bf16_holds_what_is_frozen_in_bf16_and_computes_the_same(train, tmp_path, monkeypatch):
    flags = ("--iterations", "2", "--precision", "bf16")
    seen, original = [], train_tan.losses_of
    monkeypatch.setattr(train_tan, "losses_of", lambda model, *a: seen.append(model) or original(model, *a))
    cast = train(tmp_path / "cast", *flags)
    kinds = {(".adaptor." in name, p.dim() > 1): p.dtype for name, p in seen[0].named_parameters()}
    assert kinds == {(False, True): torch.bfloat16, (False, False): torch.float32,
                     (True, True): torch.float32, (True, False): torch.float32}
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self)  # autocast casts at each pass
    assert losses(train(tmp_path / "autocast", *flags)) == losses(cast)


def test_the_classifier_learns_in_bf16(train, tmp_path, monkeypatch):
    found, original = [], classifier.F.cross_entropy
    def seen(*a, **how):
        found.append(original(*a, **how))
        return found[-1]
    monkeypatch.setattr(classifier.F, "cross_entropy", seen)
    train(tmp_path / "run", "--iterations", "0", "--precision", "bf16", "--classifier-iterations", "40", "--classifier-learning-rate", "1e-3")
    assert len(found) == 40 and sum(found[-5:]) < 0.5 * sum(found[:5])


def test_compile_compiles_the_network(train, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    train(tmp_path / "run", "--iterations", "1", "--compile")
    assert compiled == ["UNet"]
    train(tmp_path / "other", "--iterations", "1", "--compile", "--pgd-network", "source")
    assert compiled == ["UNet"] * 3  # theta's own passes, too


# ---- flags that nothing else sets ------------------------------------------------------------------------------------

def test_warmup():
    options = settings.Options(iterations=3, warmup=2, learning_rate=0.1, learning_rate_decay="none")
    assert [train_tan.learning_rate(options, i) for i in range(3)] == pytest.approx([0.05, 0.1, 0.1])


def test_recomputed_activations_change_nothing(train, finished, tmp_path, monkeypatch):
    recomputed = []
    monkeypatch.setattr(unet, "checkpoint", lambda stage, *a, **how: recomputed.append(stage) or checkpoint(stage, *a, **how))
    train(tmp_path / "classifier", "--checkpoint-blocks", "--iterations", "0")
    assert recomputed  # p_phi's
    run = train(tmp_path / "run", "--checkpoint-blocks", "--iterations", "2")
    assert any(".adaptor." in name for stage in recomputed for name, _ in stage.named_parameters())
    assert losses(run) == losses(finished)[:2]


def test_bf16_reaches_the_networks(train, tmp_path, monkeypatch):
    seen = []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: seen.append((torch.is_grad_enabled(), output.dtype))
        if isinstance(module, torch.nn.Conv2d) else None)
    try:
        train(tmp_path / "run", "--method", "adaptor", "--iterations", "1", "--precision", "bf16")
    finally:
        hook.remove()
    assert {dtype for with_grad, dtype in seen if with_grad} == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in load_checkpoint(tmp_path / "run" / "checkpoint.pt")["parameters"])


@pytest.mark.parametrize("flags, mirrored", [(["--no-flip"], False), ([], True)])
def test_mirrored_pictures(flags, mirrored, train, tiny, tmp_path, monkeypatch):
    seen, original = [], train_tan.worst_case_noise
    monkeypatch.setattr(train_tan, "worst_case_noise", lambda model, schedule, x0, *rest, **how: seen.append(x0)
                        or original(model, schedule, x0, *rest, **how))
    train(tmp_path / "run", "--iterations", "2", "--batch-size", "8", *flags)
    shots = load_folder(tiny.targets, 16)
    plain = [any(torch.equal(x, shot) for shot in shots) for x in torch.cat(seen)]
    turned = [any(torch.equal(x, shot.flip(2)) for shot in shots) for x in torch.cat(seen)]
    assert any(plain) and any(turned) == mirrored and all(a or b for a, b in zip(plain, turned))


def test_resuming_announces_no_settings(train, tmp_path, capsys):
    run = train(tmp_path / "run", "--method", "adaptor", "--iterations", "1")
    assert "settings for a small source: --learning-rate 0.002\n" in capsys.readouterr().out  # the others were typed
    resume(run, "--iterations", "2", "--save-every", "7")
    assert "settings for" not in capsys.readouterr().out


def test_what_was_left_half_written_is_removed(train, tmp_path):
    run = train(tmp_path / "run", "--method", "adaptor", "--iterations", "1")
    (run / ".checkpoint.pt.1.tmp").touch()
    resume(run, "--iterations", "2")
    assert not list(run.glob(".*.tmp"))


def test_a_row_of_progress_that_a_kill_left_out_is_drawn_on_resuming(train, tmp_path):
    flags = "--method adaptor --iterations 2 --samples 2 --previews 2".split()
    run = train(tmp_path / "run", *flags)
    whole = (run / "progress.png").read_bytes()
    (run / "progress" / "000002.png").unlink()
    (run / "weights.safetensors").unlink()
    resume(run)
    assert (run / "progress.png").read_bytes() == whole


def test_what_is_drawn_are_the_averages_and_drawing_changes_nothing(train, tmp_path, monkeypatch):
    drawn = []

    def draw(self, network, n, steps):
        drawn.append([p.detach().clone() for p in self.ema.parameters])
        return torch.zeros(n, 3, 16, 16)

    monkeypatch.setattr(run_report.Report, "draw", draw)
    flags = "--method adaptor --iterations 3 --samples 2 --previews 3".split()
    run = train(tmp_path / "run", *flags)
    average = load_checkpoint(run / "checkpoint.pt")["ema"]["average"]
    before, *_, last_preview, pairs, _ = drawn
    assert len(drawn) == 6 and not all(torch.equal(a, b) for a, b in zip(before, average))
    for shown in (last_preview, pairs):
        assert all(torch.equal(a, b) for a, b in zip(shown, average, strict=True))
    assert weights(train(tmp_path / "blind", *flags, "--samples", "0")) == weights(run)


def test_fewer_iterations_than_were_done(train, tmp_path):
    run = train(tmp_path / "run", "--method", "adaptor", "--iterations", "2")
    with pytest.raises(InputError, match="--iterations 1: the run in .* has done 2 already"):
        resume(run, "--iterations", "1")


# ---- stages, and pictures held out -----------------------------------------------------------------------------------

THREE_STAGES = "--iterations 6 --previews 3 --save-every 3".split()


@pytest.mark.parametrize("method", ["adaptor", "finetune"])
def test_a_stage_is_the_running_average_at_that_time(method, train, tmp_path):
    """The same steps end, after two of them, where the longer run was then."""
    flags = "--method", method, "--learning-rate-decay", "none"
    run, short = train(tmp_path / "run", *flags, *THREE_STAGES), train(tmp_path / "short", *flags, "--iterations", "2")
    assert [record["iteration"] for record in run_folder.stages(run)] == [0, 2, 4, 6]
    for at, whole in ((2, short), (6, run)):
        stage, final = load_file(run_folder.stage_file(run, at)), load_file(whole / "weights.safetensors")
        assert stage.keys() == final.keys() and all(stage[key].equal(final[key]) for key in final)
    assert not all(value.equal(stage[key]) for key, value in load_file(run_folder.stage_file(run, 4)).items())


def test_a_row_says_how_near_its_pictures_are(train, tiny, tmp_path, monkeypatch):
    """Drawn are the training pictures themselves, mirrored; at the first stage brighter."""
    shots, seen = load_folder(tiny.targets, 16), []

    def draw(self, network, n, steps):
        moved = 0 if self.ema.updates else 0.25
        return (shots.flip(3) + moved).repeat(2, 1, 1, 1)[:n]

    monkeypatch.setattr(run_report.Report, "draw", draw)
    monkeypatch.setattr(run_report, "save_grid", lambda path, images, columns, labels=None, **how: seen.append(labels))
    run = train(tmp_path / "run", "--method", "adaptor", "--samples", "2", *THREE_STAGES)
    assert ["0  rms 0.25", "2  rms 0.00", "4  rms 0.00", "6  rms 0.00"] in seen
    assert [record["nearest"] for record in run_folder.stages(run)] == pytest.approx([0.25, 0, 0, 0], abs=1e-6)


def test_held_out_pictures_are_not_trained_on(train, tiny, tmp_path):
    """The run is that on a folder without the last two, classifier and all, but for what it measures."""
    shutil.copytree(tiny.targets, tmp_path / "three")
    for name in ("3.png", "4.png"):
        (tmp_path / "three" / name).unlink()
    flags = "--method", "guided", "--iterations", "3"
    run, three = train(tmp_path / "run", *flags, "--hold-out", "2"), train(tmp_path / "other", *flags, "--target", tmp_path / "three")
    for name in ("classifier.safetensors", "targets.png"):
        assert (run / name).read_bytes() == (three / name).read_bytes()
    ours, theirs = (load_file(folder / "weights.safetensors") for folder in (run, three))  # the descriptions name other pictures
    assert ours.keys() == theirs.keys() and all(value.equal(theirs[name]) for name, value in ours.items())
    assert losses(run) == losses(three)


def test_the_loss_of_held_out_pictures(train, tiny, tmp_path, capsys):
    """Eq. 1 with the network of each stage, at a timestep of each eighth and the same noises."""
    run = train(tmp_path / "run", "--method", "adaptor", "--hold-out", "2", *THREE_STAGES)
    said, records = capsys.readouterr().out, run_folder.stages(run)
    shots, g = load_folder(tiny.targets, 16), generator(0, run_report.STAGE_NOISE)
    t = ((torch.arange(8) + torch.rand(8, generator=g)) * 125).long()
    assert (t // 125).tolist() == list(range(8))
    eps = torch.randn(8, 3, 16, 16, generator=g)
    for record in records:
        network, _ = run_folder.load_run(run, record["iteration"])
        for name, pictures in (("held_out_loss", shots[3:]), ("training_loss", shots[:3])):
            xt = [network.schedule.add_noise(x.expand(8, -1, -1, -1), t, eps) for x in pictures]
            with torch.no_grad():
                expected = torch.stack([(network.model(x, t) - eps).square().mean() for x in xt]).mean().item()
            assert record[name] == pytest.approx(expected, rel=1e-5)
        assert f"after {record['iteration']} iterations: held-out loss {record['held_out_loss']:.4f}, training loss" in said
    assert len({record["held_out_loss"] for record in records}) == 4
    best = min(records, key=lambda record: record["held_out_loss"])["iteration"]
    assert said.splitlines()[-1] == f"held-out loss is lowest after {best} of 6 iterations: python sample.py {run} --at {best}"


def test_measuring_held_out_pictures_changes_nothing(train, tmp_path, monkeypatch):
    flags = "--method", "adaptor", "--hold-out", "2", *THREE_STAGES
    run = train(tmp_path / "run", *flags)
    monkeypatch.setattr(run_report.Report, "loss", lambda self, pictures: float(len(pictures)))
    assert weights(train(tmp_path / "blind", *flags)) == weights(run)


def test_a_resumed_run_keeps_its_stages(train, tmp_path, monkeypatch):
    """It stops after five iterations and goes on from the third: the stage of the fourth is made anew, as its metrics are."""
    flags = "--method", "adaptor", "--hold-out", "2", "--samples", "2", *THREE_STAGES
    whole, run = train(tmp_path / "whole", *flags), tmp_path / "run"
    interrupted(train, run, monkeypatch, 2, *flags)
    assert load_checkpoint(run / "checkpoint.pt")["iteration"] == 3
    before = {path.name: path.stat().st_mtime_ns for path in (run / "stages").iterdir()}
    assert list(sorted(before)) == ["000000.safetensors", "000002.safetensors", "000004.safetensors"]
    (run / "stages" / ".000006.safetensors.1.tmp").touch()
    resume(run)
    after = {path.name: path.stat().st_mtime_ns for path in (run / "stages").iterdir()}
    assert after.keys() == before.keys() | {"000006.safetensors"}
    assert {name for name in before if before[name] != after[name]} == {"000004.safetensors"}
    for name in after:
        assert (run / "stages" / name).read_bytes() == (whole / "stages" / name).read_bytes()
    assert (run / "progress.png").read_bytes() == (whole / "progress.png").read_bytes() and weights(run) == weights(whole)


def test_a_resumed_run_of_another_length_has_no_stages_of_the_old_course(train, tmp_path, monkeypatch):
    run, flags = tmp_path / "run", ("--method", "adaptor", "--samples", "2", *THREE_STAGES)
    interrupted(train, run, monkeypatch, 2, *flags)
    resume(run, "--iterations", "9")
    assert [record["iteration"] for record in run_folder.stages(run)] == [0, 2, 3, 6, 9]
    assert sorted(path.stem for path in (run / "progress").iterdir()) == ["000000", "000002", "000003", "000006", "000009"]


def test_killed_while_progress_is_drawn(train, tmp_path, monkeypatch):
    flags = ("--method", "adaptor", "--samples", "2", *THREE_STAGES)
    whole, run, save_grid = train(tmp_path / "whole", *flags), tmp_path / "run", run_report.save_grid

    def killed(path, images, *a, **options):
        if path.name == "progress.png" and len(images) == 32:
            raise Enough
        save_grid(path, images, *a, **options)

    with monkeypatch.context() as patch, pytest.raises(Enough):
        patch.setattr(run_report, "save_grid", killed)
        train(run, *flags)
    resume(run)
    assert (run / "progress.png").read_bytes() == (whole / "progress.png").read_bytes()


@pytest.mark.parametrize("number, says", [
    ("4", "--hold-out 4: .*targets has 5 pictures; at least 2 must be left to train on"),
    ("9", "--hold-out 9: .*at least 2 must be left"), ("-1", "--hold-out -1: must be at least 0")])
def test_too_many_held_out(number, says, train, tmp_path):
    with pytest.raises(InputError, match=says):
        train(tmp_path / "run", "--hold-out", number)
    assert not (tmp_path / "run").exists()


def test_a_held_out_picture_that_changed(train, tiny, tmp_path):
    shutil.copytree(tiny.targets, tmp_path / "targets")
    run = train(tmp_path / "run", "--method", "adaptor", "--iterations", "1", "--target", tmp_path / "targets", "--hold-out", "2")
    shutil.copy(tiny.sources / "0.png", tmp_path / "targets" / "4.png")
    with pytest.raises(InputError, match="targets: the pictures have changed since the run"):
        resume(run, "--iterations", "2")


# ---- what the classifier is made from --------------------------------------------------------------------------------

class Enough(Exception):
    pass


@pytest.fixture
def made(monkeypatch):
    """What make_classifier was called with, where the run ends."""
    seen = {}

    def record(start, schedule, source, target, **how):
        seen.update(start=start, source=source, target=target, **how)
        raise Enough
    monkeypatch.setattr(train_tan, "make_classifier", record)
    return seen


def test_the_pictures_and_numbers_of_the_classifier(made, train, tiny, tmp_path):
    with pytest.raises(Enough):
        train(tmp_path / "run", "--classifier-targets", tiny.sources, "--classifier-batch-size", "6",
              "--classifier-learning-rate", "0.5", "--micro-batch-size", "3", "--no-classifier-check")
    assert torch.equal(made["target"], load_folder(tiny.sources, 16)) and len(made["source"]) == 8
    numbers = [made[name] for name in ("iterations", "batch_size", "learning_rate", "micro_batch_size", "check")]
    assert numbers == [3, 6, 0.5, 3, False] and made["encode"] is None and made["kinds"] == ("flip", "shift")
    assert made["stream"](2).initial_seed() == generator(0, 2).initial_seed()
    first, second = (made["start"]().state_dict() for _ in range(2))  # the same new head each time
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_another_seed_gives_other_source_pictures_and_another_head(made, train, tmp_path):
    found = []
    for seed in (0, 1):
        with pytest.raises(Enough):
            train(tmp_path / "run", "--seed", seed, "--overwrite", "--source-images", "toyfaces")
        found.append((made["source"], made["stream"](2).initial_seed(), *made["start"]().state_dict().values()))
        assert torch.equal(made["source"], domains.source_images("toyfaces", 8, 16, seed))
    assert not torch.equal(found[0][0], found[1][0]) and found[0][1] != found[1][1]
    assert not all(torch.equal(a, b) for a, b in zip(found[0][2:], found[1][2:]))


def test_pairs_are_the_source_above_and_the_adapted_below(train, tmp_path, monkeypatch):
    white_or_black = lambda self, network, n, steps: torch.full((n, 3, 16, 16), -1.0 if network is self.source else 1.0)
    monkeypatch.setattr(run_report.Report, "draw", white_or_black)
    run = train(tmp_path / "run", "--method", "adaptor", "--samples", "2", "--iterations", "1", "--previews", "1")
    pixels = read_array(run / "samples.png")
    assert pixels[10, 10].min() == 255 and pixels[-10, 10].max() == 0  # the source is white here


def test_changes_that_keep_a_built_in_target(made, train, tmp_path):
    for flags, kinds in (([], ("flip", "shift", "colour")), (["--augment", "shift"], ("shift",))):
        with pytest.raises(Enough):
            train(tmp_path / "run", "--target", "sunglasses", "--overwrite", *flags)
        assert made["kinds"] == kinds and len(made["target"]) == 10


def test_a_finished_run_that_goes_on_is_not_finished(train, tmp_path, monkeypatch):
    run = train(tmp_path / "run", "--method", "adaptor", "--iterations", "1", "--samples", "2")
    of_the_end = [run / name for name in ("weights.safetensors", "samples.png", "report.html", "stages.json", "stages.png")]
    for file in of_the_end[3:]:
        file.touch()  # by evaluate.py --at all
    assert all(file.exists() for file in of_the_end)

    def killed(*a):
        raise Enough
    monkeypatch.setattr(train_tan, "guided_loss", killed)
    with pytest.raises(Enough):
        resume(run, "--iterations", "2")
    assert not any(file.exists() for file in of_the_end) and (run / "checkpoint.pt").exists()


def test_a_run_among_the_pictures_that_it_reads(tiny, train, tmp_path):
    photos, sources = (shutil.copytree(folder, tmp_path / Path(folder).name) for folder in (tiny.targets, tiny.sources))
    for out, flags in ((photos, ()), (photos / "runs" / "new", ("--recursive",)), (sources / "new", ("--source-images", sources)),
                       (sources, ("--classifier-targets", sources))):
        with pytest.raises(InputError, match=f"--output-dir {out}: pictures are read from there"):
            train(out, "--target", photos, *flags)
    assert not (photos / "runs").exists()
    train(photos / "runs" / "new", "--target", photos, "--method", "adaptor", "--iterations", "1")


def test_a_folder_that_holds_files_of_the_same_names(train, tmp_path):
    (tmp_path / "samples.png").write_text("mine")
    for more in ([], ["--overwrite"]):
        with pytest.raises(InputError, match="holds files with the names a run would write, but is not a run"):
            train(tmp_path, "--method", "adaptor", *more)
    assert (tmp_path / "samples.png").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "samples.png").rename(tmp_path / "stages")  # a folder of this name would be emptied
    with pytest.raises(InputError, match="holds files with the names a run would write"):
        train(tmp_path, "--method", "adaptor")


def test_where_a_run_cannot_go(train, tiny, tmp_path):
    photos = shutil.copytree(tiny.sources, tmp_path / "photos")
    with pytest.raises(InputError, match=r"photos: holds pictures \(0.png\), among which a run would write its own"):
        train(photos, "--method", "adaptor")
    with pytest.raises(InputError, match="0.png: is a file; give a folder"):
        train(photos / "0.png", "--method", "adaptor")
    with pytest.raises(InputError, match="photos: holds pictures"):
        call(pretrain.main, tiny.targets, "--size", 16, "--output-dir", photos)
    assert len(list(photos.iterdir())) == 8
    run = train(tmp_path / "run", "--method", "adaptor", "--iterations", 1)
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    with pytest.raises(InputError, match="run: holds the run of another program"):
        call(pretrain.main, tiny.targets, "--size", 16, "--output-dir", run, "--overwrite")
    with pytest.raises(InputError, match="of another program, .*--method adaptor.; continue it with that"):
        call(gan_transfer.main, "--output-dir", run, "--resume")
    assert before == {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}


def test_pictures_that_are_few_or_the_same(train, tiny, tmp_path, capsys):
    for name in ("a.png", "b.png"):
        (tmp_path / "targets").mkdir(exist_ok=True)
        shutil.copy(tiny.targets / "0.png", tmp_path / "targets" / name)
    train(tmp_path / "run", "--method", "adaptor", "--iterations", 0, "--target", tmp_path / "targets")
    said = capsys.readouterr().out
    assert "targets: 2 picture(s) are few; expect copies" in said and "targets: 1 of 2 pictures are the same as others: b.png" in said
    for name in ("c.png", "d.png"):  # the last is held out
        shutil.copy(tiny.targets / "1.png", tmp_path / "targets" / name)
    train(tmp_path / "held", "--method", "adaptor", "--iterations", 0, "--target", tmp_path / "targets", "--hold-out", 1)
    assert "targets: a picture that is held out, or its mirror image, is also trained on" in capsys.readouterr().out
    shutil.copytree(tiny.targets, tmp_path / "mirrored")
    ImageOps.mirror(Image.open(tiny.targets / "0.png")).save(tmp_path / "mirrored" / "last.png")
    train(tmp_path / "held2", "--method", "adaptor", "--iterations", 0, "--target", tmp_path / "mirrored", "--hold-out", 1)
    assert "mirrored: a picture that is held out, or its mirror image, is also trained on" in capsys.readouterr().out
    train(tmp_path / "usual", "--method", "adaptor", "--iterations", 0)
    assert "note: " not in capsys.readouterr().out
    with pytest.raises(InputError, match="--source-images .*: are the target's pictures"):
        train(tmp_path / "other", "--method", "guided", "--source-images", tiny.targets)
