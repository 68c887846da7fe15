"""An edit of model.py is never ignored: training and decoding of an accelerated model follow it.

In a copy of the checkout, one statement at a time is changed of each function that a backend stands for.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# file, statement, what it becomes
EDITS = [
    ("model.py", "repeat = config.qk_rope_repeat or 1", "repeat = config.qk_rope_repeat or 2"),
    ("model.py", "/ -max(width // repeat, 1)", "/ -max(2 * width // repeat, 1)"),
    ("model.py", "angle = positions[", "angle = 0.5 * positions["),
    ("model.py", "return (angle.cos(), angle.sin())", "return (angle.cos(), 2 * angle.sin())"),
    ("nanokv/rope_scaling.py", "return frequency / config.rope_factor", "return frequency / 2"),
    ("model.py", "return x + sum(w * padded", "return x + sum(2 * w * padded"),
    ("model.py", "before = x.new_zeros(", "before = x.new_ones("),
    ("model.py", "padded = torch.cat((before, x), 1)", "padded = torch.cat((before, -x), 1)"),
    ("model.py", "(cos, sin), half = rope", "(sin, cos), half = rope"),
    ("model.py", "before, x1, x2, after = x.split", "before, x2, x1, after = x.split"),
    ("model.py", "x1 * cos - x2 * sin, x2", "x1 * cos - 0.5 * x2 * sin, x2"),
    ("model.py", "seen = (k >= 0) & (k <= q)", "seen = (k >= 0) & (k <= q) & ((k < q) | (q < 3))"),
    ("model.py", "(k > q - window)", "(k > q - window + 2)"),
    ("model.py", "(k < sinks)", "(k < sinks - 1)"),
    ("model.py", "self.weight.to(x.dtype), self.eps)", "self.weight.to(x.dtype), self.eps + 1)"),
    ("model.py", "(B, H, T, D), G = q.shape,", "q = 2 * q\n        (B, H, T, D), G = q.shape,"),
    ("model.py", "True, scale=self.scale, enable", "True, scale=0.5 * self.scale, enable"),
    ("model.py", "None, dropout, True, scale", "None, dropout, False, scale"),
    ("model.py", "q, mask = q.reshape(", "q, mask = 2 * q.reshape("),
    ("model.py", "y = F.scaled_dot", "y = 2 * F.scaled_dot"),
    ("model.py", "return y.reshape(B, H, T, -1)", "return -y.reshape(B, H, T, -1)"),
    ("model.py", "q, k = self.q_norm(q), self.k_norm(k)", "q, k = self.q_norm(q), k"),
    ("model.py", "if self.qk_norm:\n            q, k =", "if not self.qk_norm:\n            q, k ="),
    ("model.py", "q = rotate(q.transpose(1, 2), rope)", "q = q.transpose(1, 2)"),
    ("model.py", "rope), v.transpose(1, 2)", "rope), 2 * v.transpose(1, 2)"),
    ("model.py", "y = self.attend(q, k, v, mask, cache)", "y = 2 * self.attend(q, k, v, mask, cache)"),
    ("model.py", "return self.o_proj(y.transpose(1, 2)", "return -self.o_proj(y.transpose(1, 2)"),
    ("model.py", "rope, start=self.dn)", "rope, start=0)"),
    ("model.py", "= self.kv_a_layernorm(c), rotate", "= self.kv_a_layernorm(c) + 1, rotate"),
    ("model.py", "return torch.cat((k_nope,", "return torch.cat((2 * k_nope,"),
    ("model.py", "y = self.attend(q, k, v, mask)", "y = self.attend(2 * q, k, v, mask)"),
    ("model.py", "torch.cat((torch.einsum(", "torch.cat((2 * torch.einsum("),
    ("model.py", "q = self.q_norm(q) if self.qk_norm else q", "q = 2 * self.q_norm(q) if self.qk_norm else q"),
    ("model.py", "k_rope = self.k_norm(k_rope) if", "k_rope = 2 * self.k_norm(k_rope) if"),
    ("model.py", "k.float().square().mean(-1", "k.float().square().sum(-1"),
    ("model.py", "k = self.k_norm(k) if", "k = 2 * self.k_norm(k) if"),
    ("model.py", "q = (q * self.k_norm.weight)", "q = (2 * q * self.k_norm.weight)"),
    ("model.py", "* (self.scale * key_factor", "* (2 * self.scale * key_factor"),
    ("model.py", "kv = self.latent_conv(kv, cache) if", "kv = 2 * self.latent_conv(kv, cache) if"),
    ("model.py", "self.k_conv(k, cache), self.v_conv(v, cache)", "self.k_conv(k, cache), v"),
    ("model.py", "w_uv).flatten(2))", "-w_uv).flatten(2))"),
    ("model.py", "F.silu(self.gate_proj(x))", "F.gelu(self.gate_proj(x))"),
    ("model.py", "* self.up_proj(x))", "* (self.up_proj(x) + 1))"),
    ("model.py", "self.self_attn(self.input_layernorm(x)", "self.self_attn(x"),
    ("model.py", "x = x + F.dropout(y", "x = x + 2 * F.dropout(y"),
    ("model.py", "y = self.mlp(self.post_attention_layernorm(x))", "y = self.mlp(x)"),
    ("model.py", "return x + F.dropout(y", "return 2 * x + F.dropout(y"),
    ("model.py", "x = F.dropout(self.embed_tokens(idx)", "x = 2 * F.dropout(self.embed_tokens(idx)"),
    ("model.py", "x = layer(x, rope,", "x = layer(2 * x, rope,"),
    ("model.py", "return self.norm(x)\n", "return self.norm(x) + 0.1\n"),
    ("model.py", "else self.lm_head(hidden)", "else 2 * self.lm_head(hidden)"),
    ("nanokv/loss.py", "logits = self.model.head(hidden)", "logits = 2 * self.model.head(hidden)"),
    ("nanokv/loss.py", "reduction=reduction)", "reduction=reduction, label_smoothing=0.1)"),
    ("nanokv/loss.py", "return self.head_loss(hidden", "return 2 * self.head_loss(hidden"),
]  # fmt: skip

# Runs in the copy: for each edit, what pure and accelerated models compute, as one line of numbers each.
PROGRAM = """
import json, os, sys
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, "")
import torch

