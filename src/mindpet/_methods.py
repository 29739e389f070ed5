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
    "ia3": "ia3",
    "ln_tuning": "ln_tuning",
    "trainable_tokens": "trainable_tokens",
    "hra": "hra",
    "oft": "oft",
    "boft": "boft",
    "miss": "miss",
    "parallel_adapter": "parallel_adapter",
    "compacter": "compacter",
    "mam": "mam",
    "adapter_fusion": "adapter_fusion",
    "prompt_tuning": "prompt_tuning",
    "p_tuning": "p_tuning",
    "multitask_prompt_tuning": "multitask_prompt_tuning",
    "adaption_prompt": "adaption_prompt",
    "dora": "dora",
    "lora_fa": "lora_fa",
    "qlora": "qlora",
    "vera": "vera",
    "lokr": "lokr",
    "fourierft": "fourierft",
    "randlora": "randlora",
    "shira": "shira",
    "lora_plus": "lora_plus",
    "adalora": "adalora",
}
DOCUMENTED = ("lora", "adapter", "low_rank_adapter", "bitfit", "prefix", "ptuning2")  # in the user document
