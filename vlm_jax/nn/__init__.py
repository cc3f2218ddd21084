"""Neural building blocks: the decoder, its layers, rotary angles, attention kernels."""
