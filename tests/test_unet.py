"""unet.py against the outputs of guided-diffusion itself (tests/golden)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, tiny_network
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import adaptor
from classifier import Classifier
from unet import AttentionBlock, GroupNorm, ResBlock, UNet, Upsample, attend

GOLDEN = Path(__file__).parent / "golden"


def state(golden):
    """The parameters of a golden file's network, filled by its rule."""
    keys = sorted(golden["keys"])
    tensors = {}
    for i, key in enumerate(keys):
        values = np.random.RandomState(i).standard_normal(golden["keys"][key]).astype(np.float32) * 0.05
        tensors[key] = torch.from_numpy(values + 1 if key.endswith("weight") and values.ndim == 1 else values)
    return tensors


def filled(cls, golden):
    """That network, if it is one of ours."""
    model = cls(**golden["config"]).eval()
    model.load_state_dict(state(golden))  # strict: names and shapes are guided-diffusion's
    return model


def golden_case(name):
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    x = np.random.RandomState(12345).standard_normal(golden["input_shape"]).astype(np.float32)
    return golden, torch.from_numpy(x), torch.tensor(golden["t"]), torch.tensor(golden["output"]).view(golden["output_shape"])


@pytest.mark.parametrize("name, cls", [("adm_unet_conv_resample", UNet), ("adm_unet_updown_scaleshift", UNet),
                                       ("adm_classifier_attention_pool", Classifier)])
def test_golden(name, cls):
    golden, x, t, expected = golden_case(name)
    with torch.no_grad():
        assert (filled(cls, golden)(x, t) - expected).abs().max() < 1e-4


def test_a_new_network_begins_with_blocks_that_add_nothing():
    """As in guided-diffusion: the last layer of each block, and of the whole, is 0."""
    unet = UNet(**TINY)
    last = [block.out_layers[-1] for block in unet.modules() if isinstance(block, ResBlock)]
    last += [block.proj_out for block in unet.modules() if isinstance(block, AttentionBlock)] + [unet.out[-1]]
    assert len(last) > 5 and not any(p.any() for layer in last for p in layer.parameters())


def test_dropout_is_on_in_training_alone():
    unet, x, t = UNet(**TINY, dropout=0.5), torch.ones(2, 3, 16, 16), torch.tensor([3, 800])
    for p in unet.parameters():
        torch.nn.init.normal_(p, std=0.1)
    assert unet.eval()(x, t).equal(unet(x, t)) and not unet.train()(x, t).equal(unet(x, t))


def test_checkpointing_gives_the_input_gradient_of_a_frozen_network():
    golden, x, t, _ = golden_case("adm_unet_updown_scaleshift")
    model = filled(UNet, golden).requires_grad_(False)
    gradients = []
    for model.use_checkpoint in (False, True):
        x = x.detach().requires_grad_()
        gradients.append(torch.autograd.grad(model(x, t).square().sum(), x)[0])
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1])


def test_image_that_does_not_divide_is_refused():
    golden, *_ = golden_case("adm_unet_conv_resample")
    with pytest.raises(ValueError, match="divisible by 2"):
        filled(UNet, golden)(torch.zeros(1, 3, 15, 16), torch.tensor([0]))


def test_fused_attention_takes_the_tokens():
    """Under FLASH_ATTENTION alone anything it refuses is an error; against softmax(q k / sqrt(d)) v by hand."""
    q, k, v = torch.randn(3, 2, 4, 8, 25)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        found = attend(q, k, v)
    weights = (torch.einsum("bhdi,bhdj->bhij", q, k) / 8 ** 0.5).softmax(3)
    expected = torch.einsum("bhij,bhdj->bhdi", weights, v).flatten(1, 2)
    torch.testing.assert_close(found, expected)
    unet = UNet(**TINY)
    adaptor.attach(unet, 4)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        unet(torch.randn(2, 3, 16, 16).requires_grad_(), torch.tensor([1, 2])).sum().backward()


def test_nothing_large_is_in_fp32_where_the_network_computes_in_bf16():
    """Norms and enlargements, which autocast would have in fp32: twice the memory of everything between convolutions."""
    unet, x = tiny_network(use_scale_shift_norm=True, resblock_updown=True).model, torch.randn(2, 3, 16, 16)
    adaptor.attach(unet, 4)
    exact, kinds = unet(x, torch.tensor([3, 40])), set()
    for layer in unet.modules():
        if isinstance(layer, (nn.GroupNorm, nn.SiLU, Upsample)):
            layer.register_forward_hook(lambda layer, inputs, out: kinds.add((type(layer), out.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        found = unet(x, torch.tensor([3, 40]))
    assert kinds == {(GroupNorm, torch.bfloat16), (nn.SiLU, torch.bfloat16), (Upsample, torch.bfloat16)}
    assert 0 < (found - exact).abs().max() < 0.05 * exact.abs().max()
