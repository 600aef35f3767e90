"""experiments/benchmark.py: what it counts, and that it runs what train_tan.py runs.  Times are not tested."""

import contextlib
import dataclasses

import pytest
import torch
from conftest import call, tiny_network
from torch import nn

import adaptor
from adversarial_noise import worst_case_noise
from experiments import benchmark
from experiments.benchmark import Options
from experiments.measuring import Convolution, convolutions, flops, forward_and_input_gradient
from plumbing.options import InputError

CPU = torch.device("cpu")


@pytest.fixture
def work():
    return benchmark.prepare(tiny_network(), Options(batch_size=3, micro_batch_size=2), CPU)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """The plain recipe with two steps, for time."""
    monkeypatch.setattr(benchmark, "PLAIN_STEPS", 2)


def test_flops_of_a_convolution():
    """2 C C' k^2 H' W' for each picture, and again for each gradient."""
    x, conv = torch.randn(2, 4, 8, 8, requires_grad=True), nn.Conv2d(4, 6, 3, stride=2, padding=1)
    one = 2 * 4 * 6 * 9 * 4 * 4 * 2
    with torch.no_grad():
        assert flops(lambda: conv(x)) == one
    assert flops(lambda: conv(x * 1).sum().backward()) == 3 * one
    weight = conv.weight.detach()
    assert flops(lambda: forward_and_input_gradient(x.detach(), weight, (2, 2), (1, 1))) == 2 * one


def test_flops_of_attention():
    """Two products of (L, d) and (d, L), four more and one repeated in the backward pass."""
    q, k, v = (torch.randn(2, 3, 16, 8, requires_grad=True) for _ in range(3))
    one = 2 * 2 * 3 * 16 * 16 * 8
    with torch.no_grad():
        assert flops(lambda: nn.functional.scaled_dot_product_attention(q, k, v)) == 2 * one
    assert flops(lambda: nn.functional.scaled_dot_product_attention(q, k, v).sum().backward()) == 7 * one


def test_the_convolutions_of_a_network_are_found(work):
    x0, t, _ = next(work.micro_batches())
    found = convolutions(work.theta, x0, t)
    layers = [m for m in work.theta.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d))]
    assert found.total() == len(layers)  # each is used once in a pass
    assert found[Convolution((2, 3, 16, 16), (16, 3, 3, 3), (1, 1), (1, 1))] == 1
    psi = sum(isinstance(m, nn.Conv2d) for m in work.model.modules()) - sum(isinstance(m, nn.Conv2d) for m in layers)
    assert psi == 2 * len(adaptor.blocks(work.model))
    assert convolutions(work.model, x0, t).total() == len(layers) + psi
    assert not any(m._forward_hooks for m in work.theta.modules())


def test_what_is_run_alone_has_the_flops_of_the_network(work):
    """A PGD step of theta has the floor's FLOPs, and besides them only attention, linear layers and the like."""
    x0, t, eps = next(work.micro_batches())
    total = sum(count * flops(lambda c=c: forward_and_input_gradient(torch.randn(c.input), torch.randn(c.weight), *c[2:]))
                for c, count in convolutions(work.theta, x0, t).items())
    step = flops(lambda: worst_case_noise(work.theta, work.schedule, x0, t, eps, 1))
    assert 0.85 * step < total < step


def test_hooks_are_gone_after_an_error(work):
    with pytest.raises(ValueError, match="5 channels"):
        convolutions(work.theta, torch.zeros(1, 5, 16, 16), torch.zeros(1, dtype=torch.long))
    assert not any(m._forward_hooks for m in work.theta.modules())


def test_the_gradient_alone_is_that_of_autograd():
    x, weight = torch.randn(2, 3, 6, 6, requires_grad=True), torch.randn(4, 3, 3, 3)
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        real = torch.ops.aten.convolution_backward
        patch.setattr(torch.ops.aten, "convolution_backward", lambda *args: calls.append(real(*args)))
        forward_and_input_gradient(x.detach(), weight, (1, 1), (1, 1))
    out = nn.functional.conv2d(x, weight, padding=1)
    expected, = torch.autograd.grad(out, x, out.detach())  # the gradient with respect to `out` is `out` here
    torch.testing.assert_close(calls[0][0], expected)
    assert calls[0][1] is None and calls[0][2] is None


