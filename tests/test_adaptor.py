"""adaptor.py: step 0 is the source model bit for bit, only psi learns, and psi is as small as in Table 1."""

import pytest
import torch
import torch.nn.functional as F
from conftest import call, tiny_network
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.functional import resize

import adaptor
import sample
from checkpoints import run_folder
from checkpoints.load import load_source
from checkpoints.published import ARCHITECTURES
from plumbing import distributed
from plumbing.pictures import read_array, to_uint8
from unet import AttentionBlock, ResBlock, UNet

SMALL = dict(image_size=16, in_channels=3, model_channels=8, out_channels=3, num_res_blocks=1, attention_resolutions=[2],
             channel_mult=[1, 2], norm_groups=4)
CONFIGS = {
    "plain": SMALL,
    "updown": dict(SMALL, resblock_updown=True, use_scale_shift_norm=True, num_head_channels=8),
    "learned-sigma": dict(SMALL, resblock_updown=True, out_channels=6),
    "deep": dict(SMALL, channel_mult=[1, 1, 2], num_res_blocks=2, dropout=0.1),
    "checkpointed": dict(SMALL, use_checkpoint=True),
    "ho": dict(SMALL, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6, downsample_padding=0),
}
T = torch.tensor([3, 800])
FOLDED = [form for form in adaptor.FORMS if form != "bottleneck"]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def perturb(parameters, scale=0.2):
    """Away from the zeros that would make every comparison trivial: the U-Net's own last layer is one, too."""
    for i, p in enumerate(parameters):
        p.data += scale * randn(*p.shape, seed=i)


def source(config="updown"):
    torch.manual_seed(0)
    unet = UNet(**CONFIGS[config]).eval()
    perturb(unet.parameters())
    return unet


def attached(config="updown", width=4, form="bottleneck"):
    unet = source(config)
    adaptor.attach(unet, width, form)
    return unet


# ---- step 0 ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("form, height, width", [
    ("bottleneck", 16, 16), ("bottleneck", 32, 32), ("bottleneck", 48, 48), ("bottleneck", 12, 40),
    ("scale-shift", 16, 24), ("low-rank", 16, 24)])
@pytest.mark.parametrize("bf16", [False, True])
def test_attached_is_the_source_bit_for_bit(config, form, height, width, bf16):
    unet, x = source(config), randn(2, 3, height, width)
    eps = torch.autocast("cpu", torch.bfloat16, enabled=bf16)(lambda: unet(x, T))  # anew, with no weights kept
    before = eps()
    adaptor.attach(unet, 4, form)
    assert before.abs().max() > 0.1 and eps().equal(before)
    perturb(adaptor.parameters(unet))
    assert not eps().equal(before)


def test_every_residual_block_has_one():
    unet = attached("deep")
    assert len(adaptor.blocks(unet)) == 3 * 2 + 2 + 3 * 3  # down, middle, up
    assert all(block.adaptor is not None for block in adaptor.blocks(unet).values())


