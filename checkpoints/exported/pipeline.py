"""Pictures from noise: the pipeline that diffusers runs for a model exported from this project."""

import inspect

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor


class TANPipeline(DiffusionPipeline):
    """`unet` is eps(x_t, t), `scheduler` any of diffusers' that takes eps; `vae`, a VQModel or AutoencoderKL,
    is there if x_0 is a latent."""

    model_cpu_offload_seq = "unet->vae"
    _optional_components = ["vae"]

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin, vae: ModelMixin | None = None):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)
        self.image_processor = VaeImageProcessor()

    @torch.no_grad()
    def __call__(self, batch_size: int = 1, generator: torch.Generator | list[torch.Generator] | None = None,
                 num_inference_steps: int = 50, eta: float = 0.0, latents: torch.Tensor | None = None,
                 output_type: str = "pil", return_dict: bool = True) -> ImagePipelineOutput | tuple:
        """`batch_size` pictures, as ImagePipelineOutput.images or, with return_dict false, alone in a tuple.

        generator     one for all pictures, or a list with one for each
        eta           0: DDIM, 1: DDPM; for schedulers that know it
        latents       the noise x_T (B, C, H, W) to start from, in place of batch_size and a draw
        output_type   "pil", "np" (B, H, W, 3) or "pt" (B, 3, H, W), both from 0 to 1, or "latent": x_0 as the
                      network has it
        """
        n = batch_size if latents is None else len(latents)
        if isinstance(generator, list) and len(generator) != n:
            raise ValueError(f"{len(generator)} generators for {n} pictures: "
                             "give one for each, or a single one for all")
        if latents is None:
            network = self.unet.config.network
            shape = n, network["in_channels"], network["image_size"], network["image_size"]
            latents = randn_tensor(shape, generator, self._execution_device, torch.float32)
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        known = inspect.signature(self.scheduler.step).parameters
        extra = {name: value for name, value in dict(eta=eta, generator=generator).items() if name in known}
        # x_t stays in float32 whatever the network computes in.
        x = latents.to(self._execution_device, torch.float32) * self.scheduler.init_noise_sigma
        for t in self.progress_bar(self.scheduler.timesteps):
            scaled = self.scheduler.scale_model_input(x, t).to(self.unet.dtype)
            x = self.scheduler.step(self.unet(scaled, t).sample.float(), t, x, **extra).prev_sample
        if self.vae is not None and output_type != "latent":
            z = (x / self.vae.config.scaling_factor).to(self.vae.dtype)
            parts = z.split(8)  # all at once might not fit in memory
            x = torch.cat([self.vae.decode(part).sample for part in parts]).float()
        images = self.image_processor.postprocess(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images) if return_dict else (images,)
