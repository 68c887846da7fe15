"""With this folder on PYTHONPATH, torch says that the CPU computes in bfloat16, so that `auto` picks it."""

import torch

torch.cpu._is_avx512_bf16_supported = lambda: True
