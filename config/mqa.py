# Multi-query attention (Shazeer 2019): all heads share one key and value, 128 numbers a token a layer.

attention = "mqa"
intermediate_size = 640  # equal parameters, within 1 %, in mha.py, mqa.py, gqa.py and mla.py

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
