# Multi-head latent attention (DeepSeek-V2, 2024): one latent and one rope key, 128 numbers a token a layer.

attention = "mla"
kv_lora_rank = 96  # with the rope key, 32, the cache is as small as mqa's
qk_nope_head_dim = 32  # this + the next = the value's width, as fused attention kernels want
qk_rope_head_dim = 32
v_head_dim = 64
intermediate_size = 592  # equal parameters, within 1 %, in mha.py, mqa.py, gqa.py and mla.py

dataset = "stdlib"
block_size = 256
n_layer = 4
n_head = 4
n_embd = 256

# about 3 minutes on 2 CPU cores: 2048 tokens a step, half a million in all
batch_size = 8
max_iters = 250
warmup_iters = 20
eval_interval = 50
eval_iters = 20
log_interval = 10
