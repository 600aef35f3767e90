"""The published networks that pictures are compared by, LPIPS (Zhang et al. 2018) and the Inception of FID,
and the figures of section 5.2 that they give of samples of any domain.

Their packages are imported where they are needed: that takes a second, and the built-in domains do without.
"""

import functools
import io
import re
import socket
import statistics
import warnings
from collections.abc import Callable, Iterable
from http.client import HTTPException
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoints.weights_file import read_tensors
from metrics import (
    Images,
    IntraLPIPS,
    frechet_distance,
    intra_lpips,
    kernel_distance,
    nearest,
    stack,
)
from plumbing.memory import device_memory
from plumbing.options import InputError
from plumbing.pictures import to_uint8
from plumbing.progress import bar

BACKBONES = {
    "vgg": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "alex": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    "squeeze": "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth",
}
INCEPTION = ("https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
             "weights-inception-2015-12-05-6726825d.pth")
TIMEOUT = 30  # seconds without a byte


def published_weights(url: str, flag: str, path: str | Path | None = None, download: bool = False) -> Path:
    """Where the file of `url` lies: `path` if given, else torch hub's cache, which only `download` fills.

    Raises InputError that says what to fetch, where to put it, and that `flag` takes it from elsewhere.
    """
    if path is not None:
        return Path(path)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if cached.exists():
        return cached
    remedy = f"fetch {url} and put it there, or give it with {flag} FILE"
    if not download:
        raise InputError(f"{cached}: not there; {remedy}, or add --download")
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)  # torch's own download waits for ever
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(cached), hash_prefix=cached.stem.rsplit("-", 1)[1])
    except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: not the bytes of that name
        raise InputError(f"{cached}: could not be downloaded ({error}); {remedy}") from None
    finally:
        socket.setdefaulttimeout(before)
    return cached


def load_lpips(net: str = "vgg", backbone: str | Path | None = None, download: bool = False) -> nn.Module:
    """lpips.LPIPS v0.1 over `net` ("vgg" as in the paper, "alex" or "squeeze"), ready to use, on the CPU.

    The linear weights come with the package.  backbone: torchvision's ImageNet weights, the whole network or
    `features` alone; None looks for them as published_weights does.  Raises InputError if they are not there,
    damaged, or of another network.
    """
    import lpips
    path = published_weights(BACKBONES[net], "--lpips-backbone", backbone, download)
    tensors, _ = read_tensors(path)
    with warnings.catch_warnings():  # the package calls torchvision in an outdated way
        warnings.simplefilter("ignore", UserWarning)
        model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False).requires_grad_(False)
    # It cuts torchvision's `features` into slices, keeping the numbers: slice2.5.weight is features.5.weight.
    names = {re.sub(r"slice\d+", "features", name): name for name in model.net.state_dict()}
    weights = {names.get(key, key): t for key, t in tensors.items() if not key.startswith("classifier.")}
    try:
        model.net.load_state_dict(weights)
    except RuntimeError:
        raise InputError(f"{path}: not torchvision's weights for {net}; "
                         f"give --lpips-backbone the file of {BACKBONES[net]}") from None
    return model


@torch.no_grad()
def lpips_features(model: nn.Module, images: Tensor) -> Tensor:
    """Features between which LPIPS is the squared Euclidean distance: (B, 3, H, W) in [-1, 1] -> (B, D).

    model   lpips.LPIPS with its linear layers.  LPIPS (Zhang et al. 2018, Eq. 1) sums over layers l the mean
            over pixels of sum_c w_lc (a_lc - b_lc)^2, where a, b are the layer's activations scaled to length
            1 at each pixel and no w_lc is negative: put sqrt(w_lc / pixels_l) into the features and a plain
            sum of squares is left.
    D is 8.0 million for VGG at 256x256: 32 MB a picture, on the model's device.
    """
    import lpips
    layers = []
    scaled = model.scaling_layer(images.to(model.scaling_layer.shift))
    for activations, linear in zip(model.net(scaled), model.lins):
        a = lpips.normalize_tensor(activations)                              # (B, C, h, w)
        w = linear.model[-1].weight                                          # (1, C, 1, 1)
        layers.append(a.mul_((w / a[0, 0].numel()).sqrt()).flatten(1))       # (B, C h w)
    return torch.cat(layers, dim=1)                                          # (B, D)


