"""An rlvr backend for GGUF files."""
