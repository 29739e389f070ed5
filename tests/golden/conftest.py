collect_ignore = ["make_peft.py", "make_adapters.py", "make_bitsandbytes.py"]  # they need torch, and hold no test
