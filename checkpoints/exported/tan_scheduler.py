"""ddpm.Schedule as a scheduler of diffusers: DDIM for any eta."""

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ddpm import Schedule


class TANScheduler(SchedulerMixin, ConfigMixin):
    """DDIM over timesteps spread evenly from the last to the first, each step going to the next in the list.

    diffusers' own DDIMScheduler goes T // steps back, whatever the list: its pictures are a little different.
    The options are named as there; clip_sample limits the predicted x_0 to clip_sample_range.
    """
    _compatibles = [scheduler.name for scheduler in KarrasDiffusionSchedulers]  # can be made from this config
    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02,
                 beta_schedule: str = "linear", clip_sample: bool = True, clip_sample_range: float = 1.0,
                 prediction_type: str = "epsilon"):
        ours = {"scaled_linear": "scaled-linear", "squaredcos_cap_v2": "cosine"}
        name = ours.get(beta_schedule, beta_schedule)
        prediction = dict(epsilon="eps", v_prediction="v", sample="x0")[prediction_type]
        self.schedule = Schedule(name, num_train_timesteps, beta_start, beta_end, prediction)
        self.set_timesteps(num_train_timesteps)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """ValueError for a number outside 1..num_train_timesteps."""
        self.timesteps = torch.tensor(self.schedule.subset(num_inference_steps), device=device)

    def scale_model_input(self, sample: Tensor, timestep: Tensor | int | None = None) -> Tensor:
        """x_t as the network takes it: as it is."""
        return sample

    def step(self, model_output: Tensor, timestep: Tensor | int, sample: Tensor, eta: float = 0.0,
             generator: torch.Generator | list[torch.Generator] | None = None,
             return_dict: bool = True) -> SchedulerOutput | tuple[Tensor]:
        """x_s from x_t and what the network gives (B, ...), s the next of `timesteps` after t, or no noise
        after the last."""
        t = int(timestep)
        s = max((other for other in self.timesteps.tolist() if other < t), default=-1)
        t_batch, s_batch = (torch.full((len(sample),), i, device=sample.device) for i in (t, s))
        noise = randn_tensor(sample.shape, generator, sample.device, sample.dtype) if eta != 0 else None
        eps = self.schedule.to_eps(model_output, sample, t_batch)
        clip = self.config.clip_sample_range if self.config.clip_sample else None
        xs = self.schedule.reverse_step(sample, t_batch, s_batch, eps, noise, eta, clip)
        return SchedulerOutput(xs) if return_dict else (xs,)
