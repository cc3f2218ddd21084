"""P0: does it matter where LoRA goes?"""
