"""The weights that come with the code do what they are for, on freshly drawn pictures."""

import pytest
import torch

import domains
from checkpoints.load import ASSETS, load_network, load_source
from classifier import from_unet
from ddpm import predict_eps
from domains import judge
from plumbing.pictures import to_tensor


@pytest.mark.parametrize("source, limit", [
    ("toyfaces", 0.02), ("toychurches", 0.02), ("toyfaces-latent", 0.06), ("photofaces", 0.5)])  # of photofaces: drawn ones
def test_the_built_in_sources_denoise_fresh_pictures(source, limit):
    network = load_source(source)
    pixels, _ = domains.evaluation_pictures(domains.drawn_by(source) or "toyfaces", 64, network.image_size)
    x0 = network.encode(to_tensor(pixels))
    g = torch.Generator().manual_seed(0)
    t, eps = torch.randint(1000, (64,), generator=g), torch.randn(x0.shape, generator=g)
    with torch.no_grad():
        predicted = predict_eps(network.model, network.schedule.add_noise(x0, t, eps), t, network.schedule)
    # 1 for a model that knows nothing; about half the limit at the end of its training
    assert (eps - predicted).square().mean() < limit


@pytest.mark.parametrize("source, error, spread", [
    ("toyfaces-latent", 0.04, 0.1), ("photofaces", 0.1, 0.5)])  # photofaces has never seen a drawing
def test_the_latent_sources_decode_what_they_encode(source, error, spread):
    network = load_source(source)
    pictures = to_tensor(domains.evaluation_pictures("toyfaces", 16, 64)[0])
    latents = network.encode(pictures)
    assert network.shape == (4, 16, 16) and (network.decode(latents) - pictures).abs().mean() < error
    assert latents.std() == pytest.approx(1, abs=spread)


@pytest.mark.parametrize("domain", [*domains.SOURCES, *filter(judge.has_seen, domains.TARGETS)])
def test_the_judge_knows_domains_and_attributes(domain):
    assert sum(map(judge.has_seen, domains.TARGETS)) >= 7
    source = domains.TARGETS.get(domain, domain)
    network = judge.load_judge(source)
    pixels, labels = domains.evaluation_pictures(domain, 100)
    seen = judge.attributes(network, to_tensor(pixels))
    right = seen["domain"] == network.description["attributes"]["domain"].index(domain)
    assert right.float().mean() > 0.97
    if domain in ("toyfaces", "sunglasses"):  # others leave out hair or colour
        truth = dict(zip(domains.ATTRIBUTES[source], torch.from_numpy(labels.T)))
        for name in ("hair_colour", "skin"):
            assert (seen[name] == truth[name]).float().mean() > 0.95


def test_the_built_in_classifier_fits_the_source_and_says_what_made_it():
    classifier, source = load_network(ASSETS / "toyfaces-classifier.safetensors"), load_source("toyfaces")
    assert classifier.model.image_size == from_unet(source.model).image_size == 32
    assert all("pretrain.py toyfaces" in n.description["made_by"] for n in (classifier, source))
