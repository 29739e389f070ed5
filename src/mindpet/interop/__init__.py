"""Other people's formats: adapter directories of Hugging Face PEFT."""

from mindpet.interop.hf_peft import PeftFormatError, load_peft, save_peft

__all__ = ["PeftFormatError", "load_peft", "save_peft"]
