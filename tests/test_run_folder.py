"""run_folder.py: a finished run is read back strictly, beside the source it was made from."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import call, tiny_network
from test_checkpoints import PSI, T, X, rewrite

import train_tan
from checkpoints import run_folder
from checkpoints.__main__ import main
from checkpoints.load import load_source
from checkpoints.network import save_network, save_tensors
from checkpoints.weights_file import read_tensors
from plumbing.options import InputError
from settings import Options


@pytest.fixture
def run(finished, tiny, tmp_path):
    """A copy of a finished run, with a source of its own to change."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    source = shutil.copy(tiny.source, tmp_path / "source.safetensors")
    options = json.loads((folder / "options.json").read_text())
    (folder / "options.json").write_text(json.dumps(dict(options, source=str(source))))
    return folder


def test_load_run(run, tiny):
    network, options = run_folder.load_run(run)
    source = load_source(str(tiny.source))
    assert options["method"] == "tan" and not network.model(X, T).equal(source.model(X, T))
    assert run_folder.load_classifier(run).model(X, T).shape == (2, 2)


def test_weights_cut_short(run):
    content = (run / "weights.safetensors").read_bytes()
    (run / "weights.safetensors").write_bytes(content[:1000])
    with pytest.raises(InputError, match="weights.safetensors: .*, or have it written anew with --output-dir .*run --resume"):
        run_folder.load_run(run)
    call(train_tan.main, "--output-dir", run, "--resume", "--device", "cpu")
    assert (run / "weights.safetensors").read_bytes() == content


@pytest.mark.parametrize("form", ["nosuch", [], {}])
def test_a_form_of_adaptors_that_there_is_not(run, form):
    options = json.loads((run / "options.json").read_text())
    (run / "options.json").write_text(json.dumps(dict(options, adaptor=form)))
    with pytest.raises(InputError, match="options.json: not the options of a run, or damaged"):
        run_folder.load_run(run)


def test_a_run_is_described(run, capsys):
    call(main, run)
    said = capsys.readouterr().out
    assert "to " in said and ", tan, 6 iterations, seed 0" in said and "stages      0, 6" in said and "omega 0.1" in said


def test_a_run_from_before_there_were_forms_of_adaptors(run):
    options = json.loads((run / "options.json").read_text())
    assert options.pop("adaptor") == "bottleneck"
    (run / "options.json").write_text(json.dumps(options))
    assert not run_folder.load_run(run)[0].model(X, T).equal(load_source(options["source"]).model(X, T))


def test_another_source_under_the_same_name(run):
    save_network(run.parent / "source.safetensors", tiny_network(seed=1))
    says = "weights.safetensors: made from another source than the present .*source.safetensors"
    with pytest.raises(InputError, match=says):
        run_folder.load_run(run)


@pytest.mark.parametrize("change, says", [
    (lambda network: network.description["schedule"].update(prediction="v"), "prediction v instead of eps"),
    (lambda network: network.description["schedule"].update(name="cosine"), "schedule .'cosine', 1000. instead of .'linear', 1000, .*"),
    (lambda network: network.description["config"].update(norm_groups=4), "norms .*4, 1e-05.* instead of .*8, 1e-05.*"),
    (lambda network: network.description["config"].update(flip_sin_to_cos=False), "sinusoids .False, 0. instead of .True, 0.")])
def test_the_same_weights_read_otherwise(change, says, run):
    """Weights alone do not make a source: what they mean stands in its description."""
    network = load_source(str(run.parent / "source.safetensors"))
    change(network)
    save_network(run.parent / "source.safetensors", network)
    says = f"another source than the present .*source.safetensors \\({says}\\)"
    with pytest.raises(InputError, match=says):
        run_folder.load_run(run)
    with pytest.raises(InputError, match=says):
        call(train_tan.main, "--output-dir", run, "--resume", "--iterations", 9)
    tensors, description = read_tensors(run / "weights.safetensors")
    del description["reading"]  # as of an older run, of which this is not known
    save_tensors(run / "weights.safetensors", tensors, {"description": json.dumps(description)})
    run_folder.load_run(run)


