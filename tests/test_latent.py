"""Latent diffusion from end to end on a tiny budget: a first stage, a U-Net on its latents, TAN on them, pictures out."""

import functools

import pytest
import torch
from conftest import call
from PIL import Image

import ddpm
import domains
import pretrain
import sample
import train_tan
from checkpoints import run_folder
from checkpoints.load import load_network, load_source
from checkpoints.weights_file import read_tensors
from plumbing.options import InputError
from plumbing.training import StopSignal

STAGE = "--size 16 --channels 8 --channel-mult 1 2 --norm-groups 4 --images 32 --iterations 3 --batch-size 4 --device cpu".split()
UNET = "--size 16 --channels 16 --channel-mult 1 2 --attention 2 --head-channels 16 --images 32 --iterations 3 --batch-size 4 --device cpu".split()
RUN = "--target sunglasses --iterations 4 --batch-size 4 --learning-rate-decay none --samples 4 --sample-steps 2 --previews 1 --device cpu".split()
TAN = "--source-images toyfaces --source-count 8 --classifier-iterations 3 --guidance-fade 0 --pgd-steps 2 --adaptor-width 4".split()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(kind): the file of a latent source with this kind of first stage, that two commands have made."""
    @functools.cache
    def made(kind):
        out = tmp_path_factory.mktemp(kind)
        call(pretrain.main, "toyfaces", "--network", kind, *STAGE, "--output-dir", out / "stage")
        call(pretrain.main, "toyfaces", "--first-stage", out / "stage" / "model.safetensors", *UNET, "--flip", "--output-dir", out / "unet")
        return out / "unet" / "model.safetensors"
    return made


@pytest.fixture
def source(made):
    return made("kl")


@pytest.fixture(params=["kl", "vq"])
def of_both_kinds(made, request):
    return made(request.param)


def test_pictures_are_encoded_in_fp32_whatever_is_around():
    network, pictures = load_source("toyfaces-latent"), torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = network.encode(pictures)
    with torch.autocast("cpu", torch.bfloat16):
        latents = network.encode(pictures)
        assert torch.equal(latents, expected) and torch.equal(network.decode(latents), network.decode(expected)) and latents.dtype == torch.float32


def test_what_pretraining_leaves(of_both_kinds):
    network, stage = load_source(str(of_both_kinds)), load_network(of_both_kinds.parents[1] / "stage" / "model.safetensors")
    assert network.shape == (4, 8, 8) and network.image_size == 16
    assert all(torch.equal(value, stage.model.state_dict()[key]) for key, value in network.first_stage.state_dict().items())
    images = torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(network.encode(images), stage.model.encode(images) * network.scale_factor)
    torch.testing.assert_close(network.decode(network.encode(images)), stage.model.decode(stage.model.encode(images)).clamp(-1, 1))
    # the scale factor gives the latents of the training pictures unit variance
    pictures = domains.source_images("toyfaces", 32, 16, 0)
    assert network.encode(pictures).std() == pytest.approx(1, abs=0.02)
    assert (of_both_kinds.parent / "samples.png").exists() and Image.open(of_both_kinds.parents[1] / "stage" / "samples.png").height > 200


@pytest.mark.parametrize("method", ["tan", "pa"])
def test_tan_on_latents(of_both_kinds, tmp_path, method):
    call(train_tan.main, "--source", of_both_kinds, *RUN, *(TAN if method == "tan" else []), "--method", method, "--output-dir", tmp_path)
    network, options = run_folder.load_run(tmp_path)
    assert network.shape == (4, 8, 8)
    targets = domains.target_images("sunglasses", 16)
    x0 = network.encode(torch.cat([targets, targets.flip(3)]))
    assert network.clip == pytest.approx(x0.abs().max().item(), rel=1e-5) and load_source(str(of_both_kinds)).clip is None
    latents = lambda n: ddpm.sample(n.model, n.schedule, n.shape, [0, 1], 3, clip=n.clip)
    assert not torch.equal(latents(network), latents(load_source(str(of_both_kinds))))
    torch.testing.assert_close(network.sample([0, 1], 3), network.decode(latents(network)))
    assert network.sample([0, 1], 3).shape == (2, 3, 16, 16)
    assert Image.open(tmp_path / "targets.png").width >= 10 * 128  # pictures, not latents
    if method == "tan":
        assert run_folder.load_classifier(tmp_path).model.in_channels == 4
        call(sample.main, tmp_path, "-n", 2, "--steps", 2, "--guidance", 1)
        assert len(list((tmp_path / "drawn").glob("*.png"))) == 2


def test_training_sees_scaled_latents_of_the_pictures_and_their_mirror_images(source, tmp_path, monkeypatch):
    seen = []
    original = train_tan.worst_case_noise
    monkeypatch.setattr(train_tan, "worst_case_noise", lambda model, schedule, x0, *rest, **how: seen.append(x0) or original(model, schedule, x0, *rest, **how))
    call(train_tan.main, "--method", "tan", "--source", source, *RUN, *TAN, "--samples", 0, "--batch-size", 8, "--output-dir", tmp_path)
    targets, network = domains.target_images("sunglasses", 16), load_source(str(source))
    both = network.encode(torch.cat([targets, targets.flip(3)]))
    nearest = torch.cdist(torch.cat(seen).flatten(1), both.flatten(1), compute_mode="donot_use_mm_for_euclid_dist").min(1)
    assert nearest.values.max() < 1e-4 and (nearest.indices < 10).any() and (nearest.indices >= 10).any()


def test_resume_on_latents_is_exact(source, tmp_path):
    ends = []
    for name, parts in (("whole", [[]]), ("parts", [["--iterations", 2], ["--iterations", 4, "--resume"]])):
        for part in parts:
            flags = [] if "--resume" in part else ["--method", "tan", "--source", source, *RUN, *TAN]
            call(train_tan.main, *flags, *part, "--output-dir", tmp_path / name)
        ends.append(read_tensors(tmp_path / name / "weights.safetensors")[0])
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


def test_pretraining_on_latents_resumes_exactly(source, tmp_path):
    flags = ["--first-stage", source.parents[1] / "stage" / "model.safetensors", *UNET, "--iterations", 4]
    call(pretrain.main, "toyfaces", *flags, "--output-dir", tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:  # a signal during the first iteration
        patch.setattr(StopSignal, "__enter__", lambda self: setattr(self, "received", True) or setattr(self, "previous", {}) or self)
        with pytest.raises(SystemExit):
            call(pretrain.main, "toyfaces", *flags, "--output-dir", tmp_path / "parts")
    call(pretrain.main, "toyfaces", *flags, "--resume", "--output-dir", tmp_path / "parts")
    ends = [read_tensors(tmp_path / name / "model.safetensors")[0] for name in ("whole", "parts")]
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


@pytest.mark.parametrize("flags, message", [
    (["--network", "classifier"], "only for --network unet"),
    (["--size", "15"], "divides --size"),
])
def test_first_stage_that_does_not_do(source, tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        call(pretrain.main, "toyfaces", *UNET, "--first-stage", source.parents[1] / "stage" / "model.safetensors", *flags, "--output-dir", tmp_path)


def test_a_first_stage_is_no_source(source):
    with pytest.raises(InputError, match="not a diffusion model"):
        load_source(str(source.parents[1] / "stage" / "model.safetensors"))


def test_the_decoder_takes_no_more_at_once_than_the_network(monkeypatch):
    """So that going on with fewer pictures, where memory runs out, helps it too."""
    network, seen = load_source("toyfaces-latent"), []
    decoder = network.first_stage.decoder
    whole = decoder.forward

    def forward(z):
        seen.append(len(z))
        return whole(z)

    monkeypatch.setattr(decoder, "forward", forward)
    few = network.sample(range(5), 1, batch_size=2)
    many = network.sample(range(5), 1)
    assert seen == [2, 2, 1, 5] and torch.allclose(few, many, atol=1e-3)
