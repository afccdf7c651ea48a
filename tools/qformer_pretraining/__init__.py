"""Parts of `tools/pretrain_qformer.py`."""
