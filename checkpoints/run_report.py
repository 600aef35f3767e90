"""What a run keeps while it goes on, and shows: stages, rows of progress.png, final weights.

Few-shot adaptation is decided by when it stops.  A stage keeps the running average at that time, so that the
best one can be chosen afterwards: by the pictures, by how near they come to the training pictures, or by the
loss of pictures that were held out.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import adaptor
from checkpoints.gan import GAN
from checkpoints.load import load_source
from checkpoints.network import Network, save_tensors
from checkpoints.run_folder import arch_of, best_stage, stage_file, stages
from checkpoints.run_page import write_page
from classifier import guided_loss
from ddpm import predict_eps
from metrics import nearest_rms
from plumbing import distributed, progress
from plumbing.board import Board
from plumbing.figures import save_curve
from plumbing.files import read_metrics
from plumbing.memory import fitting
from plumbing.pictures import read_array, save_grid, save_picture, to_tensor, to_uint8
from plumbing.seeds import generator
from plumbing.shell import quoted
from plumbing.training import EMA

NOISES = 8  # a picture, for the losses of a stage
STAGE_NOISE = 5  # stream of random numbers


class Report:
    """The stages of a run, its final weights and its pictures; rank 0 writes, the others do nothing.

    options   flat, as options.json has them; those that the method uses
    source    the network that is adapted, a diffusion model or a GAN
    identity  of the run (`run_folder.identity`)
    targets   the training pictures (K, 3, H, W)
    held_out  pictures kept from training, or none (K', 3, H, W)
    command   that makes the run again
    board     where pictures go as well
    ema       averages of what learns; they are what the pictures, the losses and the weights show
    """

    def __init__(self, out: Path, options: dict[str, Any], source: Network | GAN,
                 identity: dict[str, Any], targets: Tensor, held_out: Tensor, ema: EMA,
                 device: torch.device, command: str, board: Board | None = None):
        self.out, self.options, self.source, self.ema = out, options, source, ema
        self.identity, self.clip_before = identity, source.clip
        self.targets, self.held_out, self.device = targets, held_out, device
        self.command, self.board = command, board
        self.steps = options.get("sample_steps", 1)  # a GAN draws in one
        previews = options["previews"]
        self.stages = {0} | {round(options["iterations"] * (i + 1) / previews) for i in range(previews)}
        if distributed.rank() == 0:
            save_grid(out / "targets.png", targets[:20], columns=min(10, len(targets)))
            self.show_on_board("targets", targets[:20], 0)

    def draw(self, network: Network | GAN, n: int, steps: int) -> Tensor:
        """Pictures (n, 3, H, W) of the seeds 0 to n - 1."""
        network.to(self.device).model.eval()
        return fitting(lambda at_once: network.sample(range(n), steps, batch_size=at_once),
                       self.options.get("micro_batch_size") or 64)

    @torch.no_grad()
    def loss(self, pictures: Tensor) -> float:
        """Eq. 1 of pictures (N, 3, H, W): the mean over NOISES pairs of a noise and a timestep.

        Timesteps are spread over all of T; the pairs are the same for every picture and at every stage.
        """
        schedule, g = self.source.schedule, generator(self.options["seed"], STAGE_NOISE)
        t = (torch.arange(NOISES) + torch.rand(NOISES, generator=g)) * schedule.timesteps / NOISES
        eps = torch.randn(NOISES, *self.source.shape, generator=g).to(self.device)
        t, losses = t.long().to(self.device), []
        with distributed.autocast(self.device, self.options["precision"]):
            for x0 in self.source.encode(pictures.to(self.device)):
                xt = schedule.add_noise(x0.expand_as(eps), t, eps)
                losses.append(guided_loss(eps, predict_eps(self.source.model, xt, t, schedule), 0).mean())
        return torch.stack(losses).mean().item()

    def save(self, path: Path, **more: Any) -> None:
        """The weights that the network has now, psi alone or all, with a description."""
        weights = adaptor.state_dict(self.source.model) or self.source.model.state_dict()
        kept = {name: self.identity[name] for name in ("source", "reading", "pictures")}
        description = dict(kept, method=self.options["method"], clip=self.source.clip)
        save_tensors(path, weights, {"description": json.dumps(description | more)})

    def preview(self, done: int, saved: bool) -> None:
        """One more stage and row of progress.png, if one is due after so many iterations."""
        path, strip = stage_file(self.out, done), self.out / "progress" / f"{done:06d}.png"
        there = path.exists() and (strip.exists() or not self.options["samples"])
        if distributed.rank() != 0 or done not in self.stages or there:
            return
        record, drawn = dict(iteration=done, nearest=None, held_out_loss=None, training_loss=None), None
        self.ema.swap()
        if self.options["samples"]:
            drawn = self.draw(self.source, 8, min(25, self.steps))  # always the same noises
            record.update(nearest=nearest_rms(drawn, self.targets))
        if len(self.held_out):
            record.update(held_out_loss=self.loss(self.held_out), training_loss=self.loss(self.targets))
            progress.say("after {iteration} iterations: held-out loss {held_out_loss:.4f}, "
                         "training loss {training_loss:.4f}".format(**record))
        path.parent.mkdir(exist_ok=True)
        self.save(path, stage=record)
        self.ema.swap()
        if drawn is not None:
            self.add_row(strip, drawn)
            self.show_on_board("progress", drawn, done)
        write_page(self.out, self.options, self.command)

    def show_on_board(self, name: str, images: Tensor, iteration: int) -> None:
        """Pictures (N, 3, H, W) on the board, if there is one."""
        if self.board:
            self.board.pictures(name, images, iteration)

    def add_row(self, strip: Path, drawn: Tensor) -> None:
        """Pictures (8, 3, H, W) as one more file in progress/, and all of these as progress.png."""
        strip.parent.mkdir(exist_ok=True)
        pixels, rows, labels = to_uint8(drawn), [], []
        for record in stages(self.out):
            file = strip.with_name(f"{record['iteration']:06d}.png")
            if file == strip or file.exists():
                row = pixels if file == strip else torch.stack(read_array(file).chunk(8, dim=1))
                rows.append(to_tensor(row))                                # (8, H, W, 3) -> (8, 3, H, W)
                labels.append(f"{record['iteration']}  rms {record['nearest']:.2f}")
        save_grid(self.out / "progress.png", torch.cat(rows), columns=8, labels=labels)
        # Last, as it says that the row is done.
        save_picture(strip, torch.cat(list(pixels), dim=1))                      # (H, 8W, 3)

    def finish(self, loss: str) -> None:
        """weights.safetensors (of the running average), samples.png, and loss.png labelled with `loss`."""
        if distributed.rank() != 0:
            return
        self.ema.swap()
        self.save(self.out / "weights.safetensors")
        if self.options["samples"]:
            self.pairs()
        self.ema.swap()
        values = [line["loss"] for line in read_metrics(self.out / "metrics.jsonl")]
        save_curve(self.out / "loss.png", values, f"loss ({loss})")
        drawn = "samples.png (same noise: source above, adapted below), progress.png, "
        if not self.options["samples"]:
            drawn = ""
        write_page(self.out, self.options, self.command)
        print(f"done: {self.out}/report.html, {drawn}loss.png; more with: python sample.py "
              f"{quoted(self.out)} -n 64")
        if (best := best_stage(stages(self.out))) is not None:
            print(f"held-out loss is lowest after {best} of {self.options['iterations']} iterations: "
                  f"python sample.py {quoted(self.out)} --at {best}")

    def pairs(self) -> None:
        """samples.png: pairs of rows, source pictures above, the adapted ones from the same noise below."""
        n, steps = self.options["samples"], self.steps
        columns = min(16, n)
        adapted = self.draw(self.source, n, steps)
        if adaptor.state_dict(self.source.model):
            before = dataclasses.replace(self.source, model=adaptor.source_model(self.source.model),
                                         clip=self.clip_before)
        else:  # its weights are gone
            before = load_source(self.options["source"], arch_of(self.out, self.options))
            before.precision = self.source.precision
        source = self.draw(before, n, steps)
        blank = torch.ones(-n % columns, *self.targets.shape[1:])  # both rows of the last pair are full
        above, below = (torch.cat([images, blank]).split(columns) for images in (source, adapted))
        rows = [row for pair in zip(above, below) for row in pair]
        save_grid(self.out / "samples.png", torch.cat(rows), columns, gap_after=2)
        self.show_on_board("samples", torch.cat(rows), self.options["iterations"])
