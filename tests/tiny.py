"""A whole model directory, small enough to train in a second: random weights, a real tokenizer, all files."""

import json
import signal
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from mindpet.models import BertConfig, BertForSequenceClassification
from mindpet.models.loading import hugging_face_name

TOPICS = {
    "sea": ["boat", "wave", "fish", "harbour", "tide", "sail"],
    "sky": ["cloud", "star", "wind", "bird", "moon", "kite"],
    "land": ["tree", "hill", "road", "field", "stone", "farm"],
}
FILLERS = ["the", "a", "old", "new", "near", "under", "over", "and", "small", "quiet"]
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}


def write_model(directory: Path, seed: int = 5, **changes) -> Path:
    """config.json, model.safetensors and tokenizer.json of a tiny BERT without a head."""
    directory.mkdir(parents=True, exist_ok=True)
    sizes = {**SIZES, **changes}
    (directory / "config.json").write_text(json.dumps({"model_type": "bert", **sizes}))
    network = BertForSequenceClassification(BertConfig(**sizes))
    generator = np.random.default_rng(seed)
    tensors = {}
    for parameter in network.bert.get_parameters():
        scale = 1.0 if "word_embeddings" in parameter.name else 0.2  # the words show through all layers
        value = generator.standard_normal(parameter.shape).astype(np.float32) * scale
        if parameter.name.endswith("gamma"):
            value = value + 1
        tensors[hugging_face_name(parameter.name).removeprefix("bert.")] = value
    save_file(tensors, directory / "model.safetensors")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *FILLERS, *(word for words in TOPICS.values() for word in words)]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def sentences(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Sentences of fillers with some words of their topic."""
    generator = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        label = list(TOPICS)[index % len(TOPICS)]
        words = [*generator.choice(FILLERS, 3), *generator.choice(TOPICS[label], 4)]
        generator.shuffle(words)
        rows.append({"text": " ".join(words), "label": label})
    return rows


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def overrides(model: Path, train: Path, output: Path, *more: str) -> list[str]:
    """A short run on the tiny model."""
    return [
        f"model.path={model}",
        f"data.train={train}",
        f"output.directory={output}",
        "data.max_length=16",
        "train.batch_size=8",
        "train.epochs=2",
        "train.learning_rate=0.01",
        *more,
    ]


def hear_ctrl_c() -> None:
    """For a process that begins: what a shell runs in its background ignores SIGINT, and so do its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LANGUAGE_SIZES = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
}


def write_language_model(directory: Path, seed: int = 5, chat: bool = True, **changes) -> Path:
    """config.json, model.safetensors, tokenizer.json and tokenizer_config.json of a tiny LLaMA."""
    from mindpet.models.llama import LlamaConfig, LlamaForCausalLM

    directory.mkdir(parents=True, exist_ok=True)
    content = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **LANGUAGE_SIZES, **changes}
    (directory / "config.json").write_text(json.dumps(content))
    generator = np.random.default_rng(seed)
    tensors = {}
    for parameter in LlamaForCausalLM(LlamaConfig.from_content(content, "tiny")).get_parameters():
        value = generator.standard_normal(parameter.shape).astype(np.float32) * 0.2
        tensors[hugging_face_name(parameter.name)] = value + 1 if "norm" in parameter.name else value
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    language_tokenizer().save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (directory / "tokenizer_config.json").write_text(
        json.dumps({**settings, **({"chat_template": CHAT_TEMPLATE} if chat else {})})
    )
    return directory


def language_tokenizer() -> Tokenizer:
    """Byte-level BPE, trained on the sentences of :func:`stories`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=LANGUAGE_SIZES["vocab_size"],
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stories(200).splitlines(), trainer)
    return tokenizer


def stories(lines: int, seed: int = 0) -> str:
    """Sentences, one a line."""
    return "".join(row["text"] + "\n" for row in sentences(lines, seed))


def questions(count: int, seed: int = 0) -> list[dict[str, str]]:
    """A sentence for a prompt, and its topic for a response."""
    return [{"prompt": row["text"], "response": row["label"]} for row in sentences(count, seed)]