def test_the_bottleneck_written_out():
    """With torch's own attention, at a size where both poolings and the upsampling do something."""
    psi, x, emb = adaptor.Adaptor(8, 32, 12, width=4, scale=1, norm_groups=4), randn(2, 8, 48, 48), randn(2, 32)
    perturb(psi.parameters(), 0.5)
    h = psi.down(F.silu(F.group_norm(x.unfold(2, 3, 3).unfold(3, 3, 3).mean((4, 5)), 4, psi.norm_in.weight, psi.norm_in.bias)))
    h = h + psi.time(F.silu(emb))[:, :, None, None]
    attended = h.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))                    # 16x16 tokens see 8x8 of them
    h, attended = h.flatten(2).transpose(1, 2), attended.flatten(2).transpose(1, 2)
    attention = nn.MultiheadAttention(4, 1, batch_first=True)
    attention.in_proj_weight.data = torch.cat([psi.query.weight, psi.key_value.weight])
    attention.in_proj_bias.data = torch.cat([psi.query.bias, psi.key_value.bias])
    attention.out_proj = psi.proj
    seen = psi.norm_attention(attended)
    h = h + attention(psi.norm_attention(h), seen, seen)[0]
    h = (h + psi.mlp(psi.norm_mlp(h))).transpose(1, 2).view(2, 4, 16, 16)
    h = resize(h, [48, 48], antialias=False)                                     # bilinear
    torch.testing.assert_close(psi(x, emb), psi.up(F.silu(psi.norm_out(h))), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sides", [(16, 16), (24, 40), (33, 20)])
def test_pooling_and_upsampling_are_the_same_on_a_gpu(sides, monkeypatch):
    x = randn(2, 3, *sides)
    expected = adaptor.pool(x, 8), adaptor.upsample(x, (70, 50))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)  # there they are products
    found = adaptor.pool(x, 8), adaptor.upsample(x, (70, 50))
    torch.testing.assert_close(found, expected)
    assert not found[1].is_contiguous() and expected[1].is_contiguous()  # transposed: by the other way indeed


@pytest.mark.parametrize("scale, size", [(1, (16, 24)), (2, (32, 48)), (0.5, (8, 12))])
def test_adaptor_has_the_output_size_of_its_block(scale, size):
    psi = adaptor.Adaptor(8, 32, 12, width=4, scale=scale, norm_groups=4)
    assert psi(randn(2, 8, 16, 24), randn(2, 32)).shape == (2, 12, *size)


@pytest.mark.parametrize("size, seen, attended", [
    ((8, 8), 64, 64), ((16, 16), 64, 64), ((32, 32), 256, 64), ((16, 32), 8 * 16, 4 * 8), ((256, 256), 256, 64),
    ((33, 33), 11 * 11, 6 * 6)])
def test_how_many_tokens_there_are(size, seen, attended):
    psi, shapes = adaptor.Adaptor(8, 32, 12, width=4, scale=1, norm_groups=4), []
    for layer in (psi.query, psi.key_value):
        layer.register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape))
    psi(randn(2, 8, *size), randn(2, 32))
    assert shapes == [(2, seen, 4), (2, attended, 4)]


def test_adaptor_sees_image_and_time_and_adds_to_its_block():
    unet = attached()
    block = adaptor.blocks(unet)["middle_block.0"]
    perturb(block.adaptor.parameters())
    x, emb = randn(2, block.channels, 8, 8), randn(2, block.emb_channels)
    psi = block.adaptor(x, emb)
    assert (psi - block.adaptor(x + randn(*x.shape, seed=1), emb)).abs().max() > 1e-3
    assert (psi - block.adaptor(x, emb + 1)).abs().max() > 1e-3
    alone = adaptor.source_model(unet).get_submodule("middle_block.0")
    torch.testing.assert_close(block(x, emb), alone(x, emb) + psi)  # section 4.3


# ---- what learns -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("form", adaptor.FORMS)
def test_only_psi_learns(form):
    theta, unet = source().state_dict(), attached(form=form)
    psi = {name for name, p in unet.named_parameters() if p.requires_grad}
    assert psi == adaptor.state_dict(unet).keys() and all(".adaptor." in name for name in psi)
    assert sum(p.numel() for p in adaptor.parameters(unet)) == sum(p.numel() for p in unet.parameters() if p.requires_grad)
    unet(randn(2, 3, 16, 16), T).square().sum().backward()
    assert {name for name, p in unet.named_parameters() if p.grad is not None} == psi
    assert unet.state_dict().keys() - psi == theta.keys()  # theta's own names


