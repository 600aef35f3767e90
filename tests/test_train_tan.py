"""train_tan.py: the loss of Eq. 6, the four methods, and that a run comes out the same however it is split, stopped or spread."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, call, tiny_network
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

import classifier
import train_tan
import unet
from checkpoints import run_folder
from checkpoints.load import load_network, load_source
from checkpoints.network import save_network
from classifier import guided_loss
from plumbing.files import load_checkpoint
from plumbing.options import InputError
from plumbing.pictures import load_folder
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
    monkeypatch.setattr(train_tan, "load_source", lambda *a: used.append(load_source(*a)) or used[-1])
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
    resume(run, "--iterations", "3")
    assert ("falls over 3 iterations from now on, not over 2" in capsys.readouterr().out) == noted


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
    assert (run / "classifier.safetensors").read_bytes() == (alone / "classifier.safetensors").read_bytes()
    assert_same_run(run, alone)


# ---- what the loop feeds the loss ------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags", [(), ("--guidance-power", "1"), ("--guidance-below", "500"), ("--pgd-network", "source")])
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


def test_paper_is_the_printed_numbers_typed_out(train, tmp_path):
    few = ["--iterations", "2", "--batch-size", "4", "--classifier-iterations", "3"]
    paper = train(tmp_path / "paper", "--paper", *few)
    typed = train(tmp_path / "typed", *few, "--learning-rate", "5e-5", "--learning-rate-decay", "none", "--guidance-fade", "0",
                  "--omega", "0.02", "--norm", "paper")
    assert weights(paper) == weights(typed)
    ours = train(tmp_path / "ours", *few)
    assert weights(paper) != weights(ours)


# ---- what goes wrong, and what is said -------------------------------------------------------------------------------

def test_a_loss_that_is_not_finite(train, finished, tmp_path, monkeypatch):
    run, steps = tmp_path / "run", []
    def broken(*a):
        steps.append(a)
        return guided_loss(*a) * (float("nan") if len(steps) == 3 else 1)
    with monkeypatch.context() as patch, pytest.raises(InputError, match="at iteration 2; .* a lower --learning-rate") as error:
        patch.setattr(train_tan, "guided_loss", broken)
        train(run)
    assert "\n" not in str(error.value)
    state = load_checkpoint(run / "checkpoint.pt")
    assert state["iteration"] == 2 and all(p.isfinite().all() for p in state["parameters"])
    resume(run)
    assert weights(run) == weights(finished) and losses(run) == losses(finished)


def test_a_learning_rate_far_too_high(train, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(InputError, match="loss nan, gradient nan at iteration 1; the state before it"):
        train(run, "--learning-rate", "1e30")
    assert all(p.isfinite().all() for p in load_checkpoint(run / "checkpoint.pt")["parameters"])


def test_a_folder_that_holds_a_run(train, tmp_path):
    run = train(tmp_path / "run", "--method", "guided", "--iterations", "1", "--samples", "1")
    with pytest.raises(InputError, match="holds a run already; continue it with --resume, replace it with --overwrite"):
        train(run, "--method", "finetune", "--iterations", "2")
    assert len(metrics(run)) == 1
    (run / "drawn").mkdir()
    train(run, "--method", "finetune", "--iterations", "2", "--overwrite")
    assert len(metrics(run)) == 2 and run_folder.load_run(run)[1]["method"] == "finetune"
    assert not any((run / name).exists() for name in ("classifier.safetensors", "samples.png", "progress"))  # the first run's
    assert (run / "drawn").exists()  # not a file of train_tan.py
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


def test_more_sampling_steps_than_timesteps(train, tmp_path):
    with pytest.raises(InputError, match="--sample-steps 1001: this model has 1000"):
        train(tmp_path / "run", "--samples", "1", "--sample-steps", "1001")
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint(train, tmp_path):
    run = train(tmp_path / "run", "--method", "adaptor", "--iterations", "1")
    content = (run / "checkpoint.pt").read_bytes()
    (run / "checkpoint.pt").write_bytes(content[:len(content) // 2])
    with pytest.raises(InputError, match="checkpoint.pt: damaged"):
        resume(run)


@pytest.mark.parametrize("flags, says", [
    (["--target", "nosuch"], "nosuch: neither a folder nor a built-in target"),
    (["--source", "nosuch"], "nosuch: no such file"),
    (["--classifier", "nosuch.pt"], "nosuch.pt: no such file"),
    (["--source-images", "nosuch"], "nosuch: neither a folder nor a built-in source"),
])
def test_inputs_that_do_not_exist(flags, says, train, tmp_path):
    with pytest.raises(InputError, match=says):
        train(tmp_path / "run", *flags)


def test_a_published_file_needs_an_arch(tiny, train, tmp_path):
    torch.save(load_file(tiny.source), tmp_path / "published.pt")
    with pytest.raises(InputError, match="published.pt: the file does not say which network it is for; add --arch"):
        train(tmp_path / "run", "--source", tmp_path / "published.pt")
    assert not (tmp_path / "run").exists()


def test_an_unknown_method(capsys):
    with pytest.raises(SystemExit):
        call(train_tan.main, "--method", "dreambooth")
    assert " invalid choice 'dreambooth'" in capsys.readouterr().err


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


def test_without_the_classifier_check_nothing_is_held_out(train, tmp_path):
    run = train(tmp_path / "run", "--method", "guided", "--iterations", "0", "--no-classifier-check")
    assert run_folder.load_classifier(run).description["held_out_accuracy"] is None


def test_resume_after_the_source_has_changed(tiny, train, tmp_path):
    source, run = shutil.copy(tiny.source, tmp_path / "source.safetensors"), tmp_path / "run"
    train(run, "--method", "adaptor", "--iterations", "1", "--source", source)
    save_network(source, tiny_network(seed=1))
    with pytest.raises(InputError):
        resume(run, "--iterations", "2")


# ---- flags that nothing else sets ------------------------------------------------------------------------------------

def test_warmup(train, tmp_path):
    run = train(tmp_path / "run", "--method", "adaptor", "--iterations", "3", "--warmup", "2", "--learning-rate", "0.1")
    assert [line["learning_rate"] for line in metrics(run)] == pytest.approx([0.05, 0.1, 0.1])


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

    monkeypatch.setattr(run_folder.Report, "draw", draw)
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
    first, second = (made["start"]().state_dict() for _ in range(2))  # the same new head each time
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_changes_that_keep_a_built_in_target(made, train, tmp_path):
    for flags, kinds in (([], ("flip", "shift", "colour")), (["--augment", "shift"], ("shift",))):
        with pytest.raises(Enough):
            train(tmp_path / "run", "--target", "sunglasses", "--overwrite", *flags)
        assert made["kinds"] == kinds and len(made["target"]) == 10


def test_a_finished_run_that_goes_on_is_not_finished(train, tmp_path, monkeypatch):
    run = train(tmp_path / "run", "--method", "adaptor", "--iterations", "1")

    def killed(*a):
        raise Enough
    monkeypatch.setattr(train_tan, "guided_loss", killed)
    with pytest.raises(Enough):
        resume(run, "--iterations", "2")
    assert not (run / "weights.safetensors").exists() and (run / "checkpoint.pt").exists()


def test_a_folder_that_holds_files_of_the_same_names(train, tmp_path):
    (tmp_path / "samples.png").write_text("mine")
    for more in ([], ["--overwrite"]):
        with pytest.raises(InputError, match="holds files with the names a run would write, but is not a run"):
            train(tmp_path, "--method", "adaptor", *more)
    assert (tmp_path / "samples.png").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1
