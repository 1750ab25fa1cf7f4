"""Who counts what goes through matrices and knows nothing of blocks, plans or passes."""
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers.pytorch_utils import Conv1D


@contextmanager
def multiplications():
    "While active, for every call of any matrix: its weights times the tokens that went through"
    seen = []
    def note(module, args, output):
        if isinstance(module, (nn.Linear, Conv1D)): seen.append(output.shape[:-1].numel() * module.weight.numel())
    hook = register_module_forward_hook(note)
    try: yield seen
    finally: hook.remove()
