"""Stages of `assemble_smol_vlm.py` and `assemble_smol_qformer.py`; the loop is that of the CLIP."""
