"""Files of weights as they lie around: known by their first bytes, averaged weights first, nothing in them run."""

import argparse
import collections
import pathlib
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from checkpoints.weights_file import read_tensors
from plumbing.options import InputError

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}
OTHER = {key: value + 10 for key, value in WEIGHTS.items()}


def same(found):
    assert found.keys() == WEIGHTS.keys() and all(found[key].equal(WEIGHTS[key]) for key in WEIGHTS)


def put_before(start, weights=WEIGHTS):
    return {start + key: value for key, value in weights.items()}


# ---- names and entries -------------------------------------------------------------------------------------

@pytest.mark.parametrize("content", [
    put_before("module."), put_before("_orig_mod."), put_before("module._orig_mod."), put_before("_orig_mod.module."),
    put_before("module.") | {"n_averaged": torch.tensor(3)},
    put_before("ema_model.") | put_before("online_model.", OTHER) | {"initted": torch.tensor(True)},
    {"model": OTHER, "ema": WEIGHTS, "opt": {"state": {}}}, {"ema_model": WEIGHTS}, {"model_state_dict": WEIGHTS},
    {"model": OTHER, "model_ema": put_before("module."), "step": 3}, {"net": WEIGHTS, "epoch": 7},
    {"model": WEIGHTS, "ema": {"decay": 0.99, "shadow_params": [torch.ones(2)]}},
    {"weird": WEIGHTS, "optimizer": {"state": {0: {"step": torch.ones(1), "exp_avg": torch.ones(1)}}}},
    {"models": {"unet": OTHER, "ema": WEIGHTS}}, {"state_dict": WEIGHTS, "optimizer_states": [{"m": torch.ones(1)}]},
    [put_before("module.", OTHER), {"state": {}, "param_groups": []}, 3, 500, put_before("module.")], [WEIGHTS, {}, 3],
    dict(WEIGHTS, step=3, note="fine"),
])
def test_entries_and_wrappers(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    same(read_tensors(tmp_path / "a.pt")[0])


def test_what_was_taken_is_said(tmp_path, capsys):
    torch.save({"model": OTHER, "ema": dict(WEIGHTS, decay=0.9)}, tmp_path / "a.pt")
    for _ in range(2):
        read_tensors(tmp_path / "a.pt")
    assert capsys.readouterr().out == (f"{tmp_path}/a.pt: a training state, of which the averaged weights are taken, entry "
                                       f"'ema'\n{tmp_path}/a.pt: leaving out decay, no tensors\n")


@pytest.mark.parametrize("content, says", [
    ({"first": WEIGHTS, "second": WEIGHTS}, "holds several sets of weights, first, second; save one of them alone"),
    ({"state": {}, "param_groups": [{"lr": 1.0}]}, "the state of an optimiser, without weights; give the file of weights"),
    ({"parameters": [], "optimizer": {}, "iteration": 3, "ema": {}}, "the training state of a run; give its folder, "),
    ({"step": 3}, "holds something else than a flat dict of tensors")])
def test_what_holds_no_weights(tmp_path, content, says):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(InputError, match=f"a.pt: {says}"):
        read_tensors(tmp_path / "a.pt")


# ---- classes beside the weights ----------------------------------------------------------------------------

class Settings(dict):
    """Filled as a dict is, like Lightning's AttributeDict."""


class Shouts:
    made = []

    def __init__(self, *arguments):
        self.made.append(arguments)

    def __setstate__(self, state):
        self.made.append(state)


class Module(torch.nn.Module):
    """As people save it whole."""


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("beside", [
    argparse.Namespace(lr=1e-4, path=pathlib.PurePosixPath("a")), np.float64(0.5), np.int64(3), np.dtype("float32"),
    Settings(a=1, b=Settings(c=2)), Shouts(1, 2), types.SimpleNamespace(x=1), pathlib.PosixPath("runs/a"),
    collections.defaultdict(list, a=[1]), collections.deque([1]), {"score": np.float32(1)}])
def test_classes_become_inert(tmp_path, beside, zipped):
    Shouts.made.clear()
    torch.save({"state_dict": WEIGHTS, "more": beside, "again": [beside]}, tmp_path / "a.ckpt",
               _use_new_zipfile_serialization=zipped)
    same(read_tensors(tmp_path / "a.ckpt")[0])
    assert not Shouts.made


def test_a_class_is_not_imported(tmp_path):
    module = types.ModuleType("somewhere_else")
    module.Config = type("Config", (), {"__module__": module.__name__})
    sys.modules["somewhere_else"] = module
    torch.save({"ema": WEIGHTS, "config": module.Config()}, tmp_path / "a.pt")
    del sys.modules["somewhere_else"]
    same(read_tensors(tmp_path / "a.pt")[0])
    assert not any(name.startswith("somewhere") for name in sys.modules)


def test_a_whole_module_is_named(tmp_path):
    torch.save(Module(), tmp_path / "a.pt")
    with pytest.raises(InputError, match="a pickled object of class test_weights_file.Module, whose code is not run; save"):
        read_tensors(tmp_path / "a.pt")


# ---- first bytes -------------------------------------------------------------------------------------------

def zipped(**files):
    def write(path):
        with zipfile.ZipFile(path, "w") as archive:
            for name, text in files.items():
                archive.writestr(name.replace("_", "."), text)
    return write


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "a.ckpt", "3fe1c0ffee"])
@pytest.mark.parametrize("write", [lambda path: save_file(WEIGHTS, path), lambda path: torch.save(WEIGHTS, path), lambda path:
                                   torch.save(WEIGHTS, path, _use_new_zipfile_serialization=False)])
