"""autoencoder.py against latent diffusion itself (tests/golden) and against diffusers."""

import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution, VectorQuantizer
from test_unet import GOLDEN, filled

from autoencoder import KL, VQ, first_stage_loss
from checkpoints.diffusers_first_stage import first_stage_config, first_stage_weights
from checkpoints.published import KL_F8, VQ_F4


def small(kind: str, seed: int = 0, **options):
    """A random first stage: three levels, attention at two of them, embed_dim beyond z_channels in a VQ."""
    torch.manual_seed(seed)
    ddconfig = dict(double_z=kind == "kl", z_channels=4, resolution=16, ch=8, ch_mult=[1, 2, 3],
                    num_res_blocks=1, attn_resolutions=[8, 4], norm_groups=4)
    ddconfig |= options
    return (KL(ddconfig, embed_dim=4) if kind == "kl" else VQ(ddconfig, embed_dim=5, n_embed=32)).eval()


def images(n=2, side=16):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def places(latents):
    """(B, C, h, w) -> (B h w, C)"""
    return latents.movedim(1, -1).flatten(0, 2)


@pytest.mark.parametrize("name, cls", [("ldm_vq_autoencoder_vis", VQ), ("ldm_kl_autoencoder_vis", KL)])
@torch.no_grad()
def test_golden(name, cls):
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    model = filled(cls, golden)
    x = np.random.RandomState(12345).standard_normal(golden["input_shape"]).astype(np.float32)
    latent = model.encode(torch.from_numpy(x))
    assert (latent - torch.tensor(golden["latent"]).view(golden["latent_shape"])).abs().max() < 1e-4
    output = torch.tensor(golden["output"]).view(golden["output_shape"])
    assert (model.decode(latent) - output).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["vq", "kl"])
@torch.no_grad()
def test_diffusers_with_the_same_weights(kind):
    model, x = small(kind), images(side=32)
    if kind == "vq":  # every fourth latent is an entry, so that the choice matters
        model.quantize.embedding.weight.copy_(places(model.encode(x))[::4])
    config = first_stage_config(model, scaling_factor=1.0)
    assert config["down_block_types"] == ["DownEncoderBlock2D"] + ["AttnDownEncoderBlock2D"] * 2
    theirs = getattr(diffusers, config["_class_name"]).from_config(config).eval()
    theirs.load_state_dict(first_stage_weights(model))
    latent, encoded = model.encode(x), theirs.encode(x)
    expected = encoded.latents if kind == "vq" else encoded.latent_dist.mode()
    torch.testing.assert_close(latent, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.decode(latent), theirs.decode(latent).sample, atol=1e-5, rtol=1e-4)
    if kind == "vq":
        assert len(places(model.quantise(latent)).unique(dim=0)) == 32
    else:
        torch.testing.assert_close(model.posterior(x)[1], encoded.latent_dist.logvar, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cls, config, parameters, latent", [
    (VQ, VQ_F4, 55_322_782, (3, 64, 64)), (KL, KL_F8, 83_653_863, (4, 32, 32))])
def test_published_sizes(cls, config, parameters, latent):
    with torch.device("meta"):
        model = cls(**config)
        z = model.encode(torch.empty(1, 3, 256, 256))
        assert z.shape[1:] == latent and model.decode(z).shape == (1, 3, 256, 256)
        their_class = getattr(diffusers, "VQModel" if cls is VQ else "AutoencoderKL")
        theirs = their_class.from_config(first_stage_config(model, 1.0)).state_dict()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert {key: value.shape for key, value in first_stage_weights(model).items()} == {
        key: value.shape for key, value in theirs.items()}


@pytest.mark.parametrize("kind", ["vq", "kl"])
@torch.no_grad()
def test_slicing_changes_nothing(kind):
    model, x = small(kind).double(), images(5).double()
    seen = []
    model.encoder.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    model.decoder.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    z = model.encode(x, batch_size=5)
    torch.testing.assert_close(model.encode(x, batch_size=2), z)
    torch.testing.assert_close(model.decode(z, batch_size=2), model.decode(z, batch_size=5))
    assert seen == [5, 2, 2, 1, 2, 2, 1, 5]


