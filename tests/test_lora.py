"""LoRA adapters by peft, on every projection, in training and in decoding, with and without a backend."""

import copy

import pytest
import torch
from equivalence import BASE, assert_close, cached_logits, small_model, tokens
from peft import LoraConfig, inject_adapter_in_model

from backends import accelerate
from model import Linear
from nanokv.loss import LanguageModelLoss

every_attention = pytest.mark.parametrize("knobs", BASE.values(), ids=BASE.keys())


def adapt(model, *, only=""):
    """Adapters that start away from zero, on the projections whose names end in `only`."""
    names = [name for name, part in model.named_modules() if isinstance(part, Linear) and name.endswith(only)]
    targets = LoraConfig(r=2, target_modules=names, init_lora_weights=False)
    torch.manual_seed(0)
    return inject_adapter_in_model(targets, model)


@every_attention
@pytest.mark.parametrize("only", ["", "o_proj", "down_proj", "lm_head"])
@pytest.mark.parametrize("before", [True, False], ids=["adapted-first", "accelerated-first"])
def test_adapters_count_in_every_pass(knobs, only, before):
    plain, idx, targets = small_model(**knobs), tokens(2, 12), tokens(2, 12, seed=1)
    pure = adapt(copy.deepcopy(plain), only=only)
    fast = accelerate(pure if before else copy.deepcopy(plain))
    fast = copy.deepcopy(fast) if before else adapt(fast, only=only)
    pure = adapt(copy.deepcopy(plain), only=only)
    full = pure(idx)[0]
    assert (full - plain(idx)[0]).abs().max() > 0.1
    for model in (pure, fast):
        assert_close(model(idx)[0], full, 5e-5)  # random adapters lose a digit: fp32 is 1e-5 from fp64
        assert_close(cached_logits(model, idx, [5, *[1] * 7]), full, 5e-5)
    losses = [LanguageModelLoss(model.train())(idx, targets) for model in (pure, accelerate(fast))]
    assert_close(losses[1], losses[0], 5e-6)
