"""What a run of train_tan.py leaves on disk, and how it is read back.

options.json and weights.safetensors together are the adapted model: psi alone beside the source it belongs
to, or all weights after a method without adaptors.  checkpoint.pt holds the training state; the rest is for
people.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

import adaptor
from checkpoints.load import load_network, load_source, read_tensors
from checkpoints.network import Network, fingerprint, load_strictly, save_tensors
from plumbing import distributed
from plumbing.figures import save_curve
from plumbing.files import load_checkpoint, read_metrics, remove_unfinished, write_atomic
from plumbing.options import InputError, flag, flat, replace
from plumbing.pictures import read_array, save_grid, to_tensor, to_uint8
from plumbing.training import EMA

T = TypeVar("T")
FILES = ("options.json", "checkpoint.pt", "classifier.safetensors", "weights.safetensors", "metrics.jsonl",
         "targets.png", "samples.png", "progress.png", "loss.png", "score.json")
MAY_CHANGE = {"resume", "output_dir", "iterations", "device", "micro_batch_size", "checkpoint_blocks",
              "save_every"}


# ---- where a run begins, or goes on ------------------------------------------------------------------------

def resumed(out: Path, options: T, typed: frozenset[str]) -> T:
    """The options of the run in `out`, which hold when it is resumed.

    Raises InputError if there is no run, or if a flag that was typed contradicts it.
    """
    try:
        saved = json.loads((out / "options.json").read_text())
    except (OSError, ValueError):
        raise InputError(f"{out}: no run to resume (no options.json); leave out --resume to start "
                         "one") from None
    asked = flat(options)
    if not isinstance(saved, dict) or saved.keys() != asked.keys():
        raise InputError(f"{out}/options.json: from another version of this program; start anew with "
                         "--overwrite")
    for name in sorted(typed - MAY_CHANGE):
        if json.loads(json.dumps(asked[name])) != saved[name]:
            raise InputError(f"{flag(name)} {asked[name]}: the run in {out} has {saved[name]}; leave the "
                             f"flag out (--output-dir {out} --resume), or start another run with another "
                             "--output-dir")
    kept = {name: asked[name] for name in (typed & MAY_CHANGE) | {"device"}}
    saved = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
    return replace(options, **{**saved, **kept, "resume": True})


def identity(source: Network, targets: Tensor, compared: str | None) -> dict[str, str | None]:
    """What has to be the same when a run goes on: source, training pictures (K, 3, H, W) and `compared`.

    compared    which pictures the loss compares with each other, in words; None where it compares none
    """
    pictures = hashlib.sha256(targets.numpy().tobytes()).hexdigest()
    return dict(source=fingerprint(source), pictures=pictures, compared=compared)


def read_state(out: Path, options: dict[str, Any], belongs: dict[str, str | None]) -> dict[str, Any] | None:
    """The training state of the run in `out`, or None if it has saved none.

    Raises InputError if its `identity` is another one, or if more iterations are done than are wanted.
    """
    if not (out / "checkpoint.pt").exists():
        return None
    state = load_checkpoint(out / "checkpoint.pt")
    if state["source"] != belongs["source"]:
        raise InputError(f"{out}: belongs to another source than the present {options['source']}")
    if state["pictures"] != belongs["pictures"]:
        raise InputError(f"{options['target']}: the pictures have changed since the run in {out} began; "
                         "start anew with --overwrite or another --output-dir")
    if state.get("compared", belongs["compared"]) != belongs["compared"]:
        raise InputError(f"{out}: --method {options['method']} compares the pictures that go through the "
                         f"network together: the run began with {state['compared']}, now it would be "
                         f"{belongs['compared']}")
    if state["iteration"] > options["iterations"]:
        raise InputError(f"--iterations {options['iterations']}: the run in {out} has done "
                         f"{state['iteration']} already")
    return state


def open_run(out: Path, options: dict[str, Any], belongs: dict[str, str | None]) -> dict[str, Any] | None:
    """Make the folder, emptied of an earlier run unless this one resumes it, and write the (flat) options.

    Returns the training state from which a resumed run goes on, or None: it begins.  Raises InputError if
    the folder holds a run that --overwrite does not give up, and as `read_state` does.
    """
    state = read_state(out, options, belongs) if options["resume"] else None
    is_run = (out / "options.json").exists()
    if is_run and not options["resume"] and not options["overwrite"]:
        raise InputError(f"{out}: holds a run already; continue it with --resume, replace it with "
                         "--overwrite, or choose --output-dir")
    if not is_run and any((out / name).exists() for name in FILES):
        raise InputError(f"{out}: holds files with the names a run would write, but is not a run; choose "
                         "another --output-dir")
    distributed.barrier()
    if distributed.rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        remove_unfinished(out)
        if not options["resume"]:
            for name in FILES:
                (out / name).unlink(missing_ok=True)
            shutil.rmtree(out / "progress", ignore_errors=True)
        if state is None or state["iteration"] < options["iterations"]:
            # A finished run that goes on is not finished.
            (out / "weights.safetensors").unlink(missing_ok=True)
        text = json.dumps(dict(options, resume=False, overwrite=False), indent=1)
        write_atomic(out / "options.json", lambda temporary: temporary.write_text(text))
    distributed.barrier()
    return state


# ---- read back ---------------------------------------------------------------------------------------------

def load_run(folder: Path) -> tuple[Network, dict[str, Any]]:
    """A finished run's adapted model and its options.  InputError if a key or the source does not match."""
    folder = Path(folder)
    try:
        options = json.loads((folder / "options.json").read_text())
    except (OSError, ValueError):
        raise InputError(f"{folder}: not the folder of a run (no options.json)") from None
    path = folder / "weights.safetensors"
    if not path.exists():
        raise InputError(f"{folder}: this run is not finished; continue it with train_tan.py "
                         f"--output-dir {folder} --resume")
    tensors, description = read_tensors(path)
    network = load_source(options["source"], options["arch"])
    if description is None or description["source"] != fingerprint(network):
        raise InputError(f"{path}: made from another source than the present {options['source']}")
    if not any(".adaptor." in key for key in tensors):  # a method that changes theta itself
        load_strictly(network.model, tensors, path)
        return network, options
    adaptor.attach(network.model, options["adaptor_width"])
    try:
        adaptor.load_state_dict(network.model, tensors)
    except KeyError as error:
        raise InputError(f"{path}: {error.args[0]}") from None
    return network, options


