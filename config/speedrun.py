# nanoGPT's CPU recipe (README: 1.88 on shakespeare_char in about 3 minutes), in as little time as we can: its
# context and characters, with a fifth of its parameters; `python -m tools.bench speedrun` races the two.

dataset = "shakespeare_char"
block_size = 64
n_layer = 2
n_head = 5
n_embd = 80
intermediate_size = 192
qk_norm = False

batch_size = 24
max_iters = 220
warmup_iters = 5
cooldown = 0.7
learning_rate = 0.015
min_lr = 0.0
muon_lr = 0.04
muon_momentum = 0.9
weight_decay = 0.0
eval_interval = 1000  # the first and the last step
eval_iters = 20  # as many batches as nanoGPT's command asks for
log_interval = 50
sample_tokens = 0
