collect_ignore = ["make_peft.py"]  # it needs torch, and holds no test
