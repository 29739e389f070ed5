"""Make tests/golden/peft anew: adapters that Hugging Face PEFT trained and wrote, for networks of some hundred weights.

Run it with the extra 'interop' installed: PYTHONHASHSEED=0 python tests/golden/make_peft.py [CASE ...]

``base/`` is a BERT, ``base_llama/`` and ``base_gpt2/`` are language models. The directory of each case has the two
files as PEFT wrote them (0.21.2, with torch 2.13 and transformers 5.24), and ``expected.json``: the logits that PEFT
computes, how many parameters train, the gradient of the loss by the name that the parameter has in the file, and the
base if it is not the BERT. Named cases and language models are made anew, and the others are left alone.
"""

import inspect
import json
import shutil
import sys
import tempfile
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import load_file

HERE = Path(__file__).parent / "peft"
SIZES = {
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 12,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.4,
    "num_labels": 3,
}
TARGETS = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
LORA = {"r": 2, "lora_alpha": 3, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
CASES = {
    "query_value": LORA,
    "all_linear": {**LORA, "target_modules": "all-linear"},
    "rslora": {**LORA, "use_rslora": True},
    "patterns": {**LORA, "rank_pattern": {"0.attention.self.query": 3}, "alpha_pattern": {r"layer\.1\..*\.value": 7}},
    "bias_lora_only": {**LORA, "bias": "lora_only"},
    "bias_all": {**LORA, "bias": "all"},
    "modules_to_save": {**LORA, "task_type": None, "modules_to_save": ["pooler", "0.output.LayerNorm"]},
    "embeddings": {**LORA, "target_modules": ["word_embeddings", "key"]},
    "layers": {**LORA, "layers_to_transform": [1], "layers_pattern": "layer", "exclude_modules": ["self.value"]},
    "prefix": {"num_virtual_tokens": 3, "task_type": "SEQ_CLS"},
    "prefix_projection": {
        "num_virtual_tokens": 3,
        "task_type": "SEQ_CLS",
        "prefix_projection": True,
        "encoder_hidden_size": 4,
    },
    "dora": {**LORA, "use_dora": True},
    "loha": {"kind": peft.LoHaConfig, "r": 2, "alpha": 3, "rank_pattern": {"0.attention.self.query": 1}, **TARGETS},
    "hra": {"kind": peft.HRAConfig, "r": 4, **TARGETS},
    "hra_gram_schmidt": {"kind": peft.HRAConfig, "r": 3, "apply_GS": True, "init_weights": False, **TARGETS},
    "oft": {"kind": peft.OFTConfig, "oft_block_size": 4, **TARGETS},
    "oft_shared": {
        "kind": peft.OFTConfig,
        "r": 2,
        "oft_block_size": 0,
        "block_share": True,
        "use_cayley_neumann": False,
        **TARGETS,
    },
    "boft": {"kind": peft.BOFTConfig, "boft_block_size": 4, **TARGETS},
    "miss": {"kind": peft.MissConfig, "r": 3, **TARGETS},
    "ln_tuning": {"kind": peft.LNTuningConfig, "target_modules": ["LayerNorm"], "task_type": "SEQ_CLS"},
    "ln_tuning_some": {
        "kind": peft.LNTuningConfig,
        "target_modules": ["0.output.LayerNorm", "embeddings.LayerNorm"],
        "task_type": "SEQ_CLS",
    },
    "trainable_tokens": {
        "kind": peft.TrainableTokensConfig,
        "token_indices": [5, 2, 9],
        "target_modules": ["word_embeddings"],
        "task_type": "SEQ_CLS",
    },
    "ia3": {
        "kind": peft.IA3Config,
        "target_modules": ["key", "value", "output.dense"],
        "feedforward_modules": ["output.dense"],
        "task_type": "SEQ_CLS",
    },
    "vera": {"kind": peft.VeraConfig, "r": 3, "projection_prng_key": 5, "d_initial": 0.2, **TARGETS},
    "lokr": {"kind": peft.LoKrConfig, "r": 1, "alpha": 3, "rank_pattern": {"0.attention.self.query": 2}, **TARGETS},
    "lokr_both": {
        "kind": peft.LoKrConfig,
        "r": 1,
        "alpha": 2,
        "decompose_both": True,
        "decompose_factor": 4,
        **TARGETS,
    },
    "prompt_tuning": {"kind": peft.PromptTuningConfig, "num_virtual_tokens": 3, "task_type": "SEQ_CLS"},
    "p_tuning": {
        "kind": peft.PromptEncoderConfig,
        "num_virtual_tokens": 3,
        "encoder_hidden_size": 4,
        "task_type": "SEQ_CLS",
    },
    "p_tuning_lstm": {
        "kind": peft.PromptEncoderConfig,
        "num_virtual_tokens": 3,
        "encoder_reparameterization_type": "LSTM",
        "encoder_hidden_size": 4,
        "task_type": "SEQ_CLS",
    },
    "multitask_prompt_tuning": {
        "kind": peft.MultitaskPromptTuningConfig,
        "num_virtual_tokens": 3,
        "num_tasks": 2,
        "num_ranks": 2,
        "task_type": "SEQ_CLS",
    },
    "fourierft": {"kind": peft.FourierFTConfig, "n_frequency": 20, "scaling": 30.0, **TARGETS},
    "randlora": {"kind": peft.RandLoraConfig, "r": 3, "randlora_alpha": 60, "projection_prng_key": 5, **TARGETS},
    "randlora_sparse": {"kind": peft.RandLoraConfig, "r": 2, "randlora_alpha": 40, "sparse": True, **TARGETS},
    "shira": {"kind": peft.ShiraConfig, "r": 1, "random_seed": 4, **TARGETS},
    "adalora": {
        "kind": peft.AdaLoraConfig,
        "init_r": 3,
        "target_r": 1,
        "lora_alpha": 4,
        "tfinal": 1,
        "total_step": 4,
        "orth_reg_weight": 0.0,
        **TARGETS,
    },
}
LANGUAGE = {  # base to class, configuration and its sizes
    "base_llama": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig,
        {
            "vocab_size": 11,
            "hidden_size": 8,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 8,
            "max_position_embeddings": 12,
            "initializer_range": 0.25,
        },
    ),
    "base_gpt2": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config,
        {
            "vocab_size": 11,
            "n_embd": 8,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 12,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "initializer_range": 0.4,
            "bos_token_id": None,
            "eos_token_id": None,
        },
    ),
}
PROMPT = {"kind": peft.AdaptionPromptConfig, "adapter_len": 3, "task_type": "CAUSAL_LM"}
CASES |= {
    "adaption_prompt": {**PROMPT, "on": "base_llama", "adapter_layers": 2},
    "adaption_prompt_gpt2": {**PROMPT, "on": "base_gpt2", "adapter_layers": 1},
}
INPUTS = {
    "input_ids": [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 0, 0]],
    "attention_mask": [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]],
    "token_type_ids": [[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]],
}


