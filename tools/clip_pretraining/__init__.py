"""The steps of `pretrain_clip.py`, one module each; what they share is in `config` and `loop`."""
