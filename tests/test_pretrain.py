"""pretrain.py: what it refuses, and that an old run never comes back in place of a new one."""

import pytest
import torch
from conftest import call

import pretrain
from checkpoints.load import read_tensors
from plumbing.options import InputError

TINY = "--size 16 --channels 16 --channel-mult 1 2 --attention 2 --head-channels 16 --images 16 --batch-size 4 --device cpu".split()


def weights(run):
    return read_tensors(run / "model.safetensors")[0]


def test_overwrite_leaves_nothing_of_the_old_run(tmp_path, monkeypatch):
    run = tmp_path / "run"
    call(pretrain.main, "toyfaces", *TINY, "--iterations", 1, "--output-dir", run)
    old = weights(run)
    (run / "checkpoint.pt").unlink()
    with pytest.raises(InputError, match="holds a run already"):  # a model without a checkpoint is one, too
        call(pretrain.main, "toyfaces", *TINY, "--iterations", 1, "--output-dir", run)
    assert all(torch.equal(value, old[key]) for key, value in weights(run).items())
    call(pretrain.main, "toyfaces", *TINY, "--iterations", 1, "--output-dir", run, "--overwrite")

    def killed(*a):
        raise RuntimeError("killed")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(pretrain, "predict_eps", killed)
        call(pretrain.main, "toyfaces", *TINY, "--iterations", 1, "--seed", 7, "--output-dir", run, "--overwrite")
    with pytest.raises(InputError, match="no checkpoint to resume from"):
        call(pretrain.main, "toyfaces", *TINY, "--iterations", 1, "--seed", 7, "--output-dir", run, "--resume")
    assert not (run / "model.safetensors").exists()


@pytest.mark.parametrize("flags, says", [
    (["--seed", 1], "--seed 1: the run in .* has 0; --resume takes the same flags"),
    (["--channels", 32], "--channels 32: the run in .* has 16"),
    (["--channel-mult", 1, 1], r"--channel-mult \(1, 1\): the run in .* has \(1, 2\)"),
])
def test_resume_takes_the_same_flags(tmp_path, flags, says):
    call(pretrain.main, "toyfaces", *TINY, "--iterations", 1, "--output-dir", tmp_path)
    with pytest.raises(InputError, match=says):
        call(pretrain.main, "toyfaces", *TINY, "--iterations", 1, "--output-dir", tmp_path, "--resume", *flags)
    with pytest.raises(InputError, match="toychurches: the run in .* has toyfaces"):
        call(pretrain.main, "toychurches", *TINY, "--iterations", 1, "--output-dir", tmp_path, "--resume")
    call(pretrain.main, "toyfaces", *TINY, "--iterations", 2, "--learning-rate", 1e-4, "--output-dir", tmp_path, "--resume")
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("flags, says", [
    (["--learning-rate", "nan"], "--learning-rate nan: must be a positive number"),
    (["--norm-groups", 0], "--norm-groups 0: must be at least 1"),
    (["--head-channels", 64], "not a multiple of the 64 of a head"),
    (["--network", "judge", "--images", 2], "--images 2: must be at least 6"),
    (["--network", "classifier", "--flip"], "--flip: a mirrored picture has other attributes"),
])
def test_wrong_flags(tmp_path, flags, says):
    with pytest.raises(InputError, match=says):
        call(pretrain.main, "toyfaces", *TINY, *flags, "--output-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()
