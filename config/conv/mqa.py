# Multi-query attention (Shazeer 2019): all heads share one key and value, 64 numbers a token a layer.
# As config/mqa.py, with a convolution over what is cached, which costs no cache per token.

out_dir = "out/conv-mqa"
attention = "mqa"
intermediate_size = 384  # equal parameters, within 1 %, in this folder's four files
qk_norm = True
kv_conv = 2  # mixes the two previous vectors, per channel, into what is cached: see CausalConv in model.py

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
