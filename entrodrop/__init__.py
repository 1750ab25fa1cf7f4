__version__ = "0.1.0"

def __getattr__(name):
    "`entrodrop.load_model` and `entrodrop.load_tokenizer`, found when they are asked for, so that `import entrodrop` costs nothing"
    if name not in ("load_model", "load_tokenizer"): raise AttributeError(f"module 'entrodrop' has no attribute {name!r}")
    from . import models
    return getattr(models, name)