@pytest.mark.parametrize("change, says", [
    (lambda t: t.pop(PSI), f"missing key {PSI}"),
    (lambda t: t.update(extra=torch.ones(1)), "unexpected key extra"),
    (lambda t: t.update({PSI: t[PSI][:1]}), f"{PSI} has shape .*expected"),
])
def test_keys_of_a_run(run, change, says):
    rewrite(run / "weights.safetensors", run / "weights.safetensors", change)
    with pytest.raises(InputError, match=f"weights.safetensors: adaptor weights: {says}"):
        run_folder.load_run(run)


def test_stages(run, tiny):
    """Those of `finished` are its start, which is the source, and its end."""
    (start, _), (end, _), (whole, _) = (run_folder.load_run(run, at) for at in (0, 6, None))
    assert start.model(X, T).equal(load_source(str(tiny.source)).model(X, T))
    assert end.model(X, T).equal(whole.model(X, T)) and not end.model(X, T).equal(start.model(X, T))
    empty = dict(nearest=None, held_out_loss=None, training_loss=None)  # --samples 0, no --hold-out
    assert run_folder.stages(run) == [dict(iteration=i, **empty) for i in (0, 6)]
    (run / "weights.safetensors").unlink()  # stages of a run that is not finished
    assert run_folder.load_run(run, 6)[0].model(X, T).equal(whole.model(X, T))
    with pytest.raises(InputError, match="--at 5: no such stage; .*run has 0, 6$"):
        run_folder.load_run(run, 5)
    shutil.rmtree(run / "stages")
    with pytest.raises(InputError, match="--at 6: no such stage; .*run has none"):
        run_folder.load_run(run, 6)


def test_the_best_stage():
    def records(*losses):
        return [dict(iteration=10 * i, held_out_loss=loss) for i, loss in enumerate(losses)]

    assert run_folder.best_stage(records(0.9, 0.3, 0.2, 0.4)) == 20
    assert run_folder.best_stage(records(None, None)) is run_folder.best_stage([]) is None


def test_unfinished_and_absent_runs(run, tmp_path):
    (run / "weights.safetensors").unlink()
    says = "this run is not finished; continue it with --output-dir .* --resume"
    with pytest.raises(InputError, match=says):
        run_folder.load_run(run)
    (run / "classifier.safetensors").unlink()
    with pytest.raises(InputError, match="this run has no classifier"):
        run_folder.load_classifier(run)
    with pytest.raises(InputError, match="not the folder of a run"):
        run_folder.load_run(tmp_path)


def test_the_weights_of_a_run_are_no_network(run):
    with pytest.raises(InputError, match="weights.safetensors: the weights of a run, not a whole network"):
        load_source(str(run / "weights.safetensors"))


def test_a_run_goes_on_on_the_device_that_is_there(finished, tmp_path):
    options = json.loads((finished / "options.json").read_text())
    (tmp_path / "options.json").write_text(json.dumps(dict(options, device="cuda")))
    assert run_folder.resumed(tmp_path, Options(), frozenset()).device == "auto"


def test_killed_while_an_old_run_is_removed(run, monkeypatch):
    """Whatever is left of it can still be replaced."""
    (run / "stages").mkdir(exist_ok=True)
    options = dict(run_folder.read_options(run), resume=False, overwrite=True)
    removed, unlink, rmtree = [], Path.unlink, shutil.rmtree

    def killed_after_one(remove):
        def called(path, **more):
            if Path(path).exists():
                if removed:
                    raise KeyboardInterrupt
                removed.append(path)
            remove(path, **more)
        return called

    for times in range(100):
        removed.clear()
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(Path, "unlink", killed_after_one(unlink))
            patch.setattr(shutil, "rmtree", killed_after_one(rmtree))
            run_folder.open_run(run, options, {})
            break
    assert times > 5 and [path.name for path in run.iterdir()] == ["options.json"]
