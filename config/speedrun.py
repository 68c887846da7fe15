# nanoGPT's CPU recipe (README: 1.88 on shakespeare_char in about 3 minutes), in as little time as we can:
# the same blocks, heads, width, context and batch, fewer parameters; `python bench.py speedrun` races them.

dataset = "shakespeare_char"
block_size = 64
n_layer = 4
n_head = 4
n_embd = 128

batch_size = 12
max_iters = 250
warmup_iters = 5
cooldown = 0.7
learning_rate = 0.01
min_lr = 0.0
muon_lr = 0.03
weight_decay = 0.0
eval_interval = 1000  # the first and the last step
eval_iters = 20  # as many batches as nanoGPT's command asks for
log_interval = 20
sample_tokens = 0
