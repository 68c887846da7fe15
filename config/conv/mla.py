# Multi-head latent attention (DeepSeek-V2, 2024): one latent and one rope key, 96 numbers a token a layer.
# As config/mla.py, with a convolution over what is cached, which costs no cache per token.

out_dir = "out/conv-mla"
attention = "mla"
kv_lora_rank = 64
qk_rope_head_dim = 32
qk_nope_head_dim = 16  # with the rope key as wide as the value, as fused attention kernels want
v_head_dim = 48
qk_norm = False  # 0.9 to 1.2 % better than with norms at 900 steps (docs/lab_log.md); export needs it too
kv_conv = 2  # mixes the two previous vectors, per channel, into what is cached: see CausalConv in model.py
intermediate_size = 288  # equal parameters, within 1 %, in this folder's four files

dataset = "stdlib"
block_size = 256
n_layer = 4
n_head = 4
n_embd = 128

# about 2 minutes on 2 CPU cores
batch_size = 16
max_iters = 250
warmup_iters = 20
learning_rate = 0.01
eval_interval = 125
