"""What a run of train_tan.py leaves on disk, and how it is read back.

options.json and weights.safetensors together are the adapted model: psi alone beside the source it belongs to, or all
weights after `finetune` or `pa`.  checkpoint.pt holds the training state; the rest is for people.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import torch
from PIL import Image

import adaptor
from checkpoints.load import load_network, load_source, read_tensors
from checkpoints.network import Network, fingerprint, load_strictly, save_tensors
from plumbing import distributed
from plumbing.figures import save_curve
from plumbing.files import read_metrics, write_atomic
from plumbing.options import InputError
from plumbing.pictures import read_array, save_grid, to_tensor, to_uint8
from plumbing.training import EMA

FILES = ("options.json", "checkpoint.pt", "classifier.safetensors", "weights.safetensors", "metrics.jsonl", "targets.png", "samples.png",
         "progress.png", "loss.png", "score.json")
ALL_WEIGHTS = ("finetune", "pa")  # methods that change theta itself; the others train psi beside it
LOSSES = {"tan": "loss (Eq. 9)", "guided": "loss (Eq. 6)", "adaptor": "loss (Eq. 1)", "finetune": "loss (Eq. 1)", "pa": "loss (Eq. 1 and pairwise)"}
MAY_CHANGE = {"resume", "output_dir", "iterations", "device", "micro_batch_size", "checkpoint_blocks", "save_every"}


def resumed(out: Path, options, given: frozenset[str]):
    """The options of the run in `out`, which hold when it is resumed.

    Raises InputError if there is no run, or if a flag that was typed contradicts it.
    """
    try:
        saved = json.loads((out / "options.json").read_text())
    except (OSError, ValueError):
        raise InputError(f"{out}: no run to resume (no options.json); leave out --resume to start one") from None
    if not isinstance(saved, dict) or saved.keys() != dataclasses.asdict(options).keys():
        raise InputError(f"{out}/options.json: from another version of this program; start anew with --overwrite")
    may_change = MAY_CHANGE - ({"micro_batch_size"} if saved["method"] == "pa" else set())  # its loss compares within a micro-batch
    for name in sorted(given - may_change):
        if json.loads(json.dumps(getattr(options, name))) != saved[name]:
            raise InputError(f"--{name.replace('_', '-')} {getattr(options, name)}: the run in {out} has {saved[name]}; "
                             f"leave the flag out (--output-dir {out} --resume), or start another run with another --output-dir")
    kept = {name: getattr(options, name) for name in (given & may_change) | {"device"}}
    return dataclasses.replace(options, **{**saved, **kept, "resume": True})


def open_run(out: Path, options, done: int) -> None:
    """Make the folder, emptied of an earlier run unless this one resumes it after `done` iterations, and write options.json.

    Raises InputError if it holds a run that --overwrite does not give up.
    """
    if not options.resume and (out / "options.json").exists() and not options.overwrite:
        raise InputError(f"{out}: holds a run already; continue it with --resume, replace it with --overwrite, or choose --output-dir")
    if not (out / "options.json").exists() and any((out / name).exists() for name in FILES):
        raise InputError(f"{out}: holds files with the names a run would write, but is not a run; choose another --output-dir")
    distributed.barrier()
    if distributed.rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        if not options.resume:
            for name in FILES:
                (out / name).unlink(missing_ok=True)
            shutil.rmtree(out / "progress", ignore_errors=True)
        if done < options.iterations:
            (out / "weights.safetensors").unlink(missing_ok=True)  # a finished run that goes on is not finished until it ends
        text = json.dumps(dict(dataclasses.asdict(options), resume=False, overwrite=False), indent=1)
        write_atomic(out / "options.json", lambda temporary: temporary.write_text(text))
    distributed.barrier()


def load_run(folder: Path) -> tuple[Network, dict]:
    """The adapted model of a finished run and the run's options.  Raises InputError if a key or the source does not match."""
    folder = Path(folder)
    try:
        options = json.loads((folder / "options.json").read_text())
    except (OSError, ValueError):
        raise InputError(f"{folder}: not the folder of a run (no options.json)") from None
    if not (folder / "weights.safetensors").exists():
        raise InputError(f"{folder}: this run is not finished; continue it with train_tan.py --output-dir {folder} --resume")
    tensors, description = read_tensors(folder / "weights.safetensors")
    network = load_source(options["source"], options["arch"])
    if description is None or description["source"] != fingerprint(network):
        raise InputError(f"{folder}/weights.safetensors: made from another source than the present {options['source']}")
    if options["method"] in ALL_WEIGHTS:
        load_strictly(network.model, tensors, folder / "weights.safetensors")
        return network, options
    adaptor.attach(network.model, options["adaptor_width"])
    try:
        adaptor.load_state_dict(network.model, tensors)
    except KeyError as error:
        raise InputError(f"{folder}/weights.safetensors: {error.args[0]}") from None
    return network, options


