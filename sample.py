"""Draw pictures from an adapted model, or from a source alone.

  python sample.py runs/sunglasses -n 64           64 pictures in runs/sunglasses/drawn/, and a grid
  python sample.py toyfaces -n 64                  the built-in source
  python sample.py ffhq_p2.pt -n 8                 a published source
  torchrun --nproc_per_node=8 sample.py runs/sunglasses -n 1000

Picture i comes from seed + i alone: the same noise through source and adapted model gives a pair, and the number of
processes and the batch size change nothing.
"""

import dataclasses
import math
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from checkpoints import run_folder
from classifier import TARGET, log_prob_gradient
from plumbing import distributed
from plumbing.files import write_atomic
from plumbing.options import REQUIRED, InputError, at_least, option, parse, run
from plumbing.pictures import read_array, save_grid, to_tensor, to_uint8


@dataclasses.dataclass
class Options:
    model: str = option(REQUIRED, "folder of a run, built-in source, file of weights or folder of diffusers", positional=True)
    n: int = option(64, "number of pictures", short="-n")
    arch: str | None = option(None, "network of a published file whose shapes do not show it (python -m checkpoints lists them), or a JSON file",
                              metavar="NAME")
    steps: int = option(50, "sampling steps")
    eta: str = option("0", "0: DDIM, 1: DDPM, any number between, or 'large': DDPM with variance beta_t", metavar="X")
    seed: int = option(0, "seed of the first picture")
    guidance: float = option(0.0, "gamma of classifier guidance while sampling, with the run's own classifier (Eq. 2; at eta 0 through eps)")
    batch_size: int = option(64, "pictures at once on a device")
    output_dir: str = option("", "where they go (default: RUN/drawn, or runs/NAME-samples)")
    device: str = option("auto", "auto, cpu, cuda or mps")


def main() -> None:
    options, _ = parse(Options, description=__doc__)
    device = distributed.setup(options.device)
    try:
        eta = "large" if options.eta == "large" else float(options.eta)
    except ValueError:
        raise InputError(f"--eta {options.eta}: give a number from 0 to 1, or 'large'") from None
    if eta != "large" and not 0 <= eta <= 1:
        raise InputError(f"--eta {options.eta}: give a number from 0 to 1, or 'large'")
    at_least(options, n=1, batch_size=1, steps=1)
    folder = Path(options.model)
    if not math.isfinite(options.guidance):
        raise InputError(f"--guidance {options.guidance}: must be a number")
    network, of_run = run_folder.load_model(options.model, options.arch)
    out = Path(options.output_dir or (folder / "drawn" if of_run else f"runs/{folder.stem}-samples")).resolve()
    network.to(device)
    if options.steps > network.schedule.timesteps:
        raise InputError(f"--steps {options.steps}: this model has {network.schedule.timesteps}")
    if out.is_dir() and any(out.glob("*.png")):
        print(f"note: {out} already holds pictures; those of other seeds stay there")
    gradient = None
    if options.guidance:
        classifier = run_folder.load_classifier(folder).model.to(device).requires_grad_(False)
        gradient = lambda xt, t: log_prob_gradient(classifier, xt, t, TARGET)

    mine = range(options.n)[distributed.share(options.n)]
    progress = lambda steps: tqdm(steps, leave=False, disable=distributed.rank() != 0)
    out.mkdir(parents=True, exist_ok=True)
    for part in (mine[i:i + options.batch_size] for i in range(0, len(mine), options.batch_size)):  # each batch is kept as soon as it is drawn
        images = network.sample([options.seed + i for i in part], options.steps, eta=eta, gradient=gradient, gamma=options.guidance,
                                batch_size=options.batch_size, progress=progress)
        for i, pixels in zip(part, to_uint8(images)):
            write_atomic(out / f"{options.seed + i:06d}.png", lambda temporary: Image.fromarray(pixels.numpy()).save(temporary, "PNG"))
    distributed.barrier()
    if distributed.rank() == 0:
        shown = [read_array(out / f"{options.seed + i:06d}.png") for i in range(min(options.n, 256))]
        save_grid(out.with_name(out.name + ".png"), to_tensor(torch.stack(shown)), columns=min(16, options.n))
        print(f"{options.n} pictures in {out}/, a grid in {out}.png")
    distributed.cleanup()


if __name__ == "__main__":
    run(main)
