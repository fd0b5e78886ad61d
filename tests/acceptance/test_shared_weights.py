"""Two processes of one machine load one base model: its weights are in memory once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.acceptance.conftest import ROOT
from tests.workers.worker_builders import MINILM
from workers.weights import resolve_source

pytestmark = pytest.mark.acceptance

WEIGHTS_MB = 250  # below: 30,522·1,024 embeddings, tied, and 3 layers of 4·1,024² + 3·1,024·2,048 numbers of 4 bytes
# Loads, reads every weight once in a forward pass, says how much memory of its own that took, and waits.
PROCESS = """
import os, sys
os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from tests.workers.worker_builders import task_of_kind, tiny_settings
from workers.base_model import load_base_model

def own_kilobytes():
    with open("/proc/self/smaps_rollup") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))

settings = tiny_settings(sys.argv[1])
before = own_kilobytes()
model = load_base_model(settings).task_model(task_of_kind("causal_lm"))
with torch.inference_mode():
    model(input_ids=torch.arange(8)[None])
print(own_kilobytes() - before, flush=True)
sys.stdin.read()
"""


def mapped_kilobytes(pid: int, file: Path) -> dict[str, int]:
    """What the kernel says of a process's pages of one file: Rss, Pss (a shared page by its share), Anonymous."""
    found: dict[str, int] = {}
    is_file = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            is_file = words[-1] == str(file)
        elif is_file and words[-1] == "kB":
            found[words[0][:-1]] = found.get(words[0][:-1], 0) + int(words[1])
    return found


def test_two_processes_share_the_pages_of_one_base_model(tmp_path: Path) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 3, "num_attention_heads": 16}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=30522, tie_word_embeddings=True, **sizes))
    model.to_empty(device="cpu").tie_weights()
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(resolve_source(MINILM.source)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    assert file.stat().st_size // 10**6 == WEIGHTS_MB
    del model
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(tmp_path)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        own = [int(process.stdout.readline()) for process in started if process.stdout]
        mapped = [mapped_kilobytes(process.pid, file) for process in started]
    finally:
        for process in started:
            process.communicate()
    shares = [pages["Pss"] for pages in mapped]
    print(f"\n{WEIGHTS_MB} MB of weights: two processes hold {shares} kB of them, and took {own} kB of their own")
    for pages, kilobytes in zip(mapped, own, strict=True):
        assert pages["Rss"] > 0.99 * file.stat().st_size / 1024  # all of it was read
        assert pages["Pss"] < 0.51 * pages["Rss"]
        assert pages["Anonymous"] == 0
        assert kilobytes < 0.2 * file.stat().st_size / 1024
