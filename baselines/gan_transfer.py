"""The paper's GAN baselines, and FreezeD: adapt a pre-trained StyleGAN2 to a new domain from ten pictures.

  python -m baselines.gan_transfer --method cdc --target sunglasses       built-in faces; minutes on a laptop
  python -m baselines.gan_transfer --method cdc --source source_ffhq.pt --target photos/ --batch-size 4
                                                                          CDC's published source
  python -m baselines.gan_transfer --method cdc --target sunglasses --resume

Leaves in runs/TARGET-METHOD/ what train_tan.py leaves of a run, and sample.py and evaluate.py take it as one:
samples.png has the source's pictures above the adapted ones of the same latents, progress.png the same
latents at several iterations, report.html all of it.
"""


import torch
from torch import Tensor

import domains
from baselines import gan_methods, gan_settings
from baselines.gan_settings import Options
from baselines.gan_training import Players, play
from checkpoints import run_folder
from checkpoints.load import load_gan, pinned
from checkpoints.run_report import Report
from plumbing import distributed
from plumbing.options import flat, parse, picked, replace, run
from plumbing.training import EMA, Loop


def main() -> None:
    options, typed = parse(Options, __doc__)
    device = distributed.setup_alone(options.device, "gan_transfer")

    # What is adapted, to what, with which numbers.
    out = gan_settings.folder_of(options)
    if options.resume:
        options = run_folder.resumed(out, options, typed)
    elif options.source is None:
        options = replace(options, source=gan_settings.usual_source(options.target))
    options = replace(options, source=pinned(options.source))
    source = load_gan(options.source)
    options = gan_settings.suited(options, source)
    gan_settings.check(options, typed, source)
    targets = domains.target_images(options.target, source.image_size, options.recursive)
    identity = run_folder.identity(source, targets, None)
    state = run_folder.open_run(out, flat(options), identity)

    # Who learns, and what the method adds
    torch.manual_seed(options.seed)
    source.to(device)
    print(f"source {options.source}: {source.image_size}x{source.image_size}; {options.method} on "
          f"{len(targets)} pictures of {options.target}; {device}", flush=True)
    method = gan_methods.make(options.method, source.model, source.discriminator, len(targets),
                              options.numbers, options.seed)
    players = Players(source.model, source.discriminator, method, options.batch_size, options.learning_rate,
                      options.r1, options.r1_every, options.path_length)
    ema = EMA(players.drawing, options.ema)
    learning, theirs = (sum(p.numel() for p in group) for group in (players.drawing, players.judging))
    print(f"training the generator, {learning / 1e6:.2f} M parameters, and {theirs / 1e6:.2f} M of the "
          "discriminator", flush=True)

    def real_pictures(g: torch.Generator) -> Tensor:
        chosen = targets[torch.randint(len(targets), (options.batch_size,), generator=g)]
        mirrored = torch.rand(options.batch_size, 1, 1, 1, generator=g) < (0.5 if options.flip else 0)
        return torch.where(mirrored, chosen.flip(3), chosen)

    report = Report(out, picked(options, gan_settings.used_by(options.method)), source, identity,
                    targets, targets[:0], ema, device, gan_settings.command_of(options))
    loop = Loop(out, options.method, options.iterations, options.save_every, options.batch_size,
                players.parameters, players.optimizer, ema, lambda iteration: options.learning_rate, device,
                state, dict(identity, gan=players.state), report.preview, also=players.load)
    play(loop, players, ema, real_pictures, options.seed)
    report.finish("of the generator")


if __name__ == "__main__":
    run(main)
