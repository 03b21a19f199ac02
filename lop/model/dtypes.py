"""The types of numbers that checkpoints are stored in, by the names that safetensors has for them."""

import torch

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