@pytest.mark.parametrize("form", adaptor.FORMS)
@pytest.mark.parametrize("config", CONFIGS)
def test_no_branch_is_dead(config, form):
    """One step moves psi's last layers off zero; from then on every tensor of every adaptor has a gradient."""
    unet, x = attached(config, form=form), randn(2, 3, 32, 32)
    optimiser = torch.optim.Adam(adaptor.parameters(unet), 0.01)
    for _ in range(2):
        optimiser.zero_grad()
        (unet(x, T) - x.mean()).square().mean().backward()
        gradients = {name: p.grad.abs().max().item() for name, p in unet.named_parameters() if p.requires_grad}
        optimiser.step()
    assert [name for name, size in gradients.items() if size < 1e-7] == []


# ---- off and on ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("form", adaptor.FORMS)
def test_the_source_model_shares_theta_and_lacks_psi(form):
    unet, x = source(), randn(2, 3, 16, 16)
    before = unet(x, T)
    adaptor.attach(unet, form=form)
    perturb(adaptor.parameters(unet))
    adapted, theta = unet(x, T), adaptor.source_model(unet)
    assert theta(x, T).equal(before) and not adaptor.state_dict(theta)
    assert unet(x, T).equal(adapted) and not adapted.equal(before)
    own = dict(unet.named_parameters())
    assert all(p is own[name] for name, p in theta.named_parameters())


@pytest.mark.parametrize("form", adaptor.FORMS)
def test_attaching_twice_is_refused(form):
    with pytest.raises(ValueError, match="already has adaptors"):
        adaptor.attach(attached(form=form))


# ---- psi in a file ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("form", adaptor.FORMS)
def test_round_trip(form):
    unet, other, x = attached(form=form), attached(form=form), randn(2, 3, 16, 16)
    perturb(adaptor.parameters(unet))
    adaptor.load_state_dict(other, {key: value.clone() for key, value in adaptor.state_dict(unet).items()})
    assert other(x, T).equal(unet(x, T))
    assert all(p.requires_grad for p in adaptor.parameters(other))


@pytest.mark.parametrize("form", adaptor.FORMS)
def test_the_weights_of_another_form_do_not_fit(form):
    other = next(another for another in adaptor.FORMS if another != form)
    with pytest.raises(KeyError, match="adaptor weights: (unexpected|missing) key .*.adaptor."):
        adaptor.load_state_dict(attached(form=form), adaptor.state_dict(attached(form=other)))


@pytest.mark.parametrize("fault, message", [
    (lambda psi, key: psi.pop(key), "missing key {}"),
    (lambda psi, key: psi.update({key + "2": psi[key]}), "unexpected key {}2"),
    (lambda psi, key: psi.update({key: psi[key][:1]}), "{} has shape"),
], ids=["missing", "unexpected", "misshapen"])
def test_faulty_weights_are_named_and_change_nothing(fault, message):
    unet, key = attached(), "middle_block.0.adaptor.up.weight"
    psi = {name: torch.ones_like(value) for name, value in adaptor.state_dict(unet).items()}
    fault(psi, key)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    with pytest.raises(KeyError, match=message.format(key)):
        adaptor.load_state_dict(unet, psi)
    assert all(value.equal(before[name]) for name, value in unet.state_dict().items())


# ---- Table 1, second column ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, millions, percent", [("ffhq256", 93.56, 1.3), ("ldm-ffhq256", 274.06, 1.6)])
def test_parameter_rate_is_near_the_papers(name, millions, percent):
    with torch.device("meta"):  # shapes without memory
        unet = UNet(**ARCHITECTURES[name]["config"])
        theta = sum(p.numel() for p in unet.parameters())
        adaptor.attach(unet)
    psi = sum(p.numel() for name, p in unet.named_parameters() if ".adaptor." in name)
    assert abs(theta / 1e6 - millions) < 0.01
    assert adaptor.parameter_rate(unet) == pytest.approx(psi / theta)
    assert abs(100 * psi / theta - percent) < 0.6 and adaptor.default_width(unet) % 8 == 0


