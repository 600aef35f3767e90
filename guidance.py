"""What guides a run (Eq. 5): the classifier p_phi, fine-tuned on the pictures of the target against pictures of the source.

classifier.py has the network and its training; here is where its pictures come from, for pixel and latent sources.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

import domains
from checkpoints.load import start_classifier
from checkpoints.network import Network
from classifier import accuracy_by_quartile, augment, fine_tune
from plumbing.seeds import generator


def make_classifier(options, source: Network, targets: Tensor, device: torch.device, say: Callable) -> tuple[Network, list[float] | None]:
    """p_phi of Eq. 5 for a run with these train_tan.Options, and its accuracy on held-out pictures by timestep quarter (None without
    --classifier-check, or where there is only one picture).

    targets (K, 3, H, W) in [-1, 1]; `say` prints what takes long.
    """
    count, schedule = options.source_count, source.schedule
    progress = lambda text: lambda steps: tqdm(steps, desc=text, leave=False)
    name = options.source_images or domains.drawn_by(options.source)
    if name:
        pictures = domains.source_images(name, count, source.image_size, options.seed)
    else:
        say(f"sampling {count} source pictures for the classifier (--source-images FOLDER would save this)")
        pictures = source.sample(range(10**6, 10**6 + count), 25, batch_size=options.micro_batch_size or 64,
                                 progress=progress("source pictures"))  # psi, still zero, changes nothing
    pictures, targets = pictures.to(device), targets.to(device)
    kinds = options.augment or domains.AUGMENT.get(options.target, ("flip", "shift"))

    def x0(images: Tensor, versions: int) -> Tensor:
        """What the classifier sees.  Latents cannot be mirrored or coloured: of each picture, several changed versions are encoded."""
        if source.first_stage is None:
            return images
        return source.encode(augment(images.repeat(versions, 1, 1, 1), kinds, generator(options.seed, 4)))

    def train(source_pictures: Tensor, target_pictures: Tensor, text: str) -> Network:
        torch.manual_seed(options.seed)  # the new head
        network = start_classifier(options.classifier, options.classifier_arch, options.source, source)
        network.model.use_checkpoint = options.checkpoint_blocks
        fine_tune(network.model.to(device), schedule, x0(source_pictures, 2), x0(target_pictures, 16), options.classifier_iterations,
                  options.classifier_batch_size, options.classifier_learning_rate, () if source.first_stage else kinds,
                  generator(options.seed, 2), options.micro_batch_size, progress(text))
        return network

    accuracy = None
    if options.classifier_check and min(len(targets), len(pictures)) >= 2:
        held_out, held_out_source = max(1, len(targets) // 5), max(1, len(pictures) // 5)
        trial = train(pictures[held_out_source:], targets[held_out:], "classifier, a fifth held out")
        accuracy = accuracy_by_quartile(trial.model, schedule, source.encode(pictures[:held_out_source]), source.encode(targets[:held_out]),
                                        generator(options.seed, 3))
    return train(pictures, targets, "classifier"), accuracy
