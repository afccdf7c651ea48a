"""The steps of `pretrain_llava.py`, one module each; loop and corpus are `clip_pretraining`'s."""