@pytest.mark.parametrize("name, form, percent", [
    ("ffhq256", "scale-shift", 0.05), ("ddpm256", "scale-shift", 0.05), ("ffhq256", "low-rank", 1.0),
    ("ldm-ffhq256", "low-rank", 0.6)])
def test_parameter_rate_of_the_other_forms(name, form, percent):
    with torch.device("meta"):
        unet = UNet(**ARCHITECTURES[name]["config"])
        adaptor.attach(unet, form=form)
    assert 100 * adaptor.parameter_rate(unet) == pytest.approx(percent, rel=0.1)


# ---- scale-shift and low-rank: changes of theta's layers ---------------------------------------------------------------

@pytest.mark.parametrize("form, kinds, leaf", [("scale-shift", nn.GroupNorm, "scale"),
                                              ("low-rank", (nn.Conv1d, nn.Conv2d), "A")])
def test_where_psi_is(form, kinds, leaf):
    """In each norm or convolution of the residual and attention blocks, and in no other."""
    blocks = [m for m in source("deep").modules() if isinstance(m, (ResBlock, AttentionBlock))]
    expected = sum(isinstance(layer, kinds) for block in blocks for layer in block.modules())
    places = [key for key in adaptor.state_dict(attached("deep", form=form)) if key.endswith(f".adaptor.{leaf}")]
    assert len(places) == expected > 20
    assert not [key for key in places if key.startswith(("input_blocks.0.", "out.", "time_embed."))]


def test_scale_shift_is_the_norm_with_other_weights():
    unet, x = attached(form="scale-shift"), randn(2, 16, 8, 8)
    norm = unet.get_submodule("middle_block.0.in_layers.0")
    perturb(norm.adaptor.parameters())
    scale, shift = norm.weight + norm.adaptor.scale, norm.bias + norm.adaptor.shift
    flat = x.unflatten(1, (4, 4)).flatten(2)
    flat = (flat - flat.mean(2, keepdim=True)) / (flat.var(2, keepdim=True, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x), flat.view_as(x) * scale[:, None, None] + shift[:, None, None])


