"""unet.UNet, with its adaptors if it has any, as a model of diffusers."""

import sys
import types
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor

from adaptor import attach
from unet import UNet


class TANUNet(ModelMixin, ConfigMixin):
    """eps_theta,psi(x_t, t).

    network         options of UNet
    adaptor_width   d of the adaptors; None: there are none
    """

    @register_to_config
    def __init__(self, network: dict[str, Any], adaptor_width: int | None = None):
        super().__init__()
        self.unet = UNet(**network)
        if adaptor_width is not None:
            attach(self.unet, adaptor_width)

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> "TANUNet":
        """As in diffusers, but strictly: missing or unexpected weights are a ValueError."""
        model, found = super().from_pretrained(*args, **options, output_loading_info=True)
        for kind in ("missing_keys", "unexpected_keys"):
            if found[kind]:
                first = sorted(found[kind])[:3]
                raise ValueError(f"{args[0]}: weights do not fit the network: {kind} {first}")
        return model

    def forward(self, sample: Tensor, timestep: Tensor | int,
                return_dict: bool = True) -> UNet2DOutput | tuple[Tensor]:
        """x_t (B, C, H, W), timestep scalar or (B,) -> eps, or v or x_0 (B, C, H, W); a learned variance is
        left out."""
        t = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        eps = self.unet(sample, t)[:, : sample.shape[1]]
        return UNet2DOutput(eps) if return_dict else (eps,)


# diffusers runs this file anew at each load, inside the module that it finds under this name.  Let it find a
# copy: what was loaded before keeps its own classes, which isinstance tells apart.
_copy = types.ModuleType(__name__)
vars(_copy).update(globals())
sys.modules[__name__] = _copy