def load_model(name: str, arch: str | None) -> tuple[Network, dict | None]:
    """The network of what a user names: of a run's folder, with the run's options, or of a source (checkpoints.load_source), with None.

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
        raise InputError(f"{folder}: this run has no classifier; guidance needs a run with --method tan or guided")
    return load_network(path)


class Report:
    """The pictures of a run and its final weights; rank 0 writes, the others do nothing."""

    def __init__(self, out: Path, options, source: Network, theta: str, targets: torch.Tensor, ema: EMA, device: torch.device):
        self.out, self.options, self.source, self.theta, self.ema, self.device = out, options, source, theta, ema, device
        self.shape = targets.shape[1:]  # of a picture
        if distributed.rank() == 0:
            save_grid(out / "targets.png", targets[:20], columns=min(10, len(targets)))

    def draw(self, seeds, steps: int, network: Network) -> torch.Tensor:
        network.to(self.device).model.eval()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bf16" and self.device.type == "cuda"):
            return network.sample(seeds, steps, batch_size=self.options.micro_batch_size or 64)

    def preview(self, iteration: int) -> None:
        """One more row of progress.png: the same noises at this iteration."""
        if distributed.rank() != 0 or self.options.samples == 0:
            return
        self.ema.swap()
        row = self.draw(range(8), min(25, self.options.sample_steps), self.source)
        self.ema.swap()
        folder = self.out / "progress"
        folder.mkdir(exist_ok=True)
        strip = torch.cat(list(to_uint8(row)), dim=1)                       # (8, H, W, 3) -> (H, 8W, 3)
        write_atomic(folder / f"{iteration:06d}.png", lambda temporary: Image.fromarray(strip.numpy()).save(temporary, "PNG"))
        files = sorted(folder.glob("*.png"))
        rows = [to_tensor(read_array(file)[None])[0] for file in files]  # (3, H, 8W) each
        images = torch.cat([torch.stack(row.chunk(8, dim=2)) for row in rows])
        save_grid(self.out / "progress.png", images, columns=8, labels=[f"{int(file.stem)}" for file in files])

    def finish(self) -> None:
        """weights.safetensors (of the running average), samples.png and loss.png."""
        if distributed.rank() != 0:
            return
        options, model = self.options, self.source.model
        self.ema.swap()
        tensors = model.state_dict() if options.method in ALL_WEIGHTS else adaptor.state_dict(model)
        tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        save_tensors(self.out / "weights.safetensors", tensors, dict(method=options.method, source=self.theta))
        if options.samples:
            seeds, columns = range(options.samples), min(16, options.samples)
            adapted = self.draw(seeds, options.sample_steps, self.source)
            source = self.draw(seeds, options.sample_steps, load_source(options.source, options.arch))
            blank = torch.ones(-options.samples % columns, *self.shape)  # both rows of the last pair are full
            pairs = [torch.cat(rows) for rows in zip(*(torch.cat([images, blank]).split(columns) for images in (source, adapted)))]
            save_grid(self.out / "samples.png", torch.cat(pairs), columns, gap_after=2)
        self.ema.swap()
        save_curve(self.out / "loss.png", [line["loss"] for line in read_metrics(self.out / "metrics.jsonl")], LOSSES[options.method])
        pictures = "samples.png (same noise: source above, adapted below), progress.png, " if options.samples else ""
        print(f"done: {self.out}/{pictures}loss.png; more with: python sample.py {self.out} -n 64")