@torch.no_grad()
def lpips_last_features(model: nn.Module, images: Images, batch_size: int = 32) -> Tensor:
    """The last features that LPIPS takes of its backbone, averaged over pixels: N pictures -> (N, D), CPU.

    KID compares by them where there is no Inception; such figures compare with each other only.
    """
    device, features = model.scaling_layer.shift.device, []
    for rows in torch.arange(len(images)).split(batch_size):
        scaled = model.scaling_layer(stack(images, rows).to(device))
        features.append(model.net(scaled)[-1].mean((2, 3)).cpu())            # (B, D)
    return torch.cat(features)


def load_inception(weights: str | Path | None = None, download: bool = False) -> nn.Module:
    """torch-fidelity's Inception v3: the network of the original FID code, down to its 2048 pooled features.

    weights: the file of INCEPTION; None looks for it as published_weights does.  Raises InputError as
    load_lpips does.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    path = published_weights(INCEPTION, "--inception-weights", weights, download)
    # The package would unpickle the file, whatever is in it: it gets the tensors, read safely, written anew.
    clean = io.BytesIO()
    torch.save(read_tensors(path)[0], clean)
    clean.seek(0)
    try:
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"],
                                           feature_extractor_weights_path=clean)
    except RuntimeError:
        raise InputError(f"{path}: not the Inception weights of FID; "
                         f"give --inception-weights the file of {INCEPTION}") from None


@torch.no_grad()
def inception_features(model: nn.Module, images: Images, batch_size: int = 32,
                       progress: Callable[[Iterable], Iterable] = iter) -> Tensor:
    """What FID and KID compare: N pictures of any one size -> float32 (N, 2048), CPU.

    They are rounded to 8 bits, and scaled to 299x299 by the network itself.  `progress` wraps the batches.
    """
    device = next(model.parameters()).device
    features = []
    for rows in progress(torch.arange(len(images)).split(batch_size)):
        pixels = to_uint8(stack(images, rows)).permute(0, 3, 1, 2)           # (B, 3, H, W)
        features.append(model(pixels.to(device))[0].cpu())                   # (B, 2048)
    return torch.cat(features)


def scorer(lpips: nn.Module, targets: Images, size: int, features: Callable[[Images], Tensor] | None = None,
           reference: Images | None = None, cluster_size: int | None = None,
           seed: int = 0) -> Callable[[Images], tuple[IntraLPIPS, dict[str, float]]]:
    """A function that gives the figures of samples around the training pictures, all of them at this size.

    They are Intra-LPIPS; nearest, the median LPIPS to the nearest target or its mirror image; and if there is
    a reference, FID and KID to it by `features`: N pictures -> (N, D).
    cluster_size, seed   as of `intra_lpips`
    Raises InputError for targets that do not fit in memory; the function ValueError as `intra_lpips` does.
    """
    embed = functools.partial(lpips_features, lpips)
    check_memory(embed, targets, size)
    expected = None if reference is None else features(reference)

    def score(samples: Images) -> tuple[IntraLPIPS, dict[str, float]]:
        found = intra_lpips(embed, samples, targets, cluster_size, seed,
                            progress=functools.partial(bar, text="Intra-LPIPS"))
        distances = nearest(embed, samples, targets, progress=functools.partial(bar, text="nearest"))
        figures = {"Intra-LPIPS": found.mean, "nearest": statistics.median(distances)}
        if reference is not None:
            seen = features(samples)
            figures |= {"FID": frechet_distance(seen, expected), "KID": kernel_distance(seen, expected)}
        return found, figures
    return score


def check_memory(embed: Callable[[Tensor], Tensor], targets: Images, size: int) -> None:
    """InputError if what Intra-LPIPS keeps, two rows of features for each training picture, cannot fit."""
    one = embed(targets[0][None])
    needed, there = 2 * len(targets) * one.nbytes, device_memory(one.device)
    if needed > there:
        raise InputError(
            f"{len(targets)} training pictures at --size {size} need {needed / 2**30:.1f} GiB of "
            f"memory, there are {there / 2**30:.1f}; give fewer (the paper has ten), or a smaller --size")
