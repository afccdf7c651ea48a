"""The steps of `pretrain_vilt.py`; pictures, sentences and the loop are the CLIP's."""
