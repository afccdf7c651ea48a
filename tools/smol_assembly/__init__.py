"""The stages of `assemble_smol_vlm.py`; pictures, names and the loop are those of the CLIP's."""
