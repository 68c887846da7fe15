# Grouped-query attention (Ainslie et al. 2023): 2 heads share a key and value, 128 numbers a token a layer.

attention = "gqa"
n_kv_head = 2
intermediate_size = 360  # equal parameters, within 1 %, in mha.py, mqa.py, gqa.py and mla.py
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
