"""What a file of weights is.

  python -m checkpoints                       which published networks are known, and where to get them
  python -m checkpoints ffhq_p2.pt            what a file is, and whether all of it fits
  python -m checkpoints runs/sunglasses       what a run is: its source, target, method
  python -m checkpoints model.ckpt --convert ldm.safetensors
                                              the same weights as one file of this project, which loads fast
"""

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from checkpoints import hub, run_folder
from checkpoints.diffusers_folder import files_in
from checkpoints.gan import GAN
from checkpoints.load import load_network, locate
from checkpoints.network import FIRST_STAGES, Network, save_network
from checkpoints.published import ARCHITECTURES
from plumbing.options import InputError, Positional, Unset, parse, run


@dataclasses.dataclass
class Options:
    file: Positional[Unset[str]] = None
    """File of weights, folder of diffusers or of a run, name on the Hugging Face Hub or built-in name.
    Default: list what is known."""
    arch: Unset[str] = None
    """Network of a published file that does not show it: a name of the list, or a JSON file."""
    convert: Unset[str] = None
    """Write the network to this .safetensors file, in this project's own form."""


def report(network: Network | GAN, path: Path) -> str:
    """What a file holds, in words."""
    description = network.description
    layout = description["layout"]
    if "converted_from" in description:
        layout += f", converted from {description['converted_from']}"
    files = files_in(path) if path.is_dir() else [path]
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    lines = {"file": f"{', '.join(map(str, files))}, {megabytes:.1f} MB", "layout": layout}
    lines |= of_gan(network) if isinstance(network, GAN) else of_diffusion_model(network)
    lines["fits"] = f"yes, all {len(network.state_dict())} tensors are there and no other"
    return "\n".join(f"{name:12}{text}" for name, text in lines.items())


def of_diffusion_model(network: Network) -> dict[str, str]:
    """Lines of the report that a U-Net, a classifier or a first stage has."""
    description, schedule = network.description, network.schedule.config
    noise = f"{schedule['name']}, {schedule['timesteps']} steps"
    if schedule["name"] != "cosine":
        noise += f", beta {schedule['beta_start']:g} to {schedule['beta_end']:g}"
    if description["network"] in FIRST_STAGES:
        noise = "none, a first stage: pretrain.py --first-stage trains a U-Net on its latents"
    pictures = f"{network.image_size}x{network.image_size}"
    if network.first_stage:
        latents = "x".join(map(str, network.shape))
        pictures += f", as latents {latents}, scaled by {network.scale_factor:g}"
    lines = {"network": f"{description['network']}, {parameters_of(network.model)}",
             "options": words(description["config"]), "schedule": noise, "pictures": pictures}
    if network.first_stage:
        kind = description["first_stage"]["network"]
        lines["first stage"] = f"{kind}, {parameters_of(network.first_stage)}"
    return lines


def of_gan(network: GAN) -> dict[str, str]:
    """Lines of the report that a GAN has."""
    config, other = network.description["config"], "none: it draws, but cannot be adapted"
    if network.discriminator:
        other = f"{parameters_of(network.discriminator)}, {words(config['discriminator'])}"
    return {"network": f"StyleGAN2, {parameters_of(network.model)}", "options": words(config["generator"]),
            "discriminator": other, "pictures": f"{network.image_size}x{network.image_size}"}


def of_run(folder: Path) -> str:
    """What a run is, in words; InputError if it cannot be read."""
    network, options = run_folder.load_run(folder)
    lines = {"run": f"of {options['source']} to {options['target']}, {options['method']}, "
                    f"{options['iterations']} iterations, seed {options['seed']}",
             "stages": ", ".join(str(record["iteration"]) for record in run_folder.stages(folder)),
             "network": f"{network.description['network']}, {parameters_of(network.model)}",
             "options": words(options)}
    return "\n".join(f"{name:12}{text}" for name, text in lines.items())


def words(config: dict[str, Any]) -> str:
    """The options of a network."""
    return ", ".join(f"{key} {value}" for key, value in config.items())


def parameters_of(model: nn.Module) -> str:
    """The number of parameters, in words."""
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters"


def main() -> None:
    options, _ = parse(Options, __doc__)
    if not options.file:
        for name, known in ARCHITECTURES.items():
            print(f"{name:24}{known['files']}\n{'':24}{known['listed']}")
        print(f"{'StyleGAN2':24}source_ffhq.pt, source_church.pt\n{'':24}github.com/utkarshojha/few-shot-gan-"
              "adaptation (python -m baselines.gan_transfer)")
        print("\nOf the Hugging Face Hub by owner/name, owner/name@revision or owner/name/FILE (not tried "
              "here):")
        for names in hub.KNOWN:
            print(f"{'':24}{names}")
        return
    if (Path(options.file) / "options.json").exists() and not options.convert:
        print(of_run(Path(options.file)))
        return
    path = locate(options.file)
    out = Path(options.convert) if options.convert else None
    if out and out.exists():
        raise InputError(f"--convert {out}: is there already; choose another name")
    if out and out.suffix != ".safetensors":
        raise InputError(f"--convert {out}: must end in .safetensors")
    network = load_network(path, options.arch)
    text = report(network, path)
    if out:  # first, as who reads the report may not read all of it
        network.description["converted_from"] = f"{path.name} ({network.description['layout']})"
        out.parent.mkdir(parents=True, exist_ok=True)
        save_network(out, network)
        text += f"\nwritten to {out}, {out.stat().st_size / 1e6:.1f} MB"
    print(text)


if __name__ == "__main__":
    run(main)
