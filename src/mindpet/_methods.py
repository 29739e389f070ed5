"""The tuning methods by name, and the module of `mindpet.delta` that each is in. Nothing here imports MindSpore.

A new method is a file beside those and a line here.
"""

MODULES = {
    "lora": "lora",
    "adapter": "adapter",
    "low_rank_adapter": "low_rank_adapter",
    "bitfit": "bitfit",
    "prefix": "prefix_layer",
    "ptuning2": "ptuning2",
    "loha": "loha",
}
DOCUMENTED = ("lora", "adapter", "low_rank_adapter", "bitfit", "prefix", "ptuning2")  # in the user document
