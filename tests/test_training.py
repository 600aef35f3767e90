"""What every training program shares (plumbing/): averages, the loop, bars, files that are whole or absent."""

import io
import json
import math
import os
import signal
import time

import pytest
import torch

from checkpoints.run_stats import Stats
from plumbing import distributed, progress
from plumbing.files import (
    add_metrics,
    load_checkpoint,
    read_metrics,
    remove_unfinished,
    trim_metrics,
    write_atomic,
)
from plumbing.options import InputError
from plumbing.seeds import generator
from plumbing.training import EMA, Loop, cosine_decay, warmup


def follow(decay, updates):
    """A parameter that is i + 1 after update i, started from 0, and its running average."""
    p = torch.nn.Parameter(torch.zeros(()))
    ema = EMA([p], decay)
    for i in range(updates):
        p.data.fill_(i + 1)
        ema.update()
    return p, ema


def test_gathering_puts_every_rank_s_items_in_their_places(monkeypatch):
    """As rank 1 of 2, whose items are the last two of five; the sum over ranks adds the first three."""
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed, "share", lambda n: slice(3, 5))
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda items: items + torch.tensor([1.0, 2, 3, 0, 0])[:, None])
    assert distributed.gather(torch.tensor([[4.0], [5.0]]), 5, torch.device("cpu")).tolist() == [[1], [2], [3], [4], [5]]


def test_ema_closed_form():
    decays = [min(0.5, (1 + i) / (10 + i)) for i in range(20)]  # the decay proper counts from update 8 on
    expected = sum((1 - d) * (i + 1) * math.prod(decays[i + 1:]) for i, d in enumerate(decays))
    assert follow(0.5, 20)[1].average[0].item() == pytest.approx(expected)


def test_ema_of_a_short_run_is_not_its_start():
    assert follow(0.9999, 1)[1].average[0].item() == pytest.approx(0.9)  # 0.0001 with the decay proper


def test_ema_swap():
    p, ema = follow(0.5, 3)
    average = ema.average[0].clone()
    ema.swap()
    assert p.item() == average and ema.average[0] == 3
    ema.swap()
    assert p.item() == 3 and ema.average[0] == average


def test_ema_goes_on_from_its_state():
    p, ema = follow(0.5, 3)
    other = EMA([p], 0.5)
    other.load_state_dict(ema.state_dict())
    for one in (ema, other):
        one.update()
    assert other.average[0] == ema.average[0] and other.updates == 4


def test_learning_rate():
    assert [warmup(i, 4) for i in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1] and warmup(0, 0) == 1
    assert [cosine_decay(i, 4) for i in (0, 2, 4)] == pytest.approx([1, 0.5, 0])


def test_generators():
    draw = lambda *key: torch.rand(4, generator=generator(*key))
    assert draw(0, 1, 2).equal(draw(0, 1, 2))
    # those of train_tan.py: the iterations, the classifier's training and its check
    keys = [(seed, *stream) for seed in (0, 1, 7) for stream in [(0, i) for i in range(50)] + [(2,), (3,)]]
    assert len({draw(*key)[0].item() for key in keys}) == len(keys)


def test_write_atomic(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, lambda temporary: temporary.write_text("old"))
    def half(temporary):
        temporary.write_text("ne")
        raise OSError("disk full")
    with pytest.raises(OSError):
        write_atomic(path, half)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_atomic(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_runs_no_code(tmp_path):
    class Malicious:
        def __reduce__(self):
            return open, (str(tmp_path / "created"), "w")
    torch.save({"parameters": Malicious()}, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match="checkpoint.pt: damaged"):
        load_checkpoint(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "created").exists()
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):  # what cannot be read is not damaged
        load_checkpoint(tmp_path / "folder")


def test_metrics_drop_what_lies_past_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [dict(iteration=i, loss=i / 3, seconds=0.1) for i in range(5)]
    path.write_text("\n".join(map(json.dumps, lines[:4])) + '\n{"iteration": 4, "lo')
    assert [line["iteration"] for line in read_metrics(path)] == [0, 1, 2, 3]
    trim_metrics(path, 2)
    add_metrics(path, **lines[2])
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines[:3]
    for damaged in ("[2]", '{"iteration": "3", "loss": 0, "seconds": 1}', '{"iteration": 3, "loss": 0}'):
        path.write_text(json.dumps(lines[0]) + "\n" + damaged + "\n")
        assert read_metrics(path) == lines[:1]
    trim_metrics(path, 0)
    assert path.read_text() == "" and read_metrics(tmp_path / "none.jsonl") == []


