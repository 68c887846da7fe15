# Multi-query attention (Shazeer 2019): all heads share one key and value, 64 numbers a token a layer.

attention = "mqa"
intermediate_size = 384  # equal parameters, within 1 %, in mha.py, mqa.py, gqa.py and mla.py
qk_norm = True

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
