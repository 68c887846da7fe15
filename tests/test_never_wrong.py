"""Changes that a fast path could overlook: accelerated decoding and training must follow each of them."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from equivalence import BASE, assert_close, small_model, tokens

import model as model_py
from backends import accelerate
from model import MLP, Linear, RMSNorm
from nanokv.loss import LanguageModelLoss


def with_attributes(module, **changed):
    return SimpleNamespace(**{**vars(module), **changed})


def new_code(self, x):
    return self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x))


def doubled(append):
    return lambda **new: append(**{name: 2 * value for name, value in new.items()})


CHANGES = {  # what monkeypatch, a model and its cache go through
    "code": lambda m, model, cache: m.setattr(MLP.forward, "__code__", new_code.__code__),
    "F": lambda m, model, cache: m.setattr(model_py, "F", with_attributes(F, silu=F.gelu)),
    "F.dropout": lambda m, model, cache: m.setattr(F, "dropout", lambda x, *args: x.clamp(min=-0.5)),
    "torch.cat": lambda m, model, cache: m.setattr(torch, "cat", lambda *args, cat=torch.cat: 2 * cat(*args)),
    "Linear.__call__": lambda m, model, cache: m.setattr(Linear, "__call__", lambda self, x: 2 * self.forward(x)),
    "scale": lambda m, model, cache: [setattr(b.self_attn.attend, "scale", torch.tensor(0.1)) for b in model.layers],
    "eps": lambda m, model, cache: setattr(model.norm, "eps", 0.5),
    "theta": lambda m, model, cache: setattr(model.config, "rope_theta", 10.0),
    "order": lambda m, model, cache: model.layers._modules.__setitem__("0", model.layers._modules.pop("0")),
    "cache": lambda m, model, cache: setattr(cache.layers[0], "append", doubled(cache.layers[0].append)),
    "weight": lambda m, model, cache: m.setattr(
        RMSNorm, "weight", property(lambda self: 2 * self._parameters["weight"]), raising=False
    ),
}


@torch.no_grad()
def decoded(model, change, at: int, monkeypatch):
    """Logits of tokens fed one by one, after a prefill; `change` is made before token `at`."""
    cache, idx, logits = model.new_cache(2, 12), tokens(2, 12), []
    model(idx[:, :4], cache=cache)
    with monkeypatch.context() as patch:
        for t in range(4, 12):
            if t == at:
                change(patch, model, cache)
            logits.append(model(idx[:, t : t + 1], cache=cache)[0])
    return torch.cat(logits, 1)


@pytest.mark.parametrize("at", [4, 8], ids=["before-the-first-step", "on-the-way"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("attention", ["gqa", "mla"])
def test_decoding_follows(attention, change, at, monkeypatch):
    pure, plain = (decoded(small_model(**BASE[attention]), how, at, monkeypatch) for how in (change, lambda *_: None))
    assert (pure - plain).abs().max() > 1e-3
    assert_close(decoded(accelerate(small_model(**BASE[attention])), change, at, monkeypatch), pure, 5e-5)


@pytest.mark.parametrize("change", ["code", "F", "F.dropout"])
def test_training_follows(change, monkeypatch):
    models, idx = [small_model(), accelerate(small_model())], tokens(2, 12)
    CHANGES[change](monkeypatch, models[0], None)
    losses = [LanguageModelLoss(model)(idx, idx) for model in models]
    assert_close(losses[1], losses[0], 1e-6)


def test_targets_that_do_not_count_leave_gradients_of_zero():
    loss_model = accelerate(LanguageModelLoss(small_model()))
    loss_model(tokens(2, 6), torch.full((2, 6), -1)).backward()
    assert all((p.grad == 0).all() for p in loss_model.parameters())


@pytest.mark.parametrize("how", ["autocast", "saved-tensors"])
def test_backward_passes_under_other_rules(how, c_backend):
    mlp, grads = accelerate(small_model()).layers[0].mlp, []
    transposed = torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.mT.contiguous() if t.ndim > 1 else t, lambda t: t.mT if t.ndim > 1 else t
    )
    for changed in (False, True):
        x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with transposed if changed and how == "saved-tensors" else torch.enable_grad():
            y = mlp(x).square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=changed and how == "autocast"):
            y.backward()
        grads.append(x.grad)
    assert_close(grads[1], grads[0], 1e-6)
