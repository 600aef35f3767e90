"""training.py: averages, schedules, files that are whole or absent, metrics."""

import json
import math

import pytest
import torch

from plumbing.files import Metrics, load_checkpoint, read_metrics, write_atomic
from plumbing.options import InputError
from plumbing.seeds import generator
from plumbing.training import EMA, Stats, cosine_decay, warmup


def follow(decay, updates):
    """A parameter that is i + 1 after update i, started from 0, and its running average."""
    p = torch.nn.Parameter(torch.zeros(()))
    ema = EMA([p], decay)
    for i in range(updates):
        p.data.fill_(i + 1)
        ema.update()
    return p, ema


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


def test_metrics_drop_what_lies_past_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(dict(iteration=i, loss=i / 3)) + "\n" for i in range(4)) + '{"iteration": 4, "lo')
    assert [line["iteration"] for line in read_metrics(path)] == [0, 1, 2, 3]
    metrics = Metrics(path, 2)
    metrics.write(iteration=2, loss=None)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        dict(iteration=0, loss=0), dict(iteration=1, loss=1 / 3), dict(iteration=2, loss=None)]
    Metrics(path, 0)
    assert path.read_text() == "" and read_metrics(tmp_path / "none.jsonl") == []


def test_stats():
    t = torch.tensor([0, 249, 250, 999, 750])
    losses, ascent = torch.tensor([1.0, 2, 3, 4, 5]), [torch.full((5,), 2.0), torch.full((5,), 2.5), torch.tensor([3.0, 3, 3, 3, 8])]
    guidance = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 3, 2, 2)
    stats = Stats(1000, torch.device("cpu"))
    for part in (slice(0, 2), slice(2, 5)):
        stats.add(t[part], losses[part], guidance[part], [step[part] for step in ascent])
    line = stats.reduce()
    assert line["loss"] == pytest.approx(3) and line["loss_by_quarter"] == [1.5, 3, None, 4.5]
    assert line["guidance_rms"] == pytest.approx([0.5 ** 0.5, 2, None, 12.5 ** 0.5])  # sqrt((0 + 1)/2), 2, -, sqrt((9 + 16)/2)
    assert line["pgd_gain"] == pytest.approx(2)  # 20 / 10


def test_stats_without_guidance_and_ascent():
    stats = Stats(1000, torch.device("cpu"))
    stats.add(torch.tensor([0]), torch.tensor([1.0]), 0.0, [])
    assert stats.reduce() == dict(loss=1, loss_by_quarter=[1, None, None, None])
