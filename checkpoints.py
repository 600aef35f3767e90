"""Networks in files: this project's own safetensors (architecture in the metadata) and published state dicts.

A source is named by a built-in name (SOURCES), by one of our own files, or by a published file together with --arch.
Loading is strict, and nothing in a file is ever run.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import classifier
from ddpm import Schedule
from options import InputError
from training import write_atomic
from unet import UNet

ASSETS = Path(__file__).parent / "assets"
LINEAR = dict(name="linear", timesteps=1000, beta_start=1e-4, beta_end=0.02)

# Published networks by name: what their files do not say themselves.
ARCHITECTURES = {
    # FFHQ 256 of P2-weighting (ffhq_p2.pt) and of ILVR (ffhq_10m.pt): 93.56 M parameters
    "ffhq256": dict(network="UNet", schedule=LINEAR, config=dict(
        image_size=256, in_channels=3, model_channels=128, out_channels=6, num_res_blocks=1, attention_resolutions=[16],
        channel_mult=[1, 1, 2, 2, 4, 4], num_head_channels=64, use_scale_shift_norm=True, resblock_updown=True)),
    # OpenAI's 256x256_classifier.pt, trained on noised ImageNet: 54.1 M parameters
    "imagenet256-classifier": dict(network="Classifier", schedule=LINEAR, config=dict(
        image_size=256, in_channels=3, model_channels=128, out_channels=1000, num_res_blocks=2, attention_resolutions=[8, 16, 32],
        channel_mult=[1, 1, 2, 2, 4, 4], num_head_channels=64, use_scale_shift_norm=True, resblock_updown=True, pool="attention")),
}
NETWORKS = {"UNet": UNet, "Classifier": classifier.Classifier}


@dataclasses.dataclass
class Network:
    """A network, the schedule it was trained with, and what its file says about itself."""
    model: nn.Module
    schedule: Schedule
    description: dict  # network, config, schedule, and in our own files made_by and more


def build(description: dict, where: str) -> Network:
    """An untrained network from its description; InputError if an option is wrong."""
    try:
        model = NETWORKS[description["network"]](**description["config"])
        return Network(model.eval(), Schedule(**description["schedule"]), description)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where}: does not describe a network this program can build ({type(error).__name__}: {error})") from None


def save_network(path: Path, network: Network) -> None:
    """Weights and description in one safetensors file, atomically."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in network.model.state_dict().items()}
    save_tensors(path, tensors, network.description)


def save_tensors(path: Path, tensors: dict[str, Tensor], description: dict) -> None:
    write_atomic(path, lambda temporary: save_file(tensors, temporary, {"description": json.dumps(description)}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict | None]:
    """Tensors of a safetensors or torch file on the CPU, and our own description if there is one.

    Raises InputError for a file that is missing, damaged, not a flat dict of tensors, or that wants to run code.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as f:
                description = (f.metadata() or {}).get("description")
            return load_file(path), json.loads(description) if description else None
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder; give a file of weights") from None
    except Exception as error:  # on damaged bytes torch's unpickler raises nearly every type there is
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a file of weights that can be read safely ({reason[:160]})") from None
    if not isinstance(tensors, dict) or not all(isinstance(v, Tensor) for v in tensors.values()):
        raise InputError(f"{path}: holds something else than a flat dict of tensors; save the model's state_dict() alone")
    return tensors, None


def load_strictly(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Fill the model; InputError that names the first keys which are missing, unexpected or misshapen."""
    own = model.state_dict()
    faults = [f"missing {k}" for k in own if k not in tensors] + [f"unexpected {k}" for k in tensors if k not in own]
    faults += [f"{k} is {list(tensors[k].shape)}, expected {list(own[k].shape)}" for k in own
               if k in tensors and own[k].shape != tensors[k].shape]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise InputError(f"{path}: weights do not fit the network: {'; '.join(faults[:3])}{more}; is --arch right?")
    model.load_state_dict({key: value.to(own[key].dtype) for key, value in tensors.items()})


def load_network(path: Path, arch: str | None = None) -> Network:
    """A network from one of our own files, or from a published one with `arch`: a name of ARCHITECTURES or a JSON file."""
    tensors, description = read_tensors(path)
    if description is None:
        description = read_architecture(arch, path)
    if "network" not in description:
        raise InputError(f"{path}: the weights of a run, not a whole network; give the run's folder to sample.py or evaluate.py")
    network = build(description, arch or str(path))
    load_strictly(network.model, tensors, path)
    return network


def read_architecture(arch: str | None, path: Path) -> dict:
    if arch is None:
        raise InputError(f"{path}: the file does not say which network it is for; add --arch {{{', '.join(ARCHITECTURES)}}} or --arch FILE.json")
    if arch in ARCHITECTURES:
        return ARCHITECTURES[arch]
    try:
        description = json.loads(Path(arch).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"--arch {arch}: neither one of {', '.join(ARCHITECTURES)} nor a JSON file ({error})") from None
    if not isinstance(description, dict) or "config" not in description:
        raise InputError(f"--arch {arch}: must hold {{\"config\": {{...}}, \"schedule\": {{...}}}}")
    return {"network": "UNet", "schedule": LINEAR, **description}


def load_source(name: str, arch: str | None = None) -> Network:
    """The pre-trained DDPM to start from: a built-in name or a file."""
    built_in = ASSETS / f"{name}.safetensors"
    network = load_network(built_in if built_in.exists() else Path(name), arch)
    if not isinstance(network.model, UNet):
        raise InputError(f"{name}: a classifier, not a diffusion model")
    if network.model.in_channels != 3 or network.model.out_channels not in (3, 6):
        raise InputError(f"{name}: takes {network.model.in_channels} channels and gives {network.model.out_channels}; only RGB models "
                         "(3 in, 3 or 6 out) can be adapted")
    return network


def fingerprint(model: nn.Module) -> str:
    """A short hash of the weights: psi is worth nothing beside another theta."""
    digest = hashlib.sha256()
    for key, value in model.state_dict().items():
        digest.update(key.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def start_classifier(name: str | None, arch: str | None, source_name: str, source: Network) -> Network:
    """The classifier before it sees a target picture, with a fresh two-way head.

    name   a file (with `arch` if it is a published one); "encoder": the source U-Net's own encoder; "scratch": random weights;
           None: the built-in source's classifier, or else the encoder
    """
    built_in = ASSETS / f"{source_name}-classifier.safetensors"
    if name is None:
        name = str(built_in) if built_in.exists() else "encoder"
    if name in ("encoder", "scratch"):
        model = classifier.from_unet(source.model, pretrained=name == "encoder")
        return Network(model, source.schedule, dict(network="Classifier", config=model.config, schedule=source.schedule.config))
    network = load_network(Path(name), arch)
    if not isinstance(network.model, classifier.Classifier):
        raise InputError(f"--classifier {name}: a diffusion model, not a classifier; --classifier encoder uses the source's own")
    if network.model.image_size != source.model.image_size:
        raise InputError(f"--classifier {name}: made for {network.model.image_size} pixels, the source for {source.model.image_size}")
    classifier.replace_head(network.model)
    description = dict(network="Classifier", config=network.model.config, schedule=source.schedule.config, started_from=name)
    return Network(network.model, source.schedule, description)  # it is fine-tuned and asked at the source's noise levels
