"""Trained policies in other formats, compared with what was trained. `rlvr export` and `rlvr.export` are this."""
