"""However it dies: full disks, closed pipes, signals, moved files; one line each, and nothing that was there is lost."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, call, tiny_network
from PIL import Image

import sample
import train_tan
from checkpoints import export
from checkpoints.load import title_of
from checkpoints.network import save_network
from checkpoints.run_folder import load_run
from checkpoints.weights_file import read_tensors
from plumbing import distributed
from plumbing.files import load_checkpoint
from plumbing.options import InputError, run
from plumbing.pictures import read_pixels
from plumbing.training import StopSignal

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def program(*words, **more):
    """A program as a user runs it."""
    return subprocess.run([sys.executable, *map(str, words)], **dict(dict(env=ENVIRONMENT, capture_output=True, text=True),
                                                                     **more))


# ---- full disks --------------------------------------------------------------------------------------------

WRITERS = """
import os, resource, sys, torch
from pathlib import Path
from PIL import Image
from safetensors.torch import save_file
from plumbing.files import add_metrics, save_checkpoint, write_atomic
from plumbing.options import run
folder = Path(sys.argv[1])
tensor = torch.zeros(100_000)
def text(path): write_atomic(path, lambda t: t.write_text("x" * 100_000))
def weights(path): write_atomic(path, lambda t: save_file({"a": tensor}, t))
def state(path): save_checkpoint(path, {"a": tensor})
def picture(path): write_atomic(path, lambda t: Image.frombytes("RGB", (200, 200), bytes(range(240)) * 500).save(t, "PNG", compress_level=0))
def metrics(path): [add_metrics(path, iteration=i, loss="x" * 100) for i in range(1000)]
def main():
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    globals()[kind](folder / kind)
for kind in sys.argv[2:]:
    if not os.fork():
        run(main)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path):
    kinds = ["text", "weights", "state", "picture", "metrics"]
    for kind in kinds:
        (tmp_path / kind).write_text("before\n")
    done = program("-c", WRITERS, tmp_path, *kinds)
    assert done.stdout.split() == ["2"] * len(kinds), done.stderr
    for line, kind in zip(done.stderr.splitlines(), kinds, strict=True):
        assert line.startswith(f"error: {tmp_path}/{kind}: ")
        left = (tmp_path / kind).read_text()
        assert left.startswith("before\n") if kind == "metrics" else left == "before\n"  # metrics are added to
    assert len(list(tmp_path.iterdir())) == len(kinds)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: ..."),
                                   torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), RuntimeError("std::bad_alloc")])
def test_out_of_memory_names_the_flags(error, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit) as stopped:
        run(main)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and len(said.splitlines()) == 1
    assert all(flag in said for flag in ("--micro-batch-size", "--checkpoint-blocks", "--precision"))


@pytest.mark.parametrize("read, name, fails", [
    (load_checkpoint, "torch.load", RuntimeError("DefaultCPUAllocator: can't allocate memory: ...")), (load_checkpoint, "torch.load", MemoryError()),
    (read_tensors, "torch.load", RuntimeError("DefaultCPUAllocator: can't allocate memory: ...")), (lambda path: read_pixels(path, 8), "PIL.ImageOps.fit", MemoryError())])
def test_a_file_is_not_damaged_because_memory_ran_out(read, name, fails, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise fails

    file = tmp_path / "file"
    Image.new("RGB", (8, 8)).save(file, "PNG") if "PIL" in name else torch.save({"iteration": 1, "a": torch.ones(1)}, file)
    read(file)
    monkeypatch.setattr(name, fail)
    with pytest.raises(type(fails)):
        read(file)


# ---- pipes -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_ends_quietly_and_what_was_asked_for_is_there(tiny, tmp_path, unbuffered):
    out = tmp_path / "out.safetensors"
    command = f"{sys.executable} -m checkpoints {tiny.source} --convert {out} | true; echo ${{PIPESTATUS[0]}}"
    environment = dict(ENVIRONMENT, PYTHONUNBUFFERED=unbuffered)
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.strip() in ("141", "0") and out.exists()


# ---- signals -----------------------------------------------------------------------------------------------

def test_a_second_sigterm_is_not_a_second_ctrl_c(monkeypatch):
    with StopSignal() as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):  # within a second: passed on by torchrun
            os.kill(os.getpid(), number)
        assert stop.received
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 5)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