def test_stats():
    t = torch.tensor([0, 249, 250, 999, 750])
    losses, ascent = torch.tensor([1.0, 2, 3, 4, 5]), [torch.full((5,), 2.0), torch.full((5,), 2.5), torch.tensor([3.0, 3, 3, 3, 8])]
    guidance = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 3, 2, 2)
    residual = torch.full((5, 3, 2, 2), 2.0)
    stats = Stats(1000, torch.device("cpu"))
    for part in (slice(0, 2), slice(2, 5)):
        stats.add(t[part], losses[part], guidance[part], residual[part], [step[part] for step in ascent])
    line = stats.reduce()
    assert line["loss"] == pytest.approx(3) and line["loss_by_quarter"] == [1.5, 3, None, 4.5]
    assert line["guidance_rms"] == pytest.approx([0.5 ** 0.5, 2, None, 12.5 ** 0.5])  # sqrt((0 + 1)/2), 2, -, sqrt((9 + 16)/2)
    assert line["guidance_ratio"] == pytest.approx([0.5 ** 0.5 / 2, 1, None, 12.5 ** 0.5 / 2])
    assert line["pgd_gain"] == pytest.approx(24)  # 5 * 2^2 * 12 numbers / 10, at eps^0


def test_stats_without_guidance_and_ascent():
    stats = Stats(1000, torch.device("cpu"))
    stats.add(torch.tensor([0]), torch.tensor([1.0]), 0.0, torch.ones(1, 3, 2, 2), [])
    assert stats.reduce() == dict(loss=1, loss_by_quarter=[1, None, None, None])


# ---- the loop --------------------------------------------------------------------------------------------------------

def make_loop(out, iterations, events, state=None, save_every=2, rate=lambda iteration: 0.1 * (iteration + 1)):
    """A loop over one parameter by plain descent; `events` collects what it does and when."""
    out.mkdir(exist_ok=True)
    p = torch.nn.Parameter(torch.ones(2))
    optimizer, ema = torch.optim.SGD([p], lr=9.0), EMA([p], 0.5)
    loop = Loop(out, "test", iterations, save_every, 4, [p], optimizer, ema, rate, torch.device("cpu"), state,
                dict(extra="kept"), lambda done, saved: events.append(("after", done, saved)))
    save = loop.save
    loop.save = lambda done: (events.append(("save", done)), save(done))
    return loop, p, optimizer, ema


@pytest.mark.parametrize("first, then", [(True, False), (False, True), (False, False)])
def test_adam_goes_on_where_weights_lie_otherwise(first, then, tmp_path):
    """As of a GPU, where they are contiguous and Adam is fused, on a CPU, or back; against Adam without a stop."""
    g = torch.Generator().manual_seed(0)
    start, *gradients = torch.randn(5, 4, 3, 3, 3, generator=g)
    layouts = {True: torch.contiguous_format, False: torch.channels_last}
    whole = torch.nn.Parameter(start.clone())
    adam = torch.optim.Adam([whole], lr=0.1)
    for whole.grad in gradients:
        adam.step()
    state = None
    for fused, part in ((first, gradients[:2]), (then, gradients[2:])):
        p = torch.nn.Parameter(start.contiguous(memory_format=layouts[fused]))
        loop = Loop(tmp_path, "test", 4, 2, 4, [p], torch.optim.Adam([p], fused=fused), EMA([p], 0.5), lambda i: 0.1,
                    torch.device("cpu"), state, {}, lambda done, saved: None)
        for gradient, _ in zip(part, loop):
            p.grad = torch.empty_like(p).copy_(gradient)
            loop.optimizer.step()
        loop.save(2)
        state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        assert loop.optimizer.param_groups[0]["fused"] is fused
    torch.testing.assert_close(p, whole)


def go(loop, p, optimizer, ema, gradient=torch.tensor([1.0, 2.0])):
    for _ in loop:
        assert p.grad is None or not p.grad.any()
        p.grad = gradient.clone()
        norm = loop.check(1.0, "try again")
        optimizer.step()
        ema.update()
        loop.record(loss=1.0, gradient_norm=norm)


def test_the_loop(tmp_path):
    events = []
    loop, p, optimizer, ema = made = make_loop(tmp_path, 3, events)
    go(*made)
    assert events == [("after", 0, False), ("after", 1, False), ("save", 2), ("after", 2, True), ("save", 3),
                      ("after", 3, True)]
    torch.testing.assert_close(p.detach(), 1 - 0.6 * torch.tensor([1.0, 2.0]))  # rates of 0.1, 0.2 and 0.3
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["iteration"] for line in lines] == [0, 1, 2] and lines[0]["gradient_norm"] == pytest.approx(5 ** 0.5)
    assert [line["learning_rate"] for line in lines] == pytest.approx([0.1, 0.2, 0.3])
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert state["extra"] == "kept" and state["iteration"] == 3 and torch.equal(state["parameters"][0], p)


