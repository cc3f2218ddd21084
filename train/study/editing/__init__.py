"""P4: which editors matter, where, at which rank, against LoRA?"""