@pytest.mark.parametrize("there, says", [
    (dict(LOCAL_RANK="0"), None), (dict(RANK="3"), None), (dict(LOCAL_RANK="1", WORLD_SIZE="1"), None),
    (dict(WORLD_SIZE="4", RANK="0"), "WORLD_SIZE is 4, but LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set: start with torchr")])
def test_what_a_launcher_left_in_the_environment(monkeypatch, there, says):
    for name in distributed.TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in there.items():
        monkeypatch.setenv(name, value)
    if says:
        with pytest.raises(InputError, match=says):
            distributed.setup("cpu")
    else:
        assert distributed.setup("cpu") == torch.device("cpu") and distributed.world() == 1


# ---- what has moved ----------------------------------------------------------------------------------------

@pytest.fixture
def moved(train, tiny, tmp_path):
    """A finished run whose source and target are not where they were."""
    source, target = tmp_path / "source.safetensors", tmp_path / "photos"
    source.write_bytes(tiny.source.read_bytes())
    target.mkdir()
    for file in tiny.targets.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    train(tmp_path / "run", "--method", "adaptor", "--source", source, "--target", target)
    (tmp_path / "new").mkdir()
    return tmp_path / "run", source.rename(tmp_path / "new" / "s.safetensors"), target.rename(tmp_path / "new" / "t")


def test_a_moved_source_and_target(moved, tmp_path):
    folder, source, target = moved
    with pytest.raises(InputError, match="run: the source of this run cannot be found; give it with --source"):
        load_run(folder)
    call(sample.main, folder, "--source", source, "-n", 2, "--steps", 2)
    call(export.main, folder, tmp_path / "exported", "--source", source)
    call(train_tan.main, "--output-dir", folder, "--resume", "--source", source, "--target", target, "--iterations", 7)
    assert json.loads((folder / "options.json").read_text())["source"] == str(source)
    save_network(tmp_path / "other.safetensors", tiny_network(seed=5))
    for main, words in ((sample.main, [folder]), (train_tan.main, ["--output-dir", folder, "--resume", "--iterations", 8])):
        with pytest.raises(InputError, match="another source than the present .*other.safetensors"):
            call(main, *words, "--source", tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="--source .*: .*is not a run; leave it out"):
        call(sample.main, source, "--source", source)


@pytest.mark.parametrize("name, title", [
    ("ffhq/model.ckpt", "ffhq"), ("runs/a/model.safetensors", "a"), ("ffhq_p2.pt", "ffhq_p2"), ("google/ddpm-church-256", "ddpm-church-256"),
    ("google/ddpm-church-256@main", "ddpm-church-256"), ("a/unet/diffusion_pytorch_model.safetensors", "a"),
    ("toyfaces", "toyfaces"), ("model.pt", "model"), ("x/v1.5", "v1.5")])
def test_titles(name, title):
    assert title_of(name) == title


def test_names_that_are_no_utf8(train, tiny, tmp_path):
    target = os.fsdecode(os.fsencode(tmp_path) + b"/fotos_\xe9t\xe9")
    os.mkdir(target)
    for file in tiny.targets.iterdir():
        with open(os.path.join(target, file.name), "wb") as copy:
            copy.write(file.read_bytes())
    words = [*tiny.flags("adaptor"), "--method", "adaptor", "--iterations", 1, "--target", target]
    done = program(ROOT / "train_tan.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert r"fotos_\udce9t\udce9" in done.stdout and (tmp_path / "runs" / "fotos_\ufffdt\ufffd-source-adaptor").is_dir()
    done = program(ROOT / "train_tan.py", *words, "--output-dir", target, cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match=r"--device cuda:3: this machine has 1 GPU\(s\), of which the first is cuda:0"):
        distributed.setup("cuda:3")
