"""What a file of weights is.

  python -m checkpoints                                        the published networks that are known, and where to get them
  python -m checkpoints ffhq_p2.pt                             what a file is, and whether all of it fits
  python -m checkpoints model.ckpt --convert ldm.safetensors   the same weights as one file of this project, which loads fast
"""

import dataclasses
from pathlib import Path

from checkpoints import published
from checkpoints.load import ASSETS, load_network
from checkpoints.network import Network, save_network
from checkpoints.published import ARCHITECTURES
from plumbing.options import InputError, option, parse, run


@dataclasses.dataclass
class Options:
    file: str = option("", "file of weights, folder of diffusers, or built-in source (default: list what is known)", positional=True)
    arch: str | None = option(None, f"network of a published file: {', '.join(ARCHITECTURES)}, or a JSON file", metavar="NAME")
    convert: str | None = option(None, "write the network to this file, in this project's own form", metavar="OUT.safetensors")


def report(network: Network, path: Path) -> str:
    """What a file holds, in words."""
    count = lambda model: f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters"
    about, s = network.description, network.schedule.config
    lines = dict(file=f"{path}, {path.stat().st_size / 1e6:.1f} MB", layout=about["layout"], network=f"{about['network']}, {count(network.model)}",
                 options=", ".join(f"{key} {value}" for key, value in about["config"].items()),
                 schedule=f"{s['name']}, {s['timesteps']} steps",
                 pictures=f"{network.image_size}x{network.image_size}")
    if s["name"] != "cosine":
        lines["schedule"] += f", beta {s['beta_start']:g} to {s['beta_end']:g}"
    if network.first_stage:
        lines["pictures"] += f", as latents {'x'.join(map(str, network.shape))}, scaled by {network.scale_factor:g}"
        lines["first stage"] = f"{about['first_stage']['network']}, {count(network.first_stage)}"
    if "converted_from" in about:
        lines["layout"] += f", converted from {about['converted_from']}"
    lines["fits"] = f"yes, all {len(network.state_dict())} tensors are there and no other"
    return "\n".join(f"{name:12}{text}" for name, text in lines.items())


def main() -> None:
    options, _ = parse(Options, description=__doc__)
    if not options.file:
        for name, known in ARCHITECTURES.items():
            print(f"{name:24}{known['files']}\n{'':24}{known['listed']}")
        return
    built_in = ASSETS / f"{options.file}.safetensors"
    path = built_in if built_in.exists() else Path(options.file)
    path = published.weights_in(path) if path.is_dir() else path
    out = options.convert and Path(options.convert)
    if out and (out.suffix != ".safetensors" or out.exists()):
        raise InputError(f"--convert {out}: " + ("is there already; choose another name" if out.exists() else "must end in .safetensors"))
    network = load_network(path, options.arch)
    print(report(network, path))
    if out:
        network.description["converted_from"] = f"{path.name} ({network.description['layout']})"
        out.parent.mkdir(parents=True, exist_ok=True)
        save_network(out, network)
        print(f"written to {out}, {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
