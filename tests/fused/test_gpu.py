"""On a CUDA GPU: every block against the float64 reference on the CPU. Run with pytest -m gpu."""

import pandas as pd
import pytest
import speed
import torch
from conftest import TINY, assert_same_run
from helpers import OTHERS, assert_as_exact_as_naive, make, step, with_block

import train
from densenet import BLOCKS
from training import choice

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """fp32 as train.py has it; torch's own default rounds the inputs of convolutions to 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def test_a_deterministic_run_resumes_bit_for_bit(tiny):
    flags = [*TINY, "--device", "cuda", "--deterministic"]
    assert tiny("--save", "whole", args=flags) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "print_epoch", stop_after_epoch_2)
        assert tiny("--save", "run", args=flags) == 130
    assert tiny("--save", "run", "--resume", args=[]) == 0
    assert_same_run("whole", "run")


def stop_after_epoch_2(args, rows, skipped, seconds):
    if rows["train"][-1]["epoch"] == 2:
        raise KeyboardInterrupt


@pytest.mark.parametrize("name", [*BLOCKS, "bamos"])
def test_benchmark(name):
    job = {"candidate": name, "depth": 10, "batch_size": 4, "precision": "fp32", "graph": False, "kernels": None, "device": "cuda"}
    process, _ = speed.take_turns(job | {"task": "steps"}, job | {"task": "steps"}, times=2)
    assert len(process.seconds["train"]) == 2 and min(process.peaks) > 0


@pytest.mark.parametrize("block", OTHERS)
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("options", [{"depth": 40, "growth_rate": 12}, {"depth": 22, "growth_rate": 12, "bottleneck": False}])
def test_blocks_against_float64(block, amp, options):
    model, x = make(torch.float32, **options), torch.randn(64, 3, 32, 32)  # for the largest tiles
    exact = step(with_block(model, "naive").double(), x.double())
    model, x = model.cuda(), x.cuda()
    assert_as_exact_as_naive(step(with_block(model, block), x, amp), step(with_block(model, "naive"), x, amp), exact)


@pytest.mark.parametrize("block", ["fused"])
def test_repeats_bit_for_bit(block):
    model, x = make(torch.float32, depth=40, growth_rate=12, block=block).cuda(), torch.randn(16, 3, 32, 32).cuda()
    first, second = (step(with_block(model, block), x, amp=True) for _ in range(2))
    inside = [name for name in first if "blocks.2" in name]  # what no cuDNN kernel outside the block touches backward
    assert all(torch.equal(first[name], second[name]) for name in inside)


@pytest.mark.parametrize(("precision", "optimizer"), [("fp32", "sgd"), ("bf16", "sgd"), ("fp16", "sgd"), ("bf16", "adam"), ("bf16", "rmsprop")])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_cuda_graph_trains_like_eager_steps(tiny, capsys, block, precision, optimizer):
    """With an odd last batch, and a learning rate that falls."""
    flags = [*TINY, "--device", "cuda", "--block", block, "--precision", precision, "--opt", optimizer, "--schedule", "cosine"]
    for name in ("eager", "graph"):
        more = ["--cuda-graph" if name == "graph" else "--no-cuda-graph", "--image-size", "16", "--save", name]
        assert tiny("--limit-train", "1437", "--epochs", "8", *more, args=flags) == 0
    eager, graph = (pd.read_csv(f"{name}/train.csv").loss for name in ("eager", "graph"))
    assert "no CUDA graph" not in capsys.readouterr().out
    learned, learned_with_a_graph = (loss.iloc[0] - loss.iloc[-1] for loss in (eager, graph))
    assert learned_with_a_graph == pytest.approx(learned, rel=0.2) and learned > 0.1
    assert optimizer != "sgd" or pd.read_csv("graph/test.csv").error.iloc[-1] < 50  # 90 % is chance


@pytest.mark.parametrize(("first", "then"), [(["--no-cuda-graph"], ["--cuda-graph"]), ([], ["--no-cuda-graph"])])
def test_a_run_goes_on_with_or_without_a_graph(tiny, first, then):
    assert tiny("--device", "cuda", "--save", "run", *first) == 0
    assert tiny("--save", "run", "--resume", "--epochs", "6", *then, args=[]) == 0
    assert len(pd.read_csv("run/train.csv")) == 6


def test_what_auto_measures():
    job = {"model": {"depth": 22}, "batch_size": 16, "image_size": 32, "precision": "bf16", "device": "cuda"}
    found = choice.measure_here(job | {"graph": True, "blocks": list(BLOCKS)}, torch.device("cuda"))
    assert set(found["seconds"]) == set(BLOCKS) and found["refused"] == {}  # nor is a graph