def test_any_name(tmp_path, name, write, recwarn):
    write(tmp_path / name)
    same(read_tensors(tmp_path / name)[0])
    assert not len(recwarn)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 374278021\n"


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a"])
@pytest.mark.parametrize("content, says", [
    (b"", "it is empty; download it again"), (b"\0" * 3000, "begins with zeros: a download that was broken off"),
    (POINTER, "it is a Git LFS pointer to a file of 374 MB; run git lfs pull"),
    (b"<!DOCTYPE html><html>Too many requests", "it is a web page"), (b"\n <html>", "it is a web page"),
    (b"\x89PNG\r\n", "it is a picture"), (b"\x1f\x8b\x08", "it is a gzip archive; unpack it"), (b"GGUF...", "a GGUF file"),
    (b'{"error": "Entry not found"}', "it is a text file of JSON"), (b"Not Found", "begins as neither safetensors nor"),
    (zipped(data_txt="x"), "it is a .zip archive; unpack it$"),
    (zipped(model_ckpt="x"), "it is a .zip archive; unpack it and give its model.ckpt"),
    (save(WEIGHTS)[:-1], "it has [0-9]+ bytes where safetensors announces [0-9]+; download it again"),
    (save(WEIGHTS)[:40], "the header of safetensors is damaged"),
    (lambda path: torch.jit.script(torch.nn.Linear(2, 2)).save(str(path)), "it is a TorchScript archive"),
])
def test_what_it_is_instead(tmp_path, name, content, says, recwarn):
    content(tmp_path / name) if callable(content) else (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: not a file of weights that can be read safely: .*{says}"):
        read_tensors(tmp_path / name)
    assert not [w for w in recwarn if w.category is UserWarning]


def test_a_broken_off_download(tmp_path):
    torch.save(WEIGHTS, tmp_path / "whole.pt")
    (tmp_path / "a.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:-200])
    with pytest.raises(InputError, match="its end is missing: a download broken off after"):
        read_tensors(tmp_path / "a.pt")
    (tmp_path / "b.pt").symlink_to(tmp_path / "gone.pt")
    with pytest.raises(InputError, match="b.pt: a link to what is not there"):
        read_tensors(tmp_path / "b.pt")


@pytest.mark.parametrize("metadata", [{"description": "a fine model"}, {"description": "[1]"}, {"description": '{"by": "me"}'},
                                      {"format": "pt"}, None])
def test_somebody_elses_description(tmp_path, metadata):
    save_file(WEIGHTS, tmp_path / "a.safetensors", metadata)
    tensors, own = read_tensors(tmp_path / "a.safetensors")
    same(tensors)
    assert own is None