def load_model(name: str, arch: str | None) -> tuple[Network, dict[str, Any] | None]:
    """The network of a run's folder, with the run's options, or of a source (`load_source`), with None.

    Raises InputError as these do, and for an `arch` beside a run.
    """
    if not (Path(name) / "options.json").exists():
        return load_source(name, arch), None
    if arch:
        raise InputError(f"--arch {arch}: a run has the network it was trained with; leave it out")
    return load_run(Path(name))


def load_classifier(folder: Path) -> Network:
    """The fine-tuned p_phi of a run with guidance."""
    path = Path(folder) / "classifier.safetensors"
    if not path.exists():
        raise InputError(f"{folder}: this run has no classifier; guidance needs a run with --method tan "
                         "or guided")
    return load_network(path)


# ---- what a run shows --------------------------------------------------------------------------------------

class Report:
    """The pictures of a run and its final weights; rank 0 writes, the others do nothing.

    options   flat, as options.json has them
    source    the network that is adapted
    theta     its fingerprint from before
    ema       averages of what learns; they are what the pictures and the weights show
    """

    def __init__(self, out: Path, options: dict[str, Any], source: Network, theta: str, targets: Tensor,
                 ema: EMA, device: torch.device):
        self.out, self.options, self.source, self.theta, self.ema = out, options, source, theta, ema
        self.device, self.shape = device, targets.shape[1:]
        previews = options["previews"]
        self.stages = {0} | {round(options["iterations"] * (i + 1) / previews) for i in range(previews)}
        if distributed.rank() == 0:
            save_grid(out / "targets.png", targets[:20], columns=min(10, len(targets)))

    def draw(self, network: Network, n: int, steps: int) -> Tensor:
        """Pictures (n, 3, H, W) of the seeds 0 to n - 1."""
        network.to(self.device).model.eval()
        bf16 = self.options["precision"] == "bf16" and self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            return network.sample(range(n), steps, batch_size=self.options["micro_batch_size"] or 64)

    def preview(self, done: int, saved: bool = False) -> None:
        """One more row of progress.png, if one is due after so many iterations: always the same noises."""
        folder = self.out / "progress"
        strip = folder / f"{done:06d}.png"
        due = done in self.stages and self.options["samples"] > 0 and not strip.exists()
        if distributed.rank() != 0 or not due:
            return
        self.ema.swap()
        drawn = self.draw(self.source, 8, min(25, self.options["sample_steps"]))
        self.ema.swap()
        folder.mkdir(exist_ok=True)
        pixels = torch.cat(list(to_uint8(drawn)), dim=1)                         # (8, H, W, 3) -> (H, 8W, 3)
        write_atomic(strip, lambda temporary: Image.fromarray(pixels.numpy()).save(temporary, "PNG"))
        strips = sorted(folder.glob("[0-9]*.png"))
        rows = [to_tensor(read_array(file)[None])[0].chunk(8, dim=2)             # 8 of (3, H, W) each
                for file in strips]
        save_grid(self.out / "progress.png", torch.cat([torch.stack(row) for row in rows]), columns=8,
                  labels=[f"{int(file.stem)}" for file in strips])

    def finish(self, loss: str) -> None:
        """weights.safetensors (of the running average), samples.png, and loss.png labelled with `loss`."""
        if distributed.rank() != 0:
            return
        self.ema.swap()
        weights = adaptor.state_dict(self.source.model) or self.source.model.state_dict()
        tensors = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
        description = dict(method=self.options["method"], source=self.theta)
        save_tensors(self.out / "weights.safetensors", tensors, description)
        if self.options["samples"]:
            self.pairs()
        self.ema.swap()
        values = [line["loss"] for line in read_metrics(self.out / "metrics.jsonl")]
        save_curve(self.out / "loss.png", values, f"loss ({loss})")
        drawn = "samples.png (same noise: source above, adapted below), progress.png, "
        if not self.options["samples"]:
            drawn = ""
        print(f"done: {self.out}/{drawn}loss.png; more with: python sample.py {self.out} -n 64")

    def pairs(self) -> None:
        """samples.png: pairs of rows, source pictures above, the adapted ones from the same noise below."""
        n, steps = self.options["samples"], self.options["sample_steps"]
        columns = min(16, n)
        adapted = self.draw(self.source, n, steps)
        source = self.draw(load_source(self.options["source"], self.options["arch"]), n, steps)
        blank = torch.ones(-n % columns, *self.shape)  # both rows of the last pair are full
        above, below = (torch.cat([images, blank]).split(columns) for images in (source, adapted))
        rows = [row for pair in zip(above, below) for row in pair]
        save_grid(self.out / "samples.png", torch.cat(rows), columns, gap_after=2)
