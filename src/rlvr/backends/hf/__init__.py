"""The backend `hf`: transformers and PEFT."""
