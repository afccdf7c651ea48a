"""Parts of `tools/study_resora.py`."""
