# Characters of Shakespeare as well as we can in the time of nanoGPT's CPU recipe, about 2 minutes on 2 cores.

dataset = "shakespeare_char"
block_size = 128
n_layer = 3
n_head = 4
n_embd = 128
intermediate_size = 320
qk_norm = False

batch_size = 12
max_iters = 1400
warmup_iters = 10
cooldown = 1.0
learning_rate = 0.01
min_lr = 0.0
eval_interval = 10000  # the first and the last step
eval_iters = 20
log_interval = 50