@pytest.mark.parametrize("name", ["middle_block.0.in_layers.2", "middle_block.1.qkv", "output_blocks.0.0.skip_connection"])
@pytest.mark.parametrize("rank", [2, 4])
def test_low_rank_is_the_convolution_with_another_weight(name, rank):
    """Hu et al. 2021: W + (alpha / r) B A, alpha = 4 here."""
    conv = attached(width=rank, form="low-rank").get_submodule(name)
    bound = conv.weight[0].numel() ** -0.5  # as torch begins a convolution
    assert 0.8 * bound < conv.adaptor.A.abs().max() <= bound and not conv.adaptor.B.any()
    perturb(conv.adaptor.parameters())
    x = randn(2, conv.in_channels, *[8] * (conv.weight.ndim - 2))
    change = torch.einsum("or,ri...->oi...", conv.adaptor.B, conv.adaptor.A.view(rank, *conv.weight.shape[1:]))
    assert torch.linalg.matrix_rank(change.flatten(1)) == rank
    convolve = F.conv2d if x.ndim == 4 else F.conv1d
    expected = convolve(x, conv.weight + 4 / rank * change, conv.bias, padding=conv.padding)
    torch.testing.assert_close(conv(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FOLDED)
@pytest.mark.parametrize("config", CONFIGS)
def test_folded_is_unfolded(config, form):
    unet, theta, x = attached(config, 2, form), source(config), randn(2, 3, 16, 16)
    perturb(adaptor.parameters(unet), 0.1)
    adapted, before = unet(x, T), theta(x, T)
    adaptor.fold(unet)
    assert not adaptor.state_dict(unet) and unet.state_dict().keys() == theta.state_dict().keys()
    assert (adapted - before).abs().max() > 0.01
    theta.load_state_dict(unet.state_dict())  # a plain network
    for folded in (unet(x, T), theta(x, T)):
        torch.testing.assert_close(folded, adapted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FOLDED)
def test_a_run_goes_on_and_samples(form, train, tiny, tmp_path):
    flags = ["--method", "adaptor", "--adaptor", form, "--learning-rate", "0.01", "--learning-rate-decay", "none"]
    whole = train(tmp_path / "whole", *flags, "--iterations", "4", "--checkpoint-blocks")
    run = train(tmp_path / "run", *flags, "--iterations", "2")
    train(run, *flags, "--iterations", "4", "--resume")
    psi, expected = load_file(run / "weights.safetensors"), load_file(whole / "weights.safetensors")
    assert psi.keys() == expected.keys() and all(".adaptor." in key for key in psi)
    for key, value in psi.items():
        torch.testing.assert_close(value, expected[key])
    adapted, folded = run_folder.load_run(run)[0], run_folder.load_model(str(run), None)[0]
    assert adaptor.state_dict(adapted.model).keys() == psi.keys() and not adaptor.state_dict(folded.model)
    x, source = randn(2, 3, 16, 16), load_source(str(tiny.source))
    torch.testing.assert_close(folded.model(x, T), adapted.model(x, T), atol=1e-5, rtol=1e-5)
    assert (folded.model(x, T) - source.model(x, T)).abs().max() > 0.01
    call(sample.main, run, "-n", 2, "--steps", 2, "--device", "cpu")
    drawn = torch.stack([read_array(file) for file in sorted((run / "drawn").iterdir())])
    assert (drawn.int() - to_uint8(adapted.sample(range(2), 2)).int()).abs().max() <= 1


def test_a_bottleneck_is_not_folded():
    unet, x = attached(), randn(2, 3, 16, 16)
    perturb(adaptor.parameters(unet))
    before, psi = unet(x, T), adaptor.state_dict(unet).keys()
    adaptor.fold(unet)
    assert unet(x, T).equal(before) and adaptor.state_dict(unet).keys() == psi


def test_attention_and_mlp_are_residual():
    """Of branches that give nothing, what goes in is left."""
    psi = attached().get_submodule("middle_block.0.adaptor")
    for layer in (psi.proj, psi.mlp[2]):
        nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    nn.init.normal_(psi.up.weight)
    x, emb = randn(2, psi.norm_in.num_channels, 8, 8), randn(2, psi.time.in_features)
    h = psi.down(F.silu(psi.norm_in(x))) + psi.time(F.silu(emb))[:, :, None, None]
    torch.testing.assert_close(psi(x, emb), psi.up(F.silu(psi.norm_out(h))))


def test_the_default_width_of_a_tiny_network_is_4():
    assert adaptor.default_width(source()) == 4  # 1.4 % of its parameters would be less than one channel


def test_psi_is_laid_out_as_its_network():
    network = tiny_network()
    adaptor.attach(network.model, 4)
    weights = [p for p in network.to("cpu").model.parameters() if p.dim() == 4 and p.shape[2] > 1]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    assert distributed.layout("cuda:1") == torch.contiguous_format


@pytest.mark.parametrize("form", adaptor.FORMS)
def test_no_norm_learns_from_channels_last_input_without_a_gradient(form):
    """There torch before 2.14 ends with a segmentation fault on a CPU."""
    unet = source("plain")
    adaptor.attach(unet, 4, form)
    unet.to(memory_format=torch.channels_last)
    found = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.native_group_norm_backward.default:
                (_, x, *_), wanted = args, args[-1]
                found.append(wanted)
                assert wanted[0] or x.is_contiguous()
            return func(*args, **kwargs or {})

    loss = unet(randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last), T).square().sum()
    with Watch():
        loss.backward()
    assert found
    has_norms = adaptor.FORMS[form] in (ResBlock, nn.GroupNorm)
    assert [False, True, True] in found or not has_norms  # the case that is meant is there
