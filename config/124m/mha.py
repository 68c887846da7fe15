# GPT-2 small with multi-head attention: 1536 numbers a token a layer.
# python train.py config/124m/mha.py

out_dir = "out/124m-mha"
attention = "mha"
intermediate_size = 2048  # equal parameters, within 1 %, in this folder's four files

dataset = "fineweb_edu"
tokenizer = "gpt2"
vocab_size = 50304  # gpt2's 50257, rounded up to a multiple of 128, which matrix multiplication likes
block_size = 1024
n_layer = 12
n_head = 12
n_embd = 768
tie_embeddings = True

batch_size = 16
gradient_accumulation_steps = 32  # 2**19 tokens a step
max_iters = 10 * 10**9 // 2**19  # 10 billion tokens
warmup_iters = 250
eval_iters = 160
