"""One decode step of the pure model has static shapes: torch.compile takes it whole, and only once."""

import pytest
import torch
from equivalence import BASE, CASES, assert_close, small_model, tokens

from nanokv.cache import CACHE_FORMATS

every_attention = pytest.mark.parametrize("knobs", BASE.values(), ids=BASE.keys())
WINDOWS = [{}, {"window": 5, "sink_tokens": 2}, {"window": 4, "window_pattern": "SL"}]


def assert_same(a, b, dtype) -> None:
    if dtype == torch.float32:
        assert_close(a, b)
    else:  # now and then a number is rounded to the next code
        assert (a - b).abs().mean() < 1e-2


@torch.no_grad()
def check_ragged_steps(knobs, dtype, backend: str, steps: int = 40) -> None:
    """`steps` compiled steps of rows of unequal length equal the eager ones, by one graph."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    model, lengths = small_model(**knobs), [9, 2, 6]
    step = torch.compile(model, fullgraph=True, backend=count)
    caches = [model.new_cache(3, 10 + steps, dtype) for _ in range(2)]
    for cache in caches:
        cache.expect(lengths)
        model(tokens(3, 9), cache=cache)
    idx = tokens(3, steps, seed=1)
    for t in range(steps):
        new = idx[:, t : t + 1]
        caches[0].reserve(1)
        assert_same(step(new, cache=caches[0])[0], model(new, cache=caches[1])[0], dtype)
        assert len(graphs) == 1
    assert caches[0].host_lengths() == caches[0].lengths.tolist() == [n + steps for n in lengths]
    assert_same(model(idx[:, :1], cache=caches[0])[0], model(idx[:, :1], cache=caches[1])[0], dtype)


FORMATS = [
    pytest.param(dtype, id=name, marks=[] if name == "fp32" else pytest.mark.slow)
    for name, dtype in CACHE_FORMATS.items()
]


@every_attention
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("window", WINDOWS, ids=["full", "ring-with-sinks", "every-other-layer"])
def test_a_decode_step_is_one_graph(knobs, dtype, window):
    layers = 2 if "window_pattern" in window else 1
    steps = 40 if dtype == torch.float32 else 12
    check_ragged_steps({**knobs, **window, "n_layer": layers}, dtype, "eager", steps)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gqa-conv", "mla-norm", "mla-conv-norm", "mla-conv-shared-norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int4], ids=["fp32", "int4"])
def test_a_decode_step_with_norms_and_convolutions_is_one_graph(name, dtype):
    check_ragged_steps({**CASES[name], **WINDOWS[2]}, dtype, "eager", steps=12)


@pytest.mark.slow
@pytest.mark.parametrize("name, format", [("mha", "fp32"), ("mqa", "bf16"), ("gqa", "int8"), ("mla", "int8")])
def test_a_decode_step_by_inductor(name, format):
    check_ragged_steps({**BASE[name], "n_layer": 1}, CACHE_FORMATS[format], "inductor", steps=12)
