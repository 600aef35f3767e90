"""Draw pictures from an adapted model, or from a source alone.

  python sample.py runs/sunglasses -n 64           64 pictures in runs/sunglasses/drawn/, and a grid
  python sample.py runs/sunglasses --at 96         of an earlier stage, in runs/sunglasses/drawn-000096/
  python sample.py toyfaces -n 64                  a built-in source
  python sample.py ffhq_p2.pt -n 8                 a published source
  python sample.py runs/sunglasses-cdc             a GAN of baselines/
  torchrun --nproc_per_node=8 sample.py runs/sunglasses -n 1000

A picture is named by its seed, and comes from that alone: the same noise through source and adapted model
gives a pair, and the number of processes and the batch size change nothing.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Annotated

import torch

from checkpoints import run_folder
from checkpoints.gan import GAN
from checkpoints.load import title_of
from classifier import TARGET, log_prob_gradient
from plumbing import distributed
from plumbing.options import (
    InputError,
    Positional,
    Unset,
    at_least,
    check_seed,
    finite,
    flag,
    parse,
    run,
    short,
)
from plumbing.picture_folder import is_image
from plumbing.pictures import read_array, save_grid, save_picture, to_tensor, to_uint8
from plumbing.progress import bar


@dataclasses.dataclass
class Options:
    model: Positional[str]
    """Folder of a run, built-in source, file of weights, folder of diffusers or name on the Hugging Face
    Hub."""
    n: Annotated[int, short("-n")] = 64
    """Number of pictures."""
    at: Unset[int] = None
    """Draw from the stage of the run after so many iterations, a row of progress.png (default: its end)."""
    source: Unset[str] = None
    """Where the source of the run is now, if it has moved."""
    arch: Unset[str] = None
    """Network of a published file that does not show it: see python -m checkpoints, or a JSON file."""
    steps: int = 50
    """Sampling steps."""
    eta: str = "0"
    """0: DDIM, 1: DDPM, any number between, or 'large': DDPM with variance beta_t."""
    seed: int = 0
    """Seed of the first picture."""
    guidance: float = 0.0
    """Gamma of classifier guidance with the run's own classifier (Dhariwal & Nichol 2021,
    Algorithm 2, in place of Eq. 2: for any eta)."""
    batch_size: int = 64
    """Pictures at once on a device."""
    output_dir: Unset[str] = None
    """Where they go (default: RUN/drawn, RUN/drawn-STAGE, runs/NAME-samples); beside it, a grid of them."""
    overwrite: bool = False
    """Replace what is in --output-dir of the same names; in a default folder they are in any case."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda or mps."""


def parse_eta(text: str) -> float | str:
    """0 to 1, or "large"."""
    if text == "large":
        return text
    try:
        eta = float(text)
    except ValueError:
        eta = -1.0
    if not 0 <= eta <= 1:
        raise InputError(f"--eta {text}: give a number from 0 to 1, or 'large'")
    return eta


def main() -> None:
    options, typed = parse(Options, __doc__)
    device = distributed.setup(options.device)
    eta = parse_eta(options.eta)
    at_least(options, n=1, batch_size=1, steps=1)
    finite(options, "guidance")
    check_seed(options)
    folder = Path(options.model)
    network, of_run = run_folder.load_model(options.model, options.arch, options.at, options.source)
    network.check_steps(options.steps)
    if isinstance(network, GAN) and (unused := sorted(typed & {"steps", "eta", "guidance"})):
        raise InputError(f"{flag(unused[0])}: {options.model} is a GAN, which draws in one pass; "
                         "leave it out")
    network.to(device)
    gradient = None
    if options.guidance:
        classifier = run_folder.load_classifier(folder).model.to(device).requires_grad_(False)
        gradient = functools.partial(log_prob_gradient, classifier, label=TARGET)

    drawn = "drawn" if options.at is None else f"drawn-{options.at:06d}"
    default = folder / drawn if of_run else f"runs/{title_of(options.model)}-samples"
    out = Path(options.output_dir or default).resolve()
    seeds = range(options.seed, options.seed + options.n)
    files, grid = {i: out / f"{i:06d}.png" for i in seeds}, out.with_name(out.name + ".png")
    there = {path for path in (out.iterdir() if out.is_dir() else ()) if is_image(path)}
    replaced = [path for path in (*files.values(), grid) if path.exists()]
    if options.output_dir and replaced and not options.overwrite:
        raise InputError(f"{replaced[0]}: is there already; replace it with --overwrite, or choose another "
                         "--output-dir")
    distributed.barrier()  # all have looked before one of them writes
    if old := there & {*files.values()}:
        distributed.say(f"note: replacing {len(old)} pictures in {out}")
    if others := len(there - {*files.values()}):
        distributed.say(f"note: {out} holds {others} other pictures, which stay there")
    out.mkdir(parents=True, exist_ok=True)
    mine = seeds[distributed.share(options.n)]
    progress = functools.partial(bar, text="sampling")
    for first in range(0, len(mine), options.batch_size):  # each batch is kept as soon as it is drawn
        part = mine[first:first + options.batch_size]
        images = network.sample(part, options.steps, eta=eta, gradient=gradient, gamma=options.guidance,
                                batch_size=options.batch_size, progress=progress)
        for i, pixels in zip(part, to_uint8(images)):
            save_picture(files[i], pixels)
    distributed.barrier()
    if distributed.rank() == 0:
        shown = [read_array(files[i]) for i in seeds[:256]]
        save_grid(grid, to_tensor(torch.stack(shown)), columns=min(16, options.n))
        print(f"{options.n} pictures in {out}/, a grid in {grid}")
    distributed.cleanup()


if __name__ == "__main__":
    run(main)
