"""The benchmark of a language model: its functions on a tiny random one; where it is installed, on the real one."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from requirements import require

import smollm

BENCHMARK = pathlib.Path(smollm.__file__)


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=60, num_hidden_layers=2, tie_word_embeddings=True, **sizes)
    made = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(4)  # as large as what says something
    return made


def tokens(*shape):
    return torch.from_numpy(np.random.default_rng(shape).integers(0, 60, shape))


def test_perplexity_is_that_of_the_loss(model):
    judged = tokens(3, 20)
    with torch.no_grad():
        losses = [float(model(window[None], labels=window[None]).loss) for window in judged]
    assert smollm.perplexity(model, judged) == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)


@pytest.mark.parametrize(("recipe", "grid"), [("rtn", "3"), ("balanced", "3/16"), (smollm.SEQUENTIAL, "3/16")])
def test_the_linear_layers_of_all_blocks_are_quantized(tmp_path, model, recipe, grid):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantizer = smollm.Quantizer(model, list(tokens(16, 24).split(smollm.BATCH)), tmp_path)
    changed, seconds = quantizer(recipe, smollm.grid(grid))
    assert seconds > 0
    names = {f"model.layers.{block}.{name}" for block in (0, 1) for name in ("mlp.up_proj", "self_attn.v_proj")}
    assert names < {*smollm.linear_layers(model)}
    assert len(smollm.linear_layers(model)) == 14
    for name, tensor in changed.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], before[name], rtol=0, atol=0)
        if name.removesuffix(".weight") in smollm.linear_layers(model):
            groups = tensor.reshape(-1, tensor.shape[1] if grid == "3" else 16)
            assert 3 <= max(len(group.unique()) for group in groups) <= 8
        else:
            torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_windows_are_the_tokens_one_after_the_other():
    class Tokenizer:
        def __call__(self, text, **_):
            return {"input_ids": torch.tensor([[len(word) for word in text.split()]])}

    found = smollm.windows(Tokenizer(), ["a bb ccc", "dddd eeeee"], 2, 2)
    assert found.tolist() == [[1, 2], [3, 4]]
    with pytest.raises(SystemExit, match="There are 5 tokens, too few for 3 windows of 2"):
        smollm.windows(Tokenizer(), ["a bb ccc", "dddd eeeee"], 3, 2)


def test_the_real_one_survives_eight_bits(tmp_path):
    require("lm")
    options = ["--grid", "8", "2/32", "--recipe", "rtn", "--texts", "4", "--tokens", "64", "--judged", "1"]
    command = [sys.executable, str(BENCHMARK), *options, "--json", str(tmp_path / "figures.json")]
    subprocess.run(command, check=True, capture_output=True)
    rows = json.loads((tmp_path / "figures.json").read_text())
    figures = {(row["case"], row["bits"]): row["value"] for row in rows if row["metric"] == "perplexity"}
    assert 10 < figures["smollm2", 32] < 60
    assert figures["smollm2", 8] == pytest.approx(figures["smollm2", 32], rel=0.05)
    assert figures["smollm2-32", 2] > 2 * figures["smollm2", 32]