def test_the_iteration_trains_psi_alone(work):
    before = {name: p.clone() for name, p in work.model.named_parameters()}
    benchmark.iteration(work, 2)
    changed = {name for name, p in work.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(".adaptor." in name for name in changed)
    assert all(p.grad is None for name, p in work.model.named_parameters() if ".adaptor." not in name)


def test_the_plain_recipe_computes_the_same_and_cleans_up(work):
    x0, t, eps = work.batch
    expected, losses = worst_case_noise(work.model, work.schedule, x0, t, eps, 3, 0.1)
    work.model.requires_grad_(True)
    found, plain_losses = benchmark.plain_ascent(work.model, work.schedule, x0, t, eps, 3, 0.1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(plain_losses, losses, atol=1e-3, rtol=1e-4)
    adapted = {id(p) for p in adaptor.parameters(work.model)}
    for p in work.model.parameters():
        p.requires_grad_(id(p) in adapted)
    benchmark.plain_iteration(work)
    for p in work.model.parameters():
        assert p.requires_grad == (id(p) in adapted) and (p.grad is None) == (id(p) not in adapted)
    assert not work.model.use_checkpoint and not work.classifier.use_checkpoint


def test_a_low_rank_psi_adds_no_convolution():
    """It changes the weights of theta's: a PGD step then has theta's FLOPs, and the products of B and A."""
    work = benchmark.prepare(tiny_network(), Options(batch_size=3, adaptor="low-rank"), CPU)
    x0, t, _ = work.batch
    assert convolutions(work.model, x0, t) == convolutions(work.theta, x0, t)
    products = flops(lambda: [psi.B @ psi.A for psi in work.model.modules() if isinstance(psi, adaptor.LowRank)])
    alone, adapted = (flops(lambda model=model: benchmark.pgd_step(work, model)) for model in (work.theta, work.model))
    assert adapted == alone + products > alone


def test_the_plain_recipe_has_more_flops(work):
    mine, plain = flops(lambda: benchmark.iteration(work, 2)), flops(lambda: benchmark.plain_iteration(work))
    assert 1.6 < plain / mine < 2.2  # forward twice and both gradients: 4 passes for 2, less attention's weights


def test_sizes_are_those_of_train_tan():
    small = benchmark.prepare(tiny_network(), Options(), CPU)
    assert (len(small.batch[0]), small.micro) == (16, 16)
    assert benchmark.PUBLISHED == ("ffhq256", "adm256", "ddpm256", "ldm-ffhq256", "ldm-church256")


def test_peak_memory_is_in_bytes():
    done = []
    before = benchmark.peak_memory(lambda: done.append(1), CPU)
    assert done and 2 ** 25 < before < 2 ** 40  # torch alone has more than 32 MiB
    assert benchmark.peak_memory(lambda: None, CPU) >= before


def table_of(out):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("|")]


FEW = ("--batch-size", 3, "--micro-batch-size", 2, "--repeats", 1, "--device", "cpu")


@pytest.mark.parametrize("more", [(), ("--precision", "bf16", "--checkpoint-blocks")])
def test_the_table(more, tiny, capsys):
    call(benchmark.main, "--source", tiny.source, "--pgd-steps", 3, 1, *FEW, *more)
    head, _, *rows = table_of(capsys.readouterr().out)
    assert head == benchmark.HEAD and all(len(row) == len(head) for row in rows)
    assert [row[:3] for row in rows] == [["source.safetensors", "3 by 2", "3"], ["source.safetensors", "3 by 2", "1"]]
    assert rows[0][11] == rows[1][11]  # one plain recipe
    assert all(float(row[8].removesuffix(" T")) >= 0 for row in rows)


def test_published_networks_have_rows_of_their_own(monkeypatch, tiny, capsys):
    small = dict(network="UNet", config=tiny_network().description["config"], schedule={})
    for name in ("ffhq256", "ddpm256"):
        monkeypatch.setitem(benchmark.ARCHITECTURES, name, small)
    call(benchmark.main, "--arch", "ffhq256", "ddpm256", "--pgd-steps", 1, *FEW)
    assert [row[0] for row in table_of(capsys.readouterr().out)[2:]] == ["ffhq256", "ddpm256"]


@pytest.mark.parametrize("change, says", [
    (dict(pgd_steps=(0,)), "--pgd-steps 0: must be at least 1"),
    (dict(repeats=0), "--repeats 0: must be at least 1"),
    (dict(source="nowhere.pt"), "nowhere.pt: no such file"),
])
def test_errors(change, says, monkeypatch):
    monkeypatch.setattr(benchmark, "parse", lambda *_: (dataclasses.replace(Options(device="cpu"), **change), frozenset()))
    with pytest.raises(InputError, match=says):
        benchmark.main()


@pytest.mark.parametrize("fits", [2, 0])
def test_fewer_pictures_where_memory_runs_out(fits, monkeypatch, tiny, capsys):
    ascend = benchmark.plain_ascent

    def limited(model, schedule, x0, *a):
        if len(x0) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return ascend(model, schedule, x0, *a)
    monkeypatch.setattr(benchmark, "plain_ascent", limited)
    given = ("--source", tiny.source, "--batch-size", 5, "--pgd-steps", 1, "--repeats", 1, "--device", "cpu")
    if not fits:
        with pytest.raises(InputError, match="out of memory with 1 picture at once; --checkpoint-blocks"):
            call(benchmark.main, *given)
        return
    call(benchmark.main, *given)
    said = capsys.readouterr()
    assert "going on with 2 (--micro-batch-size 2 saves" in said.err
    assert [row[1] for row in table_of(said.out)[2:]] == ["5 by 2"]


def test_memory_that_runs_out_leaves_the_network_as_it_was(work, monkeypatch):
    def full(*a):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(benchmark, "plain_ascent", full)
    with pytest.raises(torch.OutOfMemoryError):
        benchmark.plain_iteration(work)
    assert sum(p.requires_grad for p in work.model.parameters()) == len(adaptor.parameters(work.model))
    assert not work.model.use_checkpoint and not work.classifier.use_checkpoint


def test_flops_of_a_part_are_those_of_the_batch(work, monkeypatch):
    """Of two thirds of its pictures, those that go through the network together."""
    whole, found = flops(lambda: benchmark.iteration(work, 1)), []
    monkeypatch.setattr(benchmark, "row", lambda J, best, peak, count: found.append(count) or [])
    benchmark.measure("tiny", work, Options(pgd_steps=(1,), repeats=1), micro=2)
    assert found == [pytest.approx(whole, rel=1e-6)]


def test_what_is_compiled(monkeypatch):
    """The network with and without psi; the plain recipe and the count of FLOPs go without."""
    compiled, done, depth = [], [], []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    work = benchmark.prepare(tiny_network(), Options(batch_size=2, compile=True), CPU)
    assert compiled == [work.model, work.theta]

    @contextlib.contextmanager
    def eager():
        depth.append(None)
        yield
        depth.pop()
    monkeypatch.setattr(benchmark, "eager", eager)
    monkeypatch.setattr(benchmark, "iteration", lambda work, steps, *plain: done.append((steps, bool(plain), bool(depth))))
    benchmark.measure("tiny", work, Options(pgd_steps=(1,), repeats=1), micro=2)
    assert done == [(2, True, True), (1, False, False), (1, False, False), (1, False, True), (2, True, True), (1, False, False)]


def test_eager_passes_by_what_is_compiled():
    calls, layer = [], nn.Linear(2, 2)
    layer.compile(backend=lambda graph, inputs: lambda *args: calls.append(1) or graph(*args))
    with benchmark.eager():
        layer(torch.ones(1, 2))
    assert not calls
    layer(torch.ones(1, 2))
    assert calls
