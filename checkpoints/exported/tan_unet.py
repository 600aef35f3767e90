"""unet.UNet, with its adaptors if it has any, as a model of diffusers."""

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
    def __init__(self, network: dict, adaptor_width: int | None = None):
        super().__init__()
        self.unet = UNet(**network)
        if adaptor_width is not None:
            attach(self.unet, adaptor_width)

    @classmethod
    def from_pretrained(cls, *args, **options):
        """As in diffusers, but strictly: ValueError if weights are missing or left over, where diffusers warns and goes on."""
        model, found = super().from_pretrained(*args, **options, output_loading_info=True)
        for kind in ("missing_keys", "unexpected_keys"):
            if found[kind]:
                raise ValueError(f"{args[0]}: weights do not fit the network: {kind} {sorted(found[kind])[:3]}")
        return model

    def forward(self, sample: Tensor, timestep: Tensor | int, return_dict: bool = True) -> UNet2DOutput | tuple[Tensor]:
        """x_t (B, C, H, W), timestep scalar or (B,) -> eps (B, C, H, W); a learned variance is left out."""
        t = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        eps = self.unet(sample, t)[:, : sample.shape[1]]
        return UNet2DOutput(eps) if return_dict else (eps,)