torch.set_num_threads(1)
MODELS = [
    {"attention": "gqa", "n_kv_head": 2},
    {"attention": "mla", "q_lora_rank": 12},
    {"attention": "mla", "window": 5, "sink_tokens": 2, "qk_norm": "shared"},
    {"attention": "mqa", "kv_conv": 2},
    {"attention": "mla", "kv_conv": 1, "qk_norm": True},
]

def numbers(backend):
    import backends, model
    from nanokv.loss import LanguageModelLoss
    os.environ["NANOKV_BACKEND"] = backend
    found = []
    for knobs in MODELS:
        torch.manual_seed(0)
        config = model.GPTConfig(vocab_size=61, n_layer=2, n_head=4, n_embd=64, **knobs)
        gpt = model.GPT(config)
        for p in gpt.parameters():
            p.data.normal_(std=p.size(1) ** -0.5) if p.ndim > 1 else p.data.uniform_(0.5, 1.5)
        loss = backends.accelerate(LanguageModelLoss(gpt))
        idx = torch.randint(61, (2, 21))
        value = loss(idx[:, :-1], idx[:, 1:])
        value.backward()
        grads = sum(p.grad.double().norm() for p in gpt.parameters() if p.grad is not None)
        with torch.no_grad():
            cache = gpt.eval().new_cache(2, 20)
            logits = [gpt(part, cache=cache)[0] for part in idx[:, :20].split([8] + [1] * 12, 1)]
        found += [value.item(), grads.log().item(), *torch.cat(logits, 1)[:, ::3, ::30].flatten().tolist()]
    return found

def both():
    for name in list(sys.modules):
        if name.split(".")[0] in ("model", "nanokv", "backends"):
            del sys.modules[name]
    return numbers("none"), numbers("auto")

results = [both()]
for file, old, new in json.load(sys.stdin):
    source = Path(file).read_text()
    assert old in source, f"{file} has no {old!r} any more; let tests/test_edits.py follow"
    Path(file).write_text(source.replace(old, new, 1))
    results.append(both())
    Path(file).write_text(source)
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory, request) -> dict:
    """What is computed without an edit (None), and with each that a collected test asks for, by its number."""
    collected = [item.callspec.params["i"] for item in request.session.items if item.path == request.path]
    copy = tmp_path_factory.mktemp("edits")
    shutil.copy(ROOT / "model.py", copy)
    for folder in ("nanokv", "backends"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command, environment = [sys.executable, "-c", PROGRAM], os.environ | {"PYTHONPATH": ""}
    edits = json.dumps([EDITS[i] for i in collected])
    done = subprocess.run(command, cwd=copy, env=environment, input=edits, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(zip([None, *collected], json.loads(done.stdout), strict=True))


def difference(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) / (1 + abs(y)) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    "i",
    [pytest.param(i, id=new[:50], marks=[] if i % 8 == 0 else pytest.mark.slow) for i, (_, _, new) in enumerate(EDITS)],
)
def test_an_edit_is_followed(i, results):
    (unedited, same), (pure, accelerated) = results[None], results[i]
    assert difference(same, unedited) < 1e-5
    assert difference(pure, unedited) > 1e-3  # the edit does something
    assert difference(accelerated, pure) < 1e-5