def base(on="base"):
    """The same network every time, of no name and no place."""
    torch.manual_seed(1)
    if on in LANGUAGE:
        network, config, sizes = LANGUAGE[on]
        return network(config(**sizes)).eval()
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES))
    backbone = model.bert.forward
    if "past_key_values" not in inspect.signature(backbone).parameters:  # newer transformers call it `cache`
        model.bert.forward = lambda *given, past_key_values=None, **more: backbone(
            *given, cache=past_key_values, **more
        )
        model.bert.forward.__signature__ = inspect.Signature(
            [inspect.Parameter("past_key_values", inspect.Parameter.KEYWORD_ONLY)]
        )
    return model.eval()


def tuned(kind=None, on="base", **options):
    """Four steps of Adam with PEFT."""
    torch.manual_seed(2)
    kind = kind or (peft.PrefixTuningConfig if "num_virtual_tokens" in options else peft.LoraConfig)
    model = peft.get_peft_model(base(on), kind(**options))
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.05)
    for step in range(1, 5):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
        if isinstance(model.base_model, peft.AdaLoraModel):
            model.base_model.update_and_allocate(step)
    return model.eval()


def loss(model):
    inputs = tensors(model)
    return model(**inputs, labels=inputs["input_ids"] if predicts_tokens(model) else torch.tensor([0, 2])).loss


def predicts_tokens(model):
    return model.config.model_type in ("llama", "gpt2")


def tensors(model):
    if predicts_tokens(model):  # without padding
        return {"input_ids": torch.tensor(INPUTS["input_ids"])}
    task = {"task_ids": torch.tensor([0, 0])} if getattr(model, "peft_type", "") == "MULTITASK_PROMPT_TUNING" else {}
    return {name: torch.tensor(rows) for name, rows in INPUTS.items()} | task


def gradients(model):
    """Of the loss, by the names that the parameters have in the file: PEFT writes them in the parameters' place."""
    model.zero_grad()
    loss(model).backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in model.named_parameters():
        if name in trained:
            parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        elif parameter.is_floating_point():
            parameter.data = torch.full_like(parameter, torch.nan)  # is written, and does not train
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.fill_(torch.nan)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        written = load_file(Path(directory) / "adapter_model.safetensors")
    return {name: value.tolist() for name, value in written.items() if not value.isnan().any()}


@torch.no_grad()
def logits_of(model):
    return model(**tensors(model)).logits.tolist()


def main(*cases):
    if not cases:
        shutil.rmtree(HERE, ignore_errors=True)
        base().save_pretrained(HERE / "base")
    (HERE / "base" / "expected.json").write_text(json.dumps({"inputs": INPUTS, "logits": logits_of(base())}) + "\n")
    for on in LANGUAGE:
        if not cases or on in cases:
            base(on).save_pretrained(HERE / on)
            (HERE / on / "generation_config.json").unlink()
            content = {"inputs": {"input_ids": INPUTS["input_ids"]}, "logits": logits_of(base(on))}
            (HERE / on / "expected.json").write_text(json.dumps(content) + "\n")
    for case in cases or CASES:
        if case in LANGUAGE:
            continue
        model = tuned(**CASES[case])
        shutil.rmtree(HERE / case, ignore_errors=True)
        model.save_pretrained(HERE / case)
        (HERE / case / "README.md").unlink()  # an empty model card
        expected = {"logits": logits_of(model)} | ({"base": on} if (on := CASES[case].get("on")) else {})
        expected["trains"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        expected["gradients"] = gradients(model)
        (HERE / case / "expected.json").write_text(json.dumps(expected) + "\n")
    for file in HERE.rglob("*.safetensors"):
        file.chmod(0o644)


if __name__ == "__main__":
    main(*sys.argv[1:])