def test_vq_loss_and_straight_through_gradient():
    model, x = small("vq"), images()
    loss, parts = first_stage_loss(model, x, weights=dict(reconstruction=0, codebook=1, commitment=0.25))
    theirs = VectorQuantizer(32, 5, beta=0.25, legacy=False)
    theirs.load_state_dict(model.quantize.state_dict())
    z = model.encode(x)
    torch.testing.assert_close(loss, theirs(z)[1])
    torch.testing.assert_close(parts["reconstruction"], (model.decode(z) - x).abs().mean())

    codebook, encoder = model.quantize.embedding.weight, model.encoder.conv_in.weight
    for part, reached in (("reconstruction", [True, False]), ("codebook", [False, True]),
                          ("commitment", [True, False])):
        loss, _ = first_stage_loss(model, x, weights=dict.fromkeys(parts, 0.0) | {part: 1.0})
        gradients = torch.autograd.grad(loss, [encoder, codebook])
        assert [bool(g.abs().max() > 0) for g in gradients] == reached, part


def test_the_codebook_pulls_harder_than_the_encoder():
    """The default weights, against diffusers with the pulls as van den Oord et al. have them (not "legacy")."""
    model, x = small("vq"), images()
    loss, parts = first_stage_loss(model, x)
    theirs = VectorQuantizer(32, 5, beta=0.25, legacy=False)
    theirs.embedding.weight.data.copy_(model.quantize.embedding.weight)
    _, pull, _ = theirs(model.moments(x))
    torch.testing.assert_close(loss - parts["reconstruction"], pull)
    loss.backward()
    pull.backward()
    torch.testing.assert_close(model.quantize.embedding.weight.grad, theirs.embedding.weight.grad)  # the codebook's alone


def test_kl_loss_draws_from_the_posterior():
    model, x = small("kl"), images()
    noise = torch.randn(2, 4, 4, 4)
    seen = []

    def perceptual(decoded, x):
        seen.append(decoded)
        return (decoded - x).square().mean((1, 2, 3))

    loss, parts = first_stage_loss(model, x, noise, perceptual=perceptual)
    posterior = DiagonalGaussianDistribution(model.moments(x))
    torch.testing.assert_close(parts["kl"], posterior.kl().mean() / (3 * 16 * 16))
    torch.testing.assert_close(seen[0], model.decode(posterior.mean + posterior.std * noise))
    expected = parts["reconstruction"] + parts["perceptual"] + 1e-6 * parts["kl"]
    torch.testing.assert_close(loss.detach(), expected)
    with torch.no_grad():
        model.quant_conv.bias[4:] = torch.tensor([100.0, -100, 0, 0])
        logvar = model.posterior(x)[1]
    assert logvar[:, 0].eq(20).all() and logvar[:, 1].eq(-30).all()


def test_what_does_not_fit_is_refused():
    vq, kl = small("vq"), small("kl")
    with pytest.raises(ValueError, match="divisible by 4"):
        vq.encode(torch.zeros(1, 3, 16, 18))
    with pytest.raises(ValueError, match="needs 3 channels"):
        vq.encode(torch.zeros(1, 1, 16, 16))
    with pytest.raises(ValueError, match="latents of 4 channels: this first stage has 5"):
        vq.decode(torch.zeros(1, 4, 4, 4))
    with pytest.raises(ValueError, match="double_z must be false"):
        VQ(kl.config["ddconfig"], embed_dim=4, n_embed=8)
    with pytest.raises(ValueError, match="double_z must be true"):
        KL(vq.config["ddconfig"], embed_dim=4)
    with pytest.raises(ValueError, match="diffusers wants"):
        first_stage_config(small("kl", ch_mult=[2, 2, 3]), 1.0)
