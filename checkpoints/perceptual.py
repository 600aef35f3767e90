"""The published networks that pictures are compared by: LPIPS (Zhang et al. 2018) and the Inception network of FID."""

import io
import re
import socket
import warnings
from http.client import HTTPException
from pathlib import Path

import torch
from torch import nn

from checkpoints.load import read_tensors
from plumbing.options import InputError

BACKBONES = {
    "vgg": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "alex": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    "squeeze": "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth",
}


INCEPTION = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"


TIMEOUT = 30  # seconds without a byte


def published_weights(url: str, flag: str, path: Path | None = None, download: bool = False) -> Path:
    """Where the file of `url` lies: `path` if given, else torch hub's cache, into which it is downloaded only if allowed.

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
    except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: not the bytes that the name promises
        raise InputError(f"{cached}: could not be downloaded ({error}); {remedy}") from None
    finally:
        socket.setdefaulttimeout(before)
    return cached


def load_lpips(net: str = "vgg", backbone: Path | None = None, download: bool = False) -> nn.Module:
    """lpips.LPIPS v0.1 over `net` ("vgg", as in the paper, "alex" or "squeeze"), in evaluation mode, on the CPU.

    The linear weights come with the package.  backbone: torchvision's ImageNet weights, the whole network or `features` alone;
    None looks for them as published_weights does.  Raises InputError if they are not there, damaged, or of another network.
    """
    import lpips
    path = published_weights(BACKBONES[net], "--lpips-backbone", backbone, download)
    tensors, _ = read_tensors(path)
    with warnings.catch_warnings():  # the package calls torchvision in an outdated way
        warnings.simplefilter("ignore", UserWarning)
        model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False).requires_grad_(False)
    # It cuts torchvision's `features` into slices and keeps the numbers: features.5.weight is slice2.5.weight.
    names = {re.sub(r"slice\d+", "features", name): name for name in model.net.state_dict()}
    try:
        model.net.load_state_dict({names.get(k, k): v for k, v in tensors.items() if not k.startswith("classifier.")})
    except RuntimeError:
        raise InputError(f"{path}: not torchvision's weights for {net}; give --lpips-backbone the file of {BACKBONES[net]}") from None
    return model


def load_inception(weights: Path | None = None, download: bool = False) -> nn.Module:
    """torch-fidelity's Inception v3, the very network of the original FID code, down to its 2048 pooled features.

    weights: the file of INCEPTION; None looks for it as published_weights does.  Raises InputError as load_lpips does.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    path = published_weights(INCEPTION, "--inception-weights", weights, download)
    # The package would unpickle the file, whatever is in it; it gets the tensors that were read safely, written anew.
    clean = io.BytesIO()
    torch.save(read_tensors(path)[0], clean)
    clean.seek(0)
    try:
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=clean)
    except RuntimeError:
        raise InputError(f"{path}: not the Inception weights of FID; give --inception-weights the file of {INCEPTION}") from None