def test_the_loop_goes_on_from_a_checkpoint(tmp_path):
    loop, whole, *_ = made = make_loop(tmp_path / "whole", 5, [])
    go(*made)
    go(*make_loop(tmp_path / "parts", 2, []))
    state, events = load_checkpoint(tmp_path / "parts" / "checkpoint.pt"), []
    loop, p, _, ema = made = make_loop(tmp_path / "parts", 5, events, state)
    go(*made)
    assert events[0] == ("after", 2, False) and torch.equal(p, whole)
    assert len(read_metrics(tmp_path / "parts" / "metrics.jsonl")) == 5


def test_told_to_stop_it_saves_before_anything_else(tmp_path, capsys):
    events = []
    loop, p, optimizer, ema = make_loop(tmp_path, 9, events, save_every=100)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        for iteration in loop:
            p.grad = torch.ones(2)
            loop.record(loss=1.0)
            if iteration == 1:
                os.kill(os.getpid(), signal.SIGTERM)
    assert stop.value.code == 130 and events == [("after", 0, False), ("after", 1, False), ("save", 2)]
    assert "stopped and saved after 2 iterations; continue with the same command and --resume" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("loss, gradient", [(math.nan, 1.0), (1.0, math.inf)])
def test_what_is_not_finite_is_not_trained_on(loss, gradient, tmp_path):
    loop, p, optimizer, ema = make_loop(tmp_path, 9, [])
    with pytest.raises(InputError, match="at iteration 0; lower it"):
        for _ in loop:
            p.grad = torch.tensor([gradient, 0.0])
            loop.check(loss, "lower it")
    assert torch.equal(p, torch.ones(2)) and not (tmp_path / "checkpoint.pt").exists()


def test_a_warning_appears_once(tmp_path, capsys):
    loop, *_ = make_loop(tmp_path, 9, [])
    for _ in range(3):
        loop.warn("mind the gap")
    assert capsys.readouterr().err.count("warning: mind the gap") == 1


# ---- bars ------------------------------------------------------------------------------------------------------------

def test_a_log_file_gets_lines_now_and_then(capsys, monkeypatch):
    assert list(progress.bar(range(1000), "quick")) == list(range(1000))
    text = capsys.readouterr().err
    assert "\r" not in text and text.startswith("quick: 0/1000") and len(text.splitlines()) == 1
    monkeypatch.setattr(progress, "EVERY", 0.05)
    for _ in progress.bar(range(20), "slow", leave=True):
        time.sleep(0.01)
    lines = capsys.readouterr().err.splitlines()
    assert 3 <= len(lines) <= 10 and lines[-1].startswith("slow: 20/20")


# ---- files -----------------------------------------------------------------------------------------------------------

def test_files_are_as_readable_as_any_other(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "umask", None)  # the only way to ask for it would change it for a moment
    write_atomic(tmp_path / "a", lambda temporary: (temporary.write_text("a"), temporary.chmod(0o600)))
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_what_a_killed_process_left_is_removed(tmp_path):
    for name in (".model.safetensors.123.tmp", "notes.tmp", ".hidden"):
        (tmp_path / name).touch()
    remove_unfinished(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.tmp", ".hidden"}


def test_a_state_of_a_bar_is_one_line():
    stream = io.StringIO()
    lines = progress.Lines(stream)
    for text in ("\rtest: 1/2", "\rtest: 1/2", "", "\r", "\rtest: 2/2", "\n"):
        lines.write(text)
    assert stream.getvalue() == "test: 1/2\ntest: 2/2\n"


def test_the_first_process_alone_shows_bars(capsys, monkeypatch):
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert list(progress.bar(range(3), "quiet")) == [0, 1, 2] and capsys.readouterr().err == ""


def test_what_is_written_is_on_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    path, done = tmp_path / "file", []
    path.write_text("old")

    def write(temporary):
        done.append("write")
        assert temporary.parent == tmp_path and temporary.name == f".file.{os.getpid()}.tmp"  # on the same disk
        temporary.write_text("new")
    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, lambda *a, name=name, original=getattr(os, name): done.append(name) or original(*a))
    with open(path) as reader:
        write_atomic(path, write)
        assert reader.read() == "old" and path.read_text() == "new"  # who has it open reads on in the old one
    assert done == ["write", "fsync", "replace"]


def test_a_cpu_that_imitates_bf16_is_told_so_once(monkeypatch, capsys):
    distributed._say_if_imitated.cache_clear()
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    for precision in ("fp32", "bf16", "bf16"):
        distributed.autocast(torch.device("cpu"), precision)
    assert capsys.readouterr().out.count("20 times") == 1
    distributed._say_if_imitated.cache_clear()
